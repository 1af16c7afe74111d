"""Data consistency across an autoencoder: what changes in the image, and what only the measurement knows of it."""

from __future__ import annotations

import torch

import operators
from operators import RestoreError
from restore.samplers.likelihood import SIGMA_Y_FLOOR


def encode_change(prior, z0: torch.Tensor, image: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """Return the x_0 of the image `changed`, given z0 and image = prior.decode(z0); for pixel priors `changed` itself.

    On latents it is z0 + E(changed) - E(image): the autoencoder is no exact inverse, and encoding `changed` would move
    z0 even where the image stays.
    """
    return changed if prior.downscale == 1 else z0 + prior.encode(changed) - prior.encode(image)


def check_decoder_sigma(prior, decoder_sigma: float) -> None:
    """Raise RestoreError if decoder_sigma is positive for a pixel prior."""
    if decoder_sigma and prior.downscale == 1:
        raise RestoreError(f"decoder_sigma must be 0 for a pixel prior, which has no decoder, got {decoder_sigma:g}")


def decode_consistently(prior, operator, y, z0: torch.Tensor, sigma_y: float, decoder_sigma: float) -> torch.Tensor:
    """Return decode(z0) (B, 3, H, W) or, with decoder_sigma > 0 (on [-1, 1]), the image combined with y,

        argmin ||y - A x||^2 / sigma_y^2 + ||x - decode(z0)||^2 / decoder_sigma^2,

    the posterior mean if the decoder's error is white noise of that standard deviation.
    """
    image = prior.decode(z0)
    if not decoder_sigma:
        return image
    return operators.prox_l2(operator, image, y, (decoder_sigma / max(sigma_y, SIGMA_Y_FLOOR)) ** 2)
