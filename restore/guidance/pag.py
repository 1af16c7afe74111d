"""Perturbed-attention guidance (PAG, Ahn et al. 2024) and SoftPAG (Ahn et al. 2025).

The weak pass attends with another map on the chosen layers and heads,

    A = softmax(Q K^T / sqrt(d))  ->  (1 − u) A + u A',        PAG: A' = I, u = 1; SoftPAG: u < 1   (eqs. 10, 13)

and the estimate is pushed away from it: eps + s (eps − eps_weak)                                    (eq. 14)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch

from operators import RestoreError
from operators.naming import lookup
from operators.ranges import Count, Names, Seed
from restore.backbones.base import Backbone, Prediction
from restore.guidance.attention import PerturbedLayer, perturb_attention
from restore.guidance.base import Term, WeakPass
from restore.guidance.layers import (
    Heads,
    Strength,
    choose_layers,
    find_cross_attention,
    normalize_strength,
    require_ran,
    split_by_strength,
)
from restore.guidance.options import freeze
from restore.guidance.targets import TARGETS, Draw, SeededDraw, Target, find_target


@dataclass(frozen=True)
class PAG(Term):
    """Perturbed-attention guidance. See Term for scale, interval and schedule.

    layers: names as restore.guidance.layers.choose_layers takes them ("i9", "input_blocks.9.1", a diffusers path;
        several separated by commas or in a list; "i5:0,3" for two heads of one).
    heads: only these heads: indices for every layer, or a mapping from layer name to indices; None: all.
    target: A', a name in restore.guidance.targets.TARGETS ("identity" is PAG), {name: options} such as
        {"seg": {"sigma": 4}}, a function of an AttentionRecord or its "module:function".
    strength: u; or one for each of the chosen layers or heads, {"i5": {0: 0.5, 3: 1.0}, "m1": 0.3}.
    noise: of the random targets: a seed (the draw then depends only on seed, t and layer, and is shared by the
        images of a batch and the windows of an image) or a function (kind, shape) -> tensor, kind "uniform" or
        "normal", or its name.
    scope: where image and text tokens attend jointly, "joint" perturbs the map of all, "image" that of the image.
        "cross": the cross-attention beside the chosen layers in place of them, with target="zero" say (App. E.2).
    random_layers: perturb only so many of the layers, drawn at every time from `noise` (App. D.2); None: all.
    """

    layers: str | Sequence[str]
    heads: Heads = None
    target: Annotated[str | Mapping[str, Any] | Target, Names(TARGETS)] = "identity"
    strength: Strength = 1.0
    noise: Seed | str | Draw = field(default=0, kw_only=True)
    scope: Literal["joint", "image", "cross"] = field(default="joint", kw_only=True)
    random_layers: Count | None = field(default=None, kw_only=True)

    def __post_init__(self):
        object.__setattr__(self, "strength", normalize_strength(self.strength))
        super().__post_init__()
        find_target(self.target)
        for name in ("layers", "heads"):
            object.__setattr__(self, name, freeze(getattr(self, name)))

    def perturbed_layers(self, backbone: Backbone) -> list[PerturbedLayer]:
        """Return the layers and heads to perturb. Raises RestoreError for one that `backbone` does not have."""
        layers = choose_layers(self.layers, self.heads, backbone.attention)
        groups = split_by_strength(layers, self.strength, backbone.attention)
        if self.scope == "cross":
            network = getattr(backbone.network, "_orig_mod", backbone.network)
            groups = [(find_cross_attention(layer, network), heads, u) for layer, heads, u in groups]
        target = find_target(self.target)
        return [PerturbedLayer(layer, target, u, heads, self.scope) for layer, heads, u in groups]

    def bind(self, backbone: Backbone) -> WeakPass:
        """Raises RestoreError also if `random_layers` is more than the layers."""
        perturbed = self.perturbed_layers(backbone)
        paths = list(dict.fromkeys(item.layer.path for item in perturbed))
        if (self.random_layers or 0) > len(paths):
            raise RestoreError(f"random_layers must be at most the {len(paths)} layers, got {self.random_layers}")
        noise = lookup(self.noise, {}, "noise") if isinstance(self.noise, str) else self.noise
        key = None  # a function of the user's may do anything
        if self.random_layers is None and (isinstance(self.target, Mapping) or self.target in TARGETS):
            where = [(item.layer.path, item.strength, item.heads, item.scope) for item in perturbed]
            key = (tuple(where), repr(self.target))

        def eps(x_t: torch.Tensor, t: float, condition: Any, strong: Prediction) -> torch.Tensor:
            draw, chosen = noise if callable(noise) else SeededDraw(noise, t), paths
            if self.random_layers is not None:
                order = draw("uniform", (1, len(paths))).flatten().argsort().tolist()
                chosen = [paths[k] for k in order[: self.random_layers]]
            layers = [p for p in perturbed if p.layer.path in chosen]
            with perturb_attention(layers, draw, backbone.network, key=key) as ran:
                weak = backbone.predict(x_t, t, condition)
            require_ran(chosen, ran)
            return weak.eps

        return WeakPass(eps, [item.layer.module for item in perturbed])
