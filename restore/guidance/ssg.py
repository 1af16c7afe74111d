"""Self-swap guidance (SSG, Zhang et al. 2026): in the weak pass the least similar tokens change places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F

from operators.ranges import Range
from restore.backbones.base import Backbone, Prediction
from restore.guidance.base import Term, WeakPass
from restore.guidance.blocks import change_tokens, find_blocks
from restore.guidance.layers import require_ran
from restore.guidance.options import freeze


@dataclass(frozen=True)
class SSG(Term):
    """Self-swap guidance. See Term for scale, interval and schedule.

    Where image tokens enter the blocks of the chosen attention layers (as in TPG), the pairs with the smallest cosine
    between them are swapped, each image's own, the least similar first and no token twice.

    layers: as restore.guidance.layers.choose_layers takes them, without heads; None: all of them.
    share: pairs as a share of the tokens, at least one pair. axis: swap tokens, their channels, or one after the other.
    """

    layers: str | Sequence[str] | None = None
    share: Annotated[float, Range(above=0, high=0.5)] = 0.001
    axis: Literal["tokens", "channels", "both"] = "tokens"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "layers", freeze(self.layers))

    def bind(self, backbone: Backbone) -> WeakPass:
        """Raises RestoreError for an unknown layer, for heads, and for a network without attention."""
        layers = list(backbone.attention) if self.layers is None else self.layers
        blocks = find_blocks("ssg", layers, backbone.network, backbone.attention)

        def swap(block, tokens: torch.Tensor) -> torch.Tensor:
            tokens = swap_pairs(tokens, self.share) if self.axis != "channels" else tokens
            return swap_pairs(tokens.mT, self.share).mT if self.axis != "tokens" else tokens

        def eps(x_t: torch.Tensor, t: float, condition: Any, strong: Prediction) -> torch.Tensor:
            with change_tokens(blocks, swap, "ssg") as ran:
                weak = backbone.predict(x_t, t, condition)
            require_ran([layer.path for layer in blocks.values()], ran)
            return weak.eps

        return WeakPass(eps, list(blocks))


def swap_pairs(rows: torch.Tensor, share: float) -> torch.Tensor:
    """Return rows (B, N, d), of which max(1, floor(N share)) disjoint pairs have changed places: the pair with the
    smallest cosine, that of the others, and so on, in each image."""
    images, n = torch.arange(len(rows), device=rows.device), rows.shape[1]
    unit = F.normalize(rows.float(), dim=2)
    cosine = (unit @ unit.mT).masked_fill_(torch.eye(n, dtype=torch.bool, device=rows.device), torch.inf)
    order = torch.arange(n, device=rows.device).repeat(len(rows), 1)
    for _ in range(min(max(1, int(n * share)), n // 2)):
        least = cosine.flatten(1).argmin(dim=1)
        i, j = least // n, least % n
        order[images, i], order[images, j] = j, i
        for taken in (i, j):
            cosine[images, taken] = cosine[images, :, taken] = torch.inf
    return rows.gather(1, order[..., None].expand_as(rows))
