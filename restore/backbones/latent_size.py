"""A latent backbone for images of one size, whatever the size of its latent cells."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from restore.backbones.base import LatentBackbone


class ForImageSize:
    """The LatentBackbone protocol for images of exactly height x width.

    The latent is the smallest whose sides the network divides and whose image covers height x width.
    `decode` crops that image, `encode` extends its argument to it by reflection; so a sampler and an
    operator that know only the true size work unchanged, and no pixel of the photo is resampled.

    predictor: what `predict` asks in the backbone's place, e.g. one that works in windows.
    """

    def __init__(self, backbone: LatentBackbone, height: int, width: int, predictor: Any = None) -> None:
        self.inner, self.height, self.width = backbone, height, width
        self.predict = (predictor or backbone).predict
        self.network, self.attention, self.alphas_cumprod = (
            backbone.network,
            backbone.attention,
            backbone.alphas_cumprod,
        )
        self.channels, self.resolution = backbone.channels, backbone.resolution
        self.multiple, self.downscale = backbone.multiple, backbone.downscale
        self.null_condition = backbone.null_condition

    def latent_shape(self, batch: int) -> tuple[int, int, int, int]:
        """(batch, C, h, w) of the latents."""
        step = self.downscale * self.multiple
        sides = (math.ceil(side / step) * self.multiple for side in (self.height, self.width))
        return (batch, self.channels, *sides)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Image (B, 3, height, width) of a latent of `latent_shape`."""
        return self.inner.decode(z)[..., : self.height, : self.width]

    def encode(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Latent of an image (B, 3, height, width); see LatentBackbone."""
        _, _, h, w = self.latent_shape(len(image))
        bottom, right = h * self.downscale - self.height, w * self.downscale - self.width
        # Reflection reaches no farther than the image; a border wider than it repeats its last row.
        mode = "reflect" if bottom < self.height and right < self.width else "replicate"
        return self.inner.encode(F.pad(image, (0, right, 0, bottom), mode=mode), noise)
