"""Token perturbation guidance (TPG, Rajabi et al. 2025): the weak pass sees its image tokens in random order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from operators.ranges import Seed
from restore.backbones.base import Backbone, Prediction
from restore.backbones.transfer import send
from restore.guidance.base import Term, WeakPass
from restore.guidance.blocks import change_tokens, find_blocks
from restore.guidance.layers import require_ran
from restore.guidance.options import freeze
from restore.guidance.targets import SeededDraw


@dataclass(frozen=True)
class TPG(Term):
    """Token perturbation guidance. See Term for scale, interval and schedule.

    The image tokens enter the blocks of the chosen attention layers in random order, which keeps every token's norm
    and their mean. The block of a layer is its transformer block or, if none, the layer with its skip connection.

    layers: as restore.guidance.layers.choose_layers takes them, without heads.
    noise: a seed: the permutation depends only on it, t and the layer, and is shared by the images of a batch.
    """

    layers: str | Sequence[str]
    noise: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "layers", freeze(self.layers))

    def bind(self, backbone: Backbone) -> WeakPass:
        """Raises RestoreError for an unknown layer, and for heads."""
        blocks = find_blocks("tpg", self.layers, backbone.network, backbone.attention)

        def eps(x_t: torch.Tensor, t: float, condition: Any, strong: Prediction) -> torch.Tensor:
            draw = SeededDraw(self.noise, t)
            orders: dict[tuple, torch.Tensor] = {}  # shared by all calls of the network, however the batch is split

            def shuffle(block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
                count = tokens.shape[1]
                if (block, count) not in orders:
                    orders[block, count] = send(draw("uniform", (1, count))[0].argsort(), tokens.device)
                return tokens[:, orders[block, count]]

            with change_tokens(blocks, shuffle, "tpg") as ran:
                weak = backbone.predict(x_t, t, condition)
            require_ran([layer.path for layer in blocks.values()], ran)
            return weak.eps

        return WeakPass(eps, list(blocks))
