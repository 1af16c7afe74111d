"""What the terms contribute at every step, as in PAG's Figs. 2, 3, 42 and 43: predictions, and |eps − eps_weak|."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from restore.backbones.base import Backbone
from restore.guidance.base import Change, Guidance, Term, WeakPass, as_guidance


@dataclasses.dataclass
class Record:
    """The last step of a recorded guidance.

    signals[k]: |eps − eps_weak| of term k or, without a weak pass, its change of eps at scale 1, averaged over the
    channels, (B, 1, h, w). x0, only if `predictions`, as they are as large as x_t: the clean estimates of the
    predictions "strong", "guided" and of term k, (B, C, h, w). Both lack what was off, and weak passes that an earlier
    one served (`every`).
    """

    predictions: bool = False
    signals: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    x0: dict[str | int, torch.Tensor] = dataclasses.field(default_factory=dict)

    def clear(self) -> None:
        self.signals.clear()
        self.x0.clear()


def record_guidance(guidance: Term | Guidance, record: Record) -> Guidance:
    """Return the same guidance, which also writes each step into `record`."""
    guidance = as_guidance(guidance)
    terms = enumerate(guidance.terms)
    common = [field.name for field in dataclasses.fields(Term)]
    recorded = [_Recorded(**{n: getattr(a, n) for n in common}, term=a, index=k, record=record) for k, a in terms]
    combine = _RecordedCombination(guidance.combine, record) if record.predictions else guidance.combine
    return Guidance(tuple(recorded), combine)


def _estimate_x0(eps: torch.Tensor, x_t: torch.Tensor, t: float, backbone: Backbone) -> torch.Tensor:
    alpha, sigma = backbone.schedule.levels(min(t, backbone.schedule.ts[-1]), x_t)
    return (x_t - sigma * eps) / alpha


@dataclasses.dataclass(frozen=True)
class _Recorded(Term):
    term: Term
    index: int
    record: Record

    def bind(self, backbone: Backbone) -> WeakPass | Change:
        weak = self.term.bind(backbone)
        if isinstance(weak, Change):
            return self._record_change(weak, backbone)

        def eps(x_t, t, condition, strong):
            eps_weak = weak.eps(x_t, t, condition, strong)
            if eps_weak is not None:
                self.record.signals[self.index] = (strong.eps.detach() - eps_weak).abs().mean(dim=1, keepdim=True)
                if self.record.predictions:
                    self.record.x0[self.index] = _estimate_x0(eps_weak, x_t, t, backbone)
            return eps_weak

        return dataclasses.replace(weak, eps=eps)

    def _record_change(self, change: Change, backbone: Backbone) -> Change:
        def direction(eps, x_t, t):
            added = change.direction(eps, x_t, t)
            self.record.signals[self.index] = added.abs().mean(dim=1, keepdim=True)
            if self.record.predictions:
                changed = eps + self.scale_at(t, backbone) * added
                self.record.x0["guided"] = _estimate_x0(changed, x_t, t, backbone)
            return added

        return Change(direction)


@dataclasses.dataclass(frozen=True)
class _RecordedCombination:
    combine: Any
    record: Record

    @property
    def unguided(self) -> bool:
        return getattr(self.combine, "unguided", False)

    @property
    def momentum(self) -> float:
        return getattr(self.combine, "momentum", 0.0)

    def bind(self, backbone: Backbone) -> Callable:
        bound = self.combine.bind(backbone) if hasattr(self.combine, "bind") else None

        def run(eps, weak, x_t, t):
            guided = self.combine(eps, weak) if bound is None else bound(eps, weak, x_t, t)
            for name, prediction in (("strong", eps), ("guided", guided)):
                self.record.x0[name] = _estimate_x0(prediction, x_t, t, backbone)
            return guided

        return run
