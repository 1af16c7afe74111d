"""Guided noise estimates: a strong prediction pushed away from weak ones.

    eps_guided = eps + sum_k s_k (eps − eps_weak_k)                       (PAG, Ahn et al. 2024, eq. 14)

Scales follow the paper: s = 0 is off. In the two other conventions in use the same guidance is s + 1 (the PAG
repository, and diffusers' `guidance_scale` for CFG). A kind of guidance is a dataclass with scale, interval
and `bind(backbone)`, which returns its weak branch: an object with `eps(x_t, t, condition, strong)` and
`modules`, the ones that behave differently in the weak pass when nothing else does (empty: the input or the
condition differs, nothing can be shared with the strong pass).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from operators import RestoreError
from restore.backbones.base import AttentionLayer, Backbone, Prediction
from restore.backbones.prefix import Tape, Trace
from restore.guidance.attention import Spoiled, perturbed
from restore.guidance.layers import resolve
from restore.guidance.targets import Draw, Target, find


class Guidance:
    """One or several guidance terms; `a + b` has the terms of both."""

    @property
    def terms(self) -> tuple[Any, ...]:
        return (self,)

    def __add__(self, other: Guidance) -> Sum:
        if not isinstance(other, Guidance):
            return NotImplemented
        return Sum(self.terms + other.terms)


@dataclass(frozen=True)
class Sum(Guidance):
    """Several terms on one strong pass."""

    parts: tuple[Any, ...]

    @property
    def terms(self) -> tuple[Any, ...]:
        return self.parts


@dataclass(frozen=True)
class PAG(Guidance):
    """Perturbed-attention guidance: the weak pass attends with spoilt maps in the chosen layers.

    scale: s, 0 is off. layers: names as restore.guidance.layers.resolve takes them ("i9", "input_blocks.9.1",
        a diffusers path; several separated by commas or in a list).
    heads: only these heads: indices for every layer, or a mapping from layer name to indices; None: all.
    target: what the map becomes, a name in restore.guidance.targets.TARGETS ("identity" is PAG) or a function.
    strength: u of (1 − u) A + u A', in [0, 1] (SoftPAG below 1).
    interval: (t_high, t_low), timesteps between which, both included, the guidance acts; None: always.
    noise: of the random targets: a seed (the draw then depends on seed, timestep and layer alone, and is
        shared by the images of a batch) or a function (kind, shape) -> tensor, kind "uniform" or "normal".
    """

    scale: float
    layers: str | Sequence[str]
    heads: int | Sequence[int] | Mapping[str, Sequence[int]] | None = None
    target: str | Target = "identity"
    strength: float = 1.0
    interval: tuple[int, int] | None = None
    noise: int | Draw = 0

    def __post_init__(self):
        _check(self.scale, self.interval)
        find(self.target)
        if not 0 <= self.strength <= 1:
            raise RestoreError(f"the strength of a perturbation must lie in [0, 1], not {self.strength}")

    def bind(self, backbone: Backbone) -> PerturbedBranch:
        """Raises RestoreError for a layer or head that the backbone does not have."""
        layers = resolve(self.layers, backbone.attention)
        heads = _heads_by_path(self.heads, layers, backbone.attention)
        target = find(self.target)
        spoiled = [Spoiled(layer, target, self.strength, heads[layer.path]) for layer in layers]
        return PerturbedBranch(backbone, spoiled, self.noise)


@dataclass(frozen=True)
class CFG(Guidance):
    """Classifier-free guidance (Ho & Salimans 2022): the weak pass sees the null condition.

    scale: w of eps + w (eps − eps_null), diffusers' guidance_scale − 1; 0 is off. interval: as PAG's.
    null: the weak pass's condition (a negative prompt, say) in place of the backbone's null_condition.
    Where the strong pass has no condition either and null is None, there is nothing to contrast: no weak pass.
    """

    scale: float
    interval: tuple[int, int] | None = None
    null: Any = None

    def __post_init__(self):
        _check(self.scale, self.interval)

    def bind(self, backbone: Backbone) -> NullBranch:
        """Raises RestoreError when neither the backbone nor the caller has a null condition."""
        if self.null is None and backbone.null_condition is None:
            raise RestoreError(
                "classifier-free guidance needs a null condition, which this backbone was not trained with; "
                "pass CFG(scale, null=...) or use PAG, which needs none"
            )
        return NullBranch(backbone, self.null)


class PerturbedBranch:
    """PAG's weak pass."""

    def __init__(self, backbone: Backbone, spoiled: Sequence[Spoiled], noise: int | Draw):
        self.backbone, self.spoiled, self.noise = backbone, spoiled, noise
        self.modules = [item.layer.module for item in spoiled]

    def eps(self, x_t: torch.Tensor, t: int, condition: Any, strong: Prediction) -> torch.Tensor:
        draw = self.noise if callable(self.noise) else seeded_draw(self.noise, t)
        with perturbed(self.spoiled, draw):
            return self.backbone.predict(x_t, t, condition).eps


class NullBranch:
    """CFG's weak pass."""

    modules: tuple = ()

    def __init__(self, backbone: Backbone, null: Any):
        self.backbone, self.null = backbone, null

    def eps(self, x_t: torch.Tensor, t: int, condition: Any, strong: Prediction) -> torch.Tensor | None:
        if condition is None and self.null is None:
            return None
        null = self.backbone.null_condition if self.null is None else self.null
        return self.backbone.predict(x_t, t, null).eps


def seeded_draw(seed: int, t: int) -> Draw:
    """Noise that depends on seed, timestep and the number of the draw alone: one draw for all images of a batch."""
    count = 0

    def draw(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
        nonlocal count
        state = np.random.SeedSequence([seed, int(t), count]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state) >> 1)
        count += 1
        sample = torch.rand if kind == "uniform" else torch.randn
        return sample(shape[1:], generator=generator).expand(shape)

    return draw


class Estimate:
    """Calls the backbone with guidance; made by `estimator`. evaluations: network passes so far."""

    def __init__(self, backbone: Backbone, guidance: Guidance | None, share_prefix: bool):
        self.backbone = backbone
        terms = guidance.terms if guidance is not None else ()
        self.branches = [(term, term.bind(backbone)) for term in terms if term.scale != 0]
        self.trace = Trace(backbone.network)
        self.tapes = [Tape(branch.modules) if share_prefix and branch.modules else None for _, branch in self.branches]
        self.evaluations = 0

    def __call__(self, x_t: torch.Tensor, t: int, condition: Any = None) -> tuple[Prediction, torch.Tensor]:
        """(strong, eps_guided): both halves at once, for samplers that need no gradient in between."""
        strong = self.strong(x_t, t, condition)
        return strong, self.guided(strong, x_t, t, condition)

    def strong(self, x_t: torch.Tensor, t: int, condition: Any = None) -> Prediction:
        """The plain Prediction, with a graph to x_t if x_t requires a gradient."""
        self.close()
        try:
            return self._strong(x_t, t, condition, [tape for _, _, tape in self._active(t) if tape is not None])
        except BaseException:
            self.close()
            raise

    @torch.no_grad()
    def guided(self, strong: Prediction, x_t: torch.Tensor, t: int, condition: Any = None) -> torch.Tensor:
        """The guided eps, detached, given the strong prediction of the same arguments, which must be the last one.

        Called after the backward through `strong`, the weak passes need memory that the graph no longer
        holds. Without an active term this is strong.eps and no weak pass is run.
        """
        eps = guided = strong.eps.detach()
        try:
            for term, branch, tape in self._active(t):
                with tape.replaying() if tape is not None and tape.recorded else nullcontext():
                    weak = branch.eps(x_t.detach(), t, condition, strong)
                if weak is not None:
                    self.evaluations += 1
                    guided = guided + term.scale * (eps - weak)
        finally:
            self.close()
        return guided

    def _active(self, t: int) -> list[tuple[Any, Any, Tape | None]]:
        return [
            (term, branch, tape)
            for (term, branch), tape in zip(self.branches, self.tapes, strict=True)
            if term.interval is None or term.interval[0] >= t >= term.interval[1]
        ]

    def _strong(self, x_t: torch.Tensor, t: int, condition: Any, tapes: list[Tape]) -> Prediction:
        with ExitStack() as stack:
            if tapes and not self.trace.calls:
                stack.enter_context(self.trace.listening(tapes))
            else:
                for tape in tapes:
                    if not tape.queues:
                        tape.follow(self.trace)
                    stack.enter_context(tape.recording())
            self.evaluations += 1
            return self.backbone.predict(x_t, t, condition)

    def close(self) -> None:
        """Drop the recordings of a pass that did not come to its end."""
        for tape in self.tapes:
            if tape is not None:
                tape.clear()


@contextmanager
def estimator(backbone: Backbone, guidance: Guidance | None = None, *, share_prefix: bool = True) -> Iterator[Estimate]:
    """`with estimator(backbone, guidance) as estimate: strong, eps_guided = estimate(x_t, t, condition)`, or, with a
    backward in between, `strong = estimate.strong(x_t, t)` and `eps_guided = estimate.guided(strong, x_t, t)`.

    Weak passes run without gradients, after the strong one, and take from it what the two have in common
    (share_prefix=False: compute everything twice; same bits). Attention processors are changed during a weak
    pass alone and put back whatever happens, so a backward between two calls sees the true network.
    Raises RestoreError for unknown layers or heads, and CFG without a null condition.
    """
    estimate = Estimate(backbone, guidance, share_prefix)
    try:
        yield estimate
    finally:
        estimate.close()


def _check(scale: float, interval: tuple[int, int] | None) -> None:
    if not math.isfinite(scale):
        raise RestoreError(f"a guidance scale must be a finite number, not {scale}")
    if interval is not None and (len(interval) != 2 or interval[0] < interval[1]):
        raise RestoreError(f"an interval is (t_high, t_low) with t_high >= t_low, not {interval}")


def _heads_by_path(heads, layers: list[AttentionLayer], attention) -> dict[str, tuple[int, ...] | None]:
    if isinstance(heads, Mapping):
        chosen: dict[str, Any] = dict.fromkeys((layer.path for layer in layers), None)
        for name, indices in heads.items():
            (layer,) = resolve([name], attention)
            if layer.path not in chosen:
                raise RestoreError(f"heads are given for '{name}', which is not among the perturbed layers")
            chosen[layer.path] = indices
    else:
        chosen = dict.fromkeys((layer.path for layer in layers), heads)
    result: dict[str, tuple[int, ...] | None] = {}
    for layer in layers:
        indices = chosen[layer.path]
        if indices is not None:
            indices = tuple(sorted({indices} if isinstance(indices, int) else set(indices)))
            if not indices or indices[0] < 0 or indices[-1] >= layer.heads:
                raise RestoreError(f"{layer.path} has heads 0..{layer.heads - 1}, not {list(indices)}")
        result[layer.path] = indices
    return result
