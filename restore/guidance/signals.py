"""The contribution of each term at every step, |eps − eps_weak|, as in PAG's Figs. 3 and 42."""

from __future__ import annotations

import dataclasses

import torch

from restore.backbones.base import Backbone
from restore.guidance.base import Guidance, Term, WeakPass, as_guidance


def record_signals(guidance: Term | Guidance, signals: dict[int, torch.Tensor]) -> Guidance:
    """Return the same guidance, which also writes each weak prediction's signal into `signals`.

    signals[k]: |eps − eps_weak| of term k's last prediction, averaged over the channels, (B, 1, h, w) as x_t.
    """
    guidance = as_guidance(guidance)
    terms = enumerate(guidance.terms)
    recorded = [_Recorded(a.scale, a, k, signals, interval=a.interval, schedule=a.schedule) for k, a in terms]
    return dataclasses.replace(guidance, terms=tuple(recorded))


@dataclasses.dataclass(frozen=True)
class _Recorded(Term):
    term: Term
    index: int
    signals: dict[int, torch.Tensor]

    def bind(self, backbone: Backbone) -> WeakPass:
        weak = self.term.bind(backbone)

        def eps(x_t, t, condition, strong):
            eps_weak = weak.eps(x_t, t, condition, strong)
            if eps_weak is not None:
                self.signals[self.index] = (strong.eps.detach() - eps_weak).abs().mean(dim=1, keepdim=True)
            return eps_weak

        return dataclasses.replace(weak, eps=eps)
