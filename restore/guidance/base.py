"""Guided noise estimates: a strong prediction pushed away from weak ones.

    eps_guided = eps + sum_k s_k(t) (eps − eps_weak_k)                       (PAG, Ahn et al. 2024, eq. 14)

Three independent choices: how each *term* makes its weak prediction, how its scale depends on t (its *schedule*), and
how strong and weak predictions meet (the *combination*: the sum above, or another of restore.guidance.combine). Scales
follow the paper: s = 0 is off. In the PAG repository, and in diffusers' `guidance_scale`, the same guidance is s + 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import nn

from operators import RestoreError
from operators.naming import lookup
from operators.ranges import Count, Names, Range
from restore.backbones.base import Backbone, Prediction
from restore.backbones.forwards import find_compiled, run_uncompiled
from restore.backbones.graphs import find_graphs, run_eagerly
from restore.backbones.lean import keep_own_code
from restore.backbones.prefix import ChangedInPlace, Tape, Trace
from restore.guidance.combine import find_combination, weighted_sum
from restore.guidance.options import check_options

# Factors on the scale by u = t / T, T the noisiest time (u falls from 1 to 0 in sampling), each of mean 1 over u, so
# that s keeps its meaning. The falling ones are those of Wang et al. 2024: weak in the noise, strong at the end.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda u: 1.0,
    "linear": lambda u: 2 * (1 - u),
    "cosine": lambda u: 1 + math.cos(math.pi * u),
}
Time = Annotated[float, Range(-math.inf, math.inf)]


@dataclass(frozen=True)
class WeakPass:
    """A term's weak prediction on one backbone.

    eps: function (x_t, t, condition, strong) -> eps_weak (B, C, H, W); None if there is nothing to contrast.
    modules: those that behave differently in the weak pass on the same input. What is computed before the first of
        them is taken from the strong pass. Empty if the input or the condition differs: nothing can be shared.
    observe: function () -> context manager around the strong pass (restore.guidance.attention.observe_attention).
    """

    eps: Callable[[torch.Tensor, float, Any, Prediction], torch.Tensor | None]
    modules: Sequence[nn.Module] = ()
    observe: Callable[[], AbstractContextManager] | None = None


@dataclass(frozen=True)
class Change:
    """What a term without a weak pass does on one backbone: s(t) times a direction is added to the estimate that all
    weak passes have guided; of several changes each to that of the one before.

    direction: function (eps, x_t, t) -> (B, C, H, W), of the shape of eps.
    """

    direction: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class Term:
    """One term of a guidance, the base of PAG, CFG and the others. `a + b` is a Guidance with both. A subclass is a
    frozen dataclass that adds its options, whose annotations are their ranges (operators.ranges), and `bind`.

    has_weak_pass: whether `bind` returns a WeakPass, else (see ChangeTerm) a Change.
    scale: s; 0 is off: no weak pass is run.
    interval: (t_high, t_low), the times between which the guidance acts, both included; None: always.
    schedule: factor on s (0: no weak pass): a name in SCHEDULES, a function t -> factor or its "module:function".
    every: run the weak pass in the first of so many evaluations, and use its eps - eps_weak in the others again.
    """

    has_weak_pass: ClassVar[bool] = True

    scale: float
    interval: tuple[Time, Time] | None = field(default=None, kw_only=True)
    schedule: Annotated[str | Callable[[float], float], Names(SCHEDULES)] = field(default="constant", kw_only=True)
    every: Count = field(default=1, kw_only=True)

    def __post_init__(self):
        check_options(self)
        if self.interval is not None:
            if self.interval[0] < self.interval[1]:
                raise RestoreError(f"interval must be (t_high, t_low) with t_high >= t_low, got {self.interval!r}")
            object.__setattr__(self, "interval", tuple(self.interval))
        if not callable(self.schedule):
            lookup(self.schedule, SCHEDULES, "guidance schedule")

    def bind(self, backbone: Backbone) -> WeakPass | Change:
        """Return the weak pass, or the change, on `backbone`. Raises RestoreError if the options do not fit it."""
        raise NotImplementedError

    def scale_at(self, t: float, backbone: Backbone) -> float:
        """Return s(t). Raises RestoreError for a named schedule if the backbone's noise levels are unknown."""
        if self.interval is not None and not self.interval[0] >= t >= self.interval[1]:
            return 0.0
        if self.schedule == "constant":
            return self.scale
        if self.schedule not in SCHEDULES:
            function = self.schedule if callable(self.schedule) else lookup(self.schedule, {}, "guidance schedule")
            return self.scale * function(t)
        if backbone.schedule is None:
            raise RestoreError(
                f"schedule must be 'constant' or a function where noise levels are unknown, got '{self.schedule}'"
            )
        return self.scale * SCHEDULES[self.schedule](min(max(t / backbone.schedule.ts[-1], 0.0), 1.0))

    def __add__(self, other: Term | Guidance) -> Guidance:
        return as_guidance(self) + other


@dataclass(frozen=True)
class ChangeTerm(Term):
    """A term without a weak pass, whose `bind` returns a Change; it costs no network evaluation. every: 1."""

    has_weak_pass: ClassVar[bool] = False

    every: Annotated[int, Range(1, 1)] = field(default=1, kw_only=True)


@dataclass(frozen=True)
class Guidance:
    """Terms on one strong pass, and how they meet; `a + b` has the terms of both.

    combine: see restore.guidance.combine: a name, {name: options}, "module:function" or the combination itself.
    """

    terms: tuple[Term, ...]
    combine: Any = "sum"

    def __post_init__(self):
        object.__setattr__(self, "terms", tuple(self.terms))
        object.__setattr__(self, "combine", find_combination(self.combine))
        if not all(isinstance(term, Term) for term in self.terms):
            raise RestoreError(f"terms of a guidance must be instances of Term such as PAG and CFG, got {self.terms!r}")

    def __add__(self, other: Term | Guidance) -> Guidance:
        if not isinstance(other, (Term, Guidance)):
            return NotImplemented
        other = as_guidance(other)
        combinations = [part for part in (self.combine, other.combine) if part is not weighted_sum]
        if len(combinations) == 2 and combinations[0] != combinations[1]:
            raise RestoreError(f"guidances in a sum must have one combination, got {self.combine} and {other.combine}")
        return Guidance(self.terms + other.terms, combinations[0] if combinations else "sum")


def as_guidance(value: Term | Guidance | None) -> Guidance | None:
    """Return a Guidance of one term for a Term, and a Guidance or None unchanged. Raises RestoreError otherwise."""
    if value is None or isinstance(value, (Term, Guidance)):
        return Guidance((value,)) if isinstance(value, Term) else value
    raise RestoreError(f'guidance must be None or a guidance such as restore.PAG(1.0, layers="i9"), got {value!r}')


def remembers(guidance: Term | Guidance | None) -> bool:
    """Whether a guided estimate depends on the ones before, which must then be of the same picture."""
    guidance = as_guidance(guidance)
    if guidance is None:
        return False
    return any(term.every > 1 for term in guidance.terms) or bool(getattr(guidance.combine, "momentum", 0.0))


class Estimate:
    """The guided noise estimate of one run.

    `with estimator(backbone, guidance) as estimate: strong, eps_guided = estimate(x_t, t, condition)`, or, with a
    backward in between, `strong = estimate.strong(x_t, t)` and `eps_guided = estimate.guided(strong, x_t, t)`.

    A combination may remember its steps. Weak passes run without gradients, after the strong one, and from the second
    step on take from it what the two have in common (share_prefix=False: compute everything twice; same bits), unless
    the network turns out to change that in place, which is warned of once. Changes to the network during a pass are
    seen by this thread only and are gone after it, so a backward between two calls, and other threads, see the true
    network. evaluations: network passes so far. is_guided: whether a term acted in the last step. Made where gradients
    are on, no pass runs lean (backbones.lean).
    Raises RestoreError for unknown layers or heads, and for CFG without a null condition.
    """

    def __init__(self, backbone: Backbone, guidance: Term | Guidance | None = None, *, share_prefix: bool = True):
        self.backbone, guidance = backbone, as_guidance(guidance)
        terms = [term for term in (guidance.terms if guidance is not None else ()) if term.scale != 0]
        bound = [(term, term.bind(backbone)) for term in terms]
        self.changes = [(term, part) for term, part in bound if isinstance(part, Change)]
        weak = [(term, part) for term, part in bound if not isinstance(part, Change)]
        self.terms, self.passes = [term for term, _ in weak], [part for _, part in weak]
        self.compiled, self.graphs = (
            find_compiled(backbone.network) if self.terms else [],
            find_graphs(backbone.network),
        )
        if self.graphs is not None:
            self.graphs.begin_run()
        self.trace = getattr(self.graphs, "trace", None) or Trace(backbone.network)
        share_prefix = share_prefix and getattr(backbone, "share_prefix", True)
        self.tapes = [Tape(weak.modules if share_prefix else ()) for weak in self.passes]
        self.forget()
        combine = guidance.combine if self.terms else None
        self.combine = combine.bind(backbone) if hasattr(combine, "bind") else lambda eps, weak, *_: combine(eps, weak)
        self.combines_always = getattr(combine, "unguided", False)
        self.differentiates = torch.is_grad_enabled()
        self.evaluations, self.is_guided = 0, False

    def forget(self) -> None:
        """Let the next step begin anew, with weak passes of its own (`every`)."""
        self.kept: list[tuple[int, torch.Tensor | None]] = [(0, None)] * len(self.terms)  # uses left, eps - eps_weak

    def __call__(self, x_t: torch.Tensor, t: float, condition: Any = None) -> tuple[Prediction, torch.Tensor]:
        """Return (strong, eps_guided), for samplers that need no gradient between the two."""
        strong = self.strong(x_t, t, condition)
        return strong, self.guided(strong, x_t, t, condition)

    def strong(self, x_t: torch.Tensor, t: float, condition: Any = None) -> Prediction:
        """Return the plain Prediction, with a graph to x_t if x_t requires a gradient."""
        self.close()
        active = [item[:3] for item in self._active(t) if not self._is_kept(item[3], x_t)]
        tapes = [tape for _, _, tape in active if tape.changed]
        observers = [weak.observe() for _, weak, _ in active if weak.observe is not None]
        if self.graphs is not None:
            self.graphs.begin_step()
        with ExitStack() as stack:
            stack.push(lambda error, *_: self.close() if error else None)
            if tapes or observers:
                stack.enter_context(run_uncompiled(self.compiled))
            for observer in observers:
                stack.enter_context(observer)
            if tapes and not self.trace.calls:
                stack.enter_context(self.trace.record())  # the first pass finds the prefix; nothing is shared yet
                tapes = []
            for tape in tapes:
                if not tape.queues:
                    self._follow(tape)
                stack.enter_context(tape.record())
            stack.enter_context(keep_own_code(self.differentiates))
            self.evaluations += 1
            return self.backbone.predict(x_t, t, condition)

    @torch.no_grad()
    def guided(self, strong: Prediction, x_t: torch.Tensor, t: float, condition: Any = None) -> torch.Tensor:
        """Return the guided eps, detached; strong: the last strong prediction, of the same arguments.

        Called after the backward through `strong`, the weak passes need memory that the graph no longer holds.
        """
        eps, x_t, predictions = strong.eps.detach(), x_t.detach(), []
        try:
            for scale, weak, tape, k in self._active(t):
                if self._is_kept(k, x_t):
                    left, difference = self.kept[k]
                    self.kept[k] = (left - 1, difference)
                    predictions.append((scale, eps - difference))
                    continue
                with run_uncompiled(self.compiled if weak.modules else ()), keep_own_code(self.differentiates):
                    eps_weak = self._predict_weak(weak, tape, (x_t, t, condition, strong))
                if eps_weak is not None:
                    self.evaluations += 1
                    predictions.append((scale, eps_weak))
                    if self.terms[k].every > 1:
                        self.kept[k] = (self.terms[k].every - 1, eps - eps_weak)
        finally:
            self.close()
        self.is_guided = bool(predictions)
        if predictions or self.combines_always:
            eps = self.combine(eps, predictions, x_t, t)
        return self.change(eps, x_t, t)

    @torch.no_grad()
    def change(self, eps: torch.Tensor, x_t: torch.Tensor, t: float) -> torch.Tensor:
        """Return a guided eps as the terms without a weak pass change it; `guided` has done it."""
        for term, part in self.changes:
            scale = term.scale_at(t, self.backbone)
            eps = eps + scale * part.direction(eps, x_t, t) if scale != 0 else eps
        return eps

    def _predict_weak(self, weak: WeakPass, tape: Tape, inputs: tuple) -> torch.Tensor | None:
        if tape.recorded:
            try:
                with tape.replay():
                    eps = weak.eps(*inputs)
                if self.graphs is not None:
                    self.graphs.checked.add(frozenset(tape.queues))
                return eps
            except ChangedInPlace:
                name = type(self.backbone.network).__name__
                reason = f"{name} changes activations in place, as FreeU and T2I-Adapters make it do"
                warnings.warn(f"{reason}: weak passes are computed in full, which is right but slower", stacklevel=4)
                for other in self.tapes:
                    other.stop()
        if tape.changed and not tape.followed:  # the only pass that computes its prefix: not worth a graph
            with run_eagerly():
                return weak.eps(*inputs)
        return weak.eps(*inputs)

    def _follow(self, tape: Tape) -> None:
        """Let a tape record from now on what comes before its weak pass."""
        tape.follow(self.trace)
        if self.graphs is not None:  # what one run has learned of a compiled network holds for the next
            self.graphs.trace = self.trace
            tape.checked = frozenset(tape.queues) in self.graphs.checked

    def _active(self, t: float) -> list[tuple[float, WeakPass, Tape, int]]:
        scales = [term.scale_at(t, self.backbone) for term in self.terms]
        numbers = range(len(scales))
        return [item for item in zip(scales, self.passes, self.tapes, numbers, strict=True) if item[0] != 0]

    def _is_kept(self, k: int, x_t: torch.Tensor) -> bool:
        left, difference = self.kept[k]
        return left > 0 and difference.shape == x_t.shape

    def __enter__(self) -> Estimate:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Drop the recordings of a pass that was interrupted."""
        for tape in self.tapes:
            tape.clear()


estimator = Estimate  # reads better after `with`


def require_prior(backbone: Backbone, name: str) -> None:
    """Raises RestoreError for the network of a diffusers pipeline, which gives neither images nor clean estimates."""
    if not hasattr(backbone, "downscale"):
        raise RestoreError(f"{name} needs clean estimates, which a network inside a pipeline does not give; use pag")
