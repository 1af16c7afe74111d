"""Guided noise estimates: a strong prediction pushed away from weak ones.

    eps_guided = eps + sum_k s_k(t) (eps − eps_weak_k)                       (PAG, Ahn et al. 2024, eq. 14)

Three independent things. A *weak branch* says how the prediction is made worse, a *schedule* how the scale depends on
t, a *combination* how strong and weak meet (the sum above, or another of restore.guidance.combine). Scales follow
the paper: s = 0 is off. In the two other conventions in use the same guidance is s + 1 (the PAG repository, and
diffusers' `guidance_scale` for CFG).

A weak branch is a frozen dataclass with `bind(backbone)`, which returns an object with

    eps(x_t, t, condition, strong) -> eps_weak (B, C, H, W), or None where there is nothing to contrast;
    modules: those that behave differently in the weak pass when nothing else does (empty: the input or the
        condition differs, nothing can be shared with the strong pass);
    observing() (optional): a context manager that is entered around the strong pass, for a branch that needs to
        see something of it (restore.guidance.attention.observed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from operators import RestoreError
from operators.naming import lookup
from restore.backbones.base import Backbone, Prediction
from restore.backbones.forwards import find_compiled, run_uncompiled
from restore.backbones.prefix import Tape, Trace
from restore.guidance import combine as combinations

# Factors on the scale by u = t / T, T the noisiest time (u falls from 1 to 0 in sampling), each of mean 1 over u, so
# that s keeps its meaning. The falling ones are those of Wang et al. 2024: weak in the noise, strong at the end.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda u: 1.0,
    "linear": lambda u: 2 * (1 - u),
    "cosine": lambda u: 1 + math.cos(math.pi * u),
}


@dataclass(frozen=True)
class Term:
    """One weak branch with its scale s(t).

    scale: s, 0 is off: no weak pass is run. interval: (t_high, t_low), times between which, both included, the
        guidance acts; None: always. schedule: factor on s: a name in SCHEDULES, or a function t -> factor or its
        "module:function". Where the factor is 0 no weak pass is run either.
    """

    branch: Any
    scale: float
    interval: tuple[float, float] | None = None
    schedule: str | Callable[[float], float] = "constant"

    def __post_init__(self):
        if not (isinstance(self.scale, (int, float)) and math.isfinite(self.scale)):
            raise RestoreError(f"a guidance scale must be a finite number, not {self.scale}")
        interval = self.interval
        if interval is not None:
            if isinstance(interval, str) or len(interval) != 2 or interval[0] < interval[1]:
                raise RestoreError(f"an interval is (t_high, t_low) with t_high >= t_low, not {interval}")
            object.__setattr__(self, "interval", tuple(interval))
        if not callable(self.schedule):
            lookup(self.schedule, SCHEDULES, "guidance schedule")

    def at(self, t: float, backbone: Backbone) -> float:
        """s(t). Raises RestoreError for a named schedule on a backbone that does not tell its noisiest time."""
        if self.interval is not None and not self.interval[0] >= t >= self.interval[1]:
            return 0.0
        if self.schedule == "constant":
            return self.scale
        if self.schedule not in SCHEDULES:
            function = self.schedule if callable(self.schedule) else lookup(self.schedule, {}, "guidance schedule")
            return self.scale * function(t)
        if backbone.schedule is None:
            raise RestoreError(f"the guidance schedule '{self.schedule}' needs noise levels, which are not known here")
        return self.scale * SCHEDULES[self.schedule](min(max(t / backbone.schedule.ts[-1], 0.0), 1.0))


@dataclass(frozen=True)
class Guidance:
    """Terms on one strong pass, and how they meet; `a + b` has the terms of both.

    combine: see restore.guidance.combine: a name, {name: options}, "module:function" or the thing itself.
    """

    terms: tuple[Term, ...]
    combine: Any = "sum"

    def __post_init__(self):
        object.__setattr__(self, "terms", tuple(self.terms))
        object.__setattr__(self, "combine", combinations.find(self.combine))
        if not all(isinstance(term, Term) for term in self.terms):
            raise RestoreError(f"the terms of a guidance are Term(branch, scale, ...), not {self.terms!r}")

    def __add__(self, other: Guidance) -> Guidance:
        if not isinstance(other, Guidance):
            return NotImplemented
        own = {id(part): part for part in (self.combine, other.combine) if part is not combinations.weighted_sum}
        if len(own) > 1 and self.combine != other.combine:
            raise RestoreError(f"two combinations meet in a sum of guidances: {self.combine} and {other.combine}")
        return Guidance(self.terms + other.terms, next(iter(own.values()), "sum"))


class Estimate:
    """Calls the backbone with guidance; made by `estimator`. evaluations: network passes so far."""

    def __init__(self, backbone: Backbone, guidance: Guidance | None, share_prefix: bool = True):
        self.backbone = backbone
        terms = guidance.terms if guidance is not None else ()
        self.branches = [(term, term.branch.bind(backbone)) for term in terms if term.scale != 0]
        self.trace, self.compiled = Trace(backbone.network), find_compiled(backbone.network) if self.branches else []
        share_prefix = share_prefix and getattr(backbone, "share_prefix", True)
        self.tapes = [Tape(branch.modules) if share_prefix and branch.modules else None for _, branch in self.branches]
        self.combine = _bound(guidance.combine, backbone) if self.branches else None
        self.evaluations = 0

    def __call__(self, x_t: torch.Tensor, t: float, condition: Any = None) -> tuple[Prediction, torch.Tensor]:
        """(strong, eps_guided): both halves at once, for samplers that need no gradient in between."""
        strong = self.strong(x_t, t, condition)
        return strong, self.guided(strong, x_t, t, condition)

    def strong(self, x_t: torch.Tensor, t: float, condition: Any = None) -> Prediction:
        """The plain Prediction, with a graph to x_t if x_t requires a gradient."""
        self.close()
        try:
            return self._strong(x_t, t, condition)
        except BaseException:
            self.close()
            raise

    @torch.no_grad()
    def guided(self, strong: Prediction, x_t: torch.Tensor, t: float, condition: Any = None) -> torch.Tensor:
        """The guided eps, detached, given the strong prediction of the same arguments, which must be the last one.

        Called after the backward through `strong`, the weak passes need memory that the graph no longer
        holds. Without an active term this is strong.eps and no weak pass is run.
        """
        eps, x_t, weak = strong.eps.detach(), x_t.detach(), []
        try:
            for scale, branch, tape in self._active(t):
                with ExitStack() as stack:
                    if branch.modules:
                        stack.enter_context(run_uncompiled(self.compiled))
                    if tape is not None and tape.recorded:
                        stack.enter_context(tape.replaying())
                    eps_weak = branch.eps(x_t, t, condition, strong)
                if eps_weak is not None:
                    self.evaluations += 1
                    weak.append((scale, eps_weak))
        finally:
            self.close()
        return self.combine(eps, weak, x_t, t) if weak else eps

    def _active(self, t: float) -> list[tuple[float, Any, Tape | None]]:
        scales = [term.at(t, self.backbone) for term, _ in self.branches]
        return [
            (scale, branch, tape)
            for scale, (_, branch), tape in zip(scales, self.branches, self.tapes, strict=True)
            if scale != 0
        ]

    def _strong(self, x_t: torch.Tensor, t: float, condition: Any) -> Prediction:
        active = self._active(t)
        tapes = [tape for _, _, tape in active if tape is not None]
        watch = [branch.observing() for _, branch, _ in active if hasattr(branch, "observing")]
        with ExitStack() as stack:
            if tapes or watch:
                stack.enter_context(run_uncompiled(self.compiled))
            for context in watch:
                stack.enter_context(context)
            if tapes and not self.trace.calls:
                stack.enter_context(self.trace.listening())  # this once nothing is shared
                tapes = []
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

    One estimator serves one run: a combination may remember its steps. Weak passes run without gradients, after
    the strong one, and from the second step on take from it what the two have in common (share_prefix=False:
    compute everything twice; same bits). What is changed on the network during a pass is seen by this thread
    alone and gone after it, so a backward between two calls, and other threads, see the true network.
    Raises RestoreError for unknown layers or heads, and CFG without a null condition.
    """
    estimate = Estimate(backbone, guidance, share_prefix)
    try:
        yield estimate
    finally:
        estimate.close()


def require_prior(backbone: Backbone, what: str) -> None:
    """Raises RestoreError for the network of a diffusers pipeline, which knows neither images nor clean estimates."""
    if not hasattr(backbone, "downscale"):
        raise RestoreError(f"{what} needs clean estimates, which a network inside a pipeline does not tell; use pag")


def _bound(combine: Any, backbone: Backbone) -> Callable[..., torch.Tensor]:
    if hasattr(combine, "bind"):
        return combine.bind(backbone)
    return lambda eps, weak, x_t, t: combine(eps, weak)
