"""Skip-layer guidance (SLG, of Stable Diffusion 3.5): the weak pass leaves out whole blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from restore.backbones.base import Backbone, Prediction
from restore.guidance.base import Term, WeakPass
from restore.guidance.blocks import find_blocks, skip_blocks
from restore.guidance.layers import require_ran
from restore.guidance.options import freeze


@dataclass(frozen=True)
class SLG(Term):
    """Skip-layer guidance. See Term for scale, interval and schedule.

    What enters the blocks of the chosen attention layers leaves them unchanged. The block of a layer is its transformer
    block, with its feed-forward net and cross-attention, or, if none, the layer with its skip connection. With CFG the
    scale is that of diffusers; without it, diffusers' is s + 1.

    layers: as restore.guidance.layers.choose_layers takes them, without heads; "b7,b8,b9" for SD3.5 medium.
    """

    layers: str | Sequence[str]

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "layers", freeze(self.layers))

    def bind(self, backbone: Backbone) -> WeakPass:
        """Raises RestoreError for an unknown layer, and for heads."""
        blocks = find_blocks("slg", self.layers, backbone.network, backbone.attention)

        def eps(x_t: torch.Tensor, t: float, condition: Any, strong: Prediction) -> torch.Tensor:
            with skip_blocks(blocks) as ran:
                weak = backbone.predict(x_t, t, condition)
            require_ran([layer.path for layer in blocks.values()], ran)
            return weak.eps

        return WeakPass(eps, list(blocks))
