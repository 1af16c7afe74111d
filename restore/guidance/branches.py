"""Weak branches, and the guidances made of one alone: PAG and CFG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from operators import RestoreError
from operators.naming import check_known, lookup
from restore.backbones.base import Backbone, Prediction
from restore.guidance.attention import SCOPES, Perturbed, perturbed
from restore.guidance.base import Guidance, Term
from restore.guidance.layers import Heads, Strength, checked, choose, require_ran, strengths
from restore.guidance.options import frozen
from restore.guidance.sag import SelfAttention
from restore.guidance.targets import Draw, Target, find, seeded_draw
from restore.guidance.tpg import ShuffledTokens
from restore.guidance.tsg import PerturbedTime
from restore.guidance.weaker import SmallWindows, WeakerModel


@dataclass(frozen=True)
class PerturbedAttention:
    """The weak pass attends with perturbed maps in the chosen layers (PAG, Ahn et al. 2024).

    layers: names as restore.guidance.layers.choose takes them ("i9", "input_blocks.9.1", a diffusers path; several
        separated by commas or in a list; "i5:0,3" for two heads of one).
    heads: only these heads: indices for every layer, or a mapping from layer name to indices; None: all.
    target: what the map becomes, a name in restore.guidance.targets.TARGETS ("identity" is PAG), {name: options} such
        as {"seg": {"sigma": 4}}, a function of an AttentionRecord or its "module:function".
    strength: u of (1 − u) A + u A', in [0, 1] (SoftPAG below 1); or one for each of the chosen layers or heads,
        {"i5": {0: 0.5, 3: 1.0}, "m1": 0.3}.
    noise: of the random targets: a seed (the draw then depends on seed, t and layer alone, and is shared by the
        images of a batch) or a function (kind, shape) -> tensor, kind "uniform" or "normal", or its name.
    scope: where image and text tokens attend jointly, "joint" perturbs the map of all, "image" that of the image.
    """

    layers: str | Sequence[str]
    heads: Heads = None
    target: str | Mapping[str, Any] | Target = "identity"
    strength: Strength = 1.0
    noise: int | str | Draw = 0
    scope: str = "joint"

    def __post_init__(self):
        find(self.target)
        check_known([self.scope], SCOPES, "a perturbation has no scope")
        object.__setattr__(self, "strength", checked(self.strength))
        for name in ("layers", "heads"):
            object.__setattr__(self, name, frozen(getattr(self, name)))

    def bind(self, backbone: Backbone) -> PerturbedPass:
        """Raises RestoreError for a layer or head that the backbone does not have."""
        target = find(self.target)
        chosen = choose(self.layers, self.heads, backbone.attention)
        groups = strengths(chosen, self.strength, backbone.attention)
        items = [Perturbed(layer, target, u, heads, self.scope) for layer, heads, u in groups]
        noise = lookup(self.noise, {}, "noise") if isinstance(self.noise, str) else self.noise
        return PerturbedPass(backbone, items, noise)


@dataclass(frozen=True)
class NullCondition:
    """The weak pass sees the null condition (classifier-free guidance, Ho & Salimans 2022).

    null: the weak pass's condition (a negative prompt, say) in place of the backbone's null_condition.
    Where the strong pass has no condition either and null is None, there is nothing to contrast: no weak pass.
    """

    null: Any = None

    def bind(self, backbone: Backbone) -> NullPass:
        """Raises RestoreError when neither the backbone nor the caller has a null condition."""
        if self.null is None and backbone.null_condition is None:
            raise RestoreError(
                "classifier-free guidance needs a null condition, which this backbone was not trained with; "
                "pass CFG(scale, null=...) or use PAG, which needs none"
            )
        return NullPass(backbone, self.null)


BRANCHES = {
    "pag": PerturbedAttention,
    "cfg": NullCondition,
    "sag": SelfAttention,
    "tpg": ShuffledTokens,
    "tsg": PerturbedTime,
    "autoguidance": WeakerModel,
    "swg": SmallWindows,
}


def PAG(
    scale: float,
    layers: str | Sequence[str],
    heads: Heads = None,
    target: str | Mapping[str, Any] | Target = "identity",
    strength: Strength = 1.0,
    interval: tuple[float, float] | None = None,
    noise: int | str | Draw = 0,
    schedule: Any = "constant",
    scope: str = "joint",
) -> Guidance:
    """Perturbed-attention guidance: see PerturbedAttention for how, Term for scale, interval and schedule."""
    return Guidance(
        (Term(PerturbedAttention(layers, heads, target, strength, noise, scope), scale, interval, schedule),)
    )


def CFG(
    scale: float, interval: tuple[float, float] | None = None, null: Any = None, schedule: Any = "constant"
) -> Guidance:
    """Classifier-free guidance: w of eps + w (eps − eps_null), diffusers' guidance_scale − 1; 0 is off.

    See NullCondition for null, Term for interval and schedule.
    """
    return Guidance((Term(NullCondition(null), scale, interval, schedule),))


class PerturbedPass:
    """PAG's weak pass."""

    def __init__(self, backbone: Backbone, items: Sequence[Perturbed], noise: int | Draw):
        self.backbone, self.items, self.noise = backbone, items, noise
        self.modules = [item.layer.module for item in items]

    def eps(self, x_t: torch.Tensor, t: float, condition: Any, strong: Prediction) -> torch.Tensor:
        draw = self.noise if callable(self.noise) else seeded_draw(self.noise, t)
        with perturbed(self.items, draw, self.backbone.network) as ran:
            eps = self.backbone.predict(x_t, t, condition).eps
        require_ran([item.layer.path for item in self.items], ran)
        return eps


class NullPass:
    """CFG's weak pass."""

    modules: tuple = ()

    def __init__(self, backbone: Backbone, null: Any):
        self.backbone, self.null = backbone, null

    def eps(self, x_t: torch.Tensor, t: float, condition: Any, strong: Prediction) -> torch.Tensor | None:
        if condition is None and self.null is None:
            return None
        null = self.backbone.null_condition if self.null is None else self.null
        return self.backbone.predict(x_t, t, null).eps
