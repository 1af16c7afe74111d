"""What each weak branch contributes at every step, |eps − eps_weak|, for people to look at (PAG, Figs. 3 and 42)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from restore.backbones.base import Backbone, Prediction
from restore.guidance.base import Guidance


def watched(guidance: Guidance, seen: dict[int, torch.Tensor]) -> Guidance:
    """The same guidance, which notes every weak prediction it makes.

    seen[k]: of the last one of term k, |eps − eps_weak| averaged over the channels, (B, 1, h, w), h and w those of x_t.
    """
    terms = [
        dataclasses.replace(term, branch=_Watched(term.branch, number, seen))
        for number, term in enumerate(guidance.terms)
    ]
    return dataclasses.replace(guidance, terms=tuple(terms))


@dataclasses.dataclass(frozen=True)
class _Watched:
    branch: Any
    number: int
    seen: dict[int, torch.Tensor]

    def bind(self, backbone: Backbone) -> _WatchedPass:
        return _WatchedPass(self.branch.bind(backbone), self.number, self.seen)


class _WatchedPass:
    def __init__(self, inner: Any, number: int, seen: dict[int, torch.Tensor]):
        self.inner, self.number, self.seen = inner, number, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def eps(self, x_t: torch.Tensor, t: float, condition: Any, strong: Prediction) -> torch.Tensor | None:
        weak = self.inner.eps(x_t, t, condition, strong)
        if weak is not None:
            self.seen[self.number] = (strong.eps.detach() - weak).abs().mean(dim=1, keepdim=True)
        return weak
