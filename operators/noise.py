"""Noise models: y_noisy = noise(y, generator), for measurements y (B, C, h, w) in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from operators import validate
from operators.errors import RestoreError


class GaussianNoise:
    """y + sigma n, n ~ N(0, 1); sigma is on the range [-1, 1] (0.05 here is 0.025 on [0, 1] and 6.4 grey levels)."""

    def __init__(self, sigma: float):
        self.sigma = validate.require_number(sigma, "sigma", low=0.0)

    def __call__(self, y: torch.Tensor, generator=None) -> torch.Tensor:
        """Return the noisy y, differentiable with respect to y. generator: see `Operator.__call__`."""
        options = {"dtype": torch.float32, "device": y.device}  # whatever torch's default is
        noise = draw_per_image(y, generator, lambda y, g: torch.randn(y.shape, generator=g, **options))
        return y + self.sigma * noise

    def std(self, y: torch.Tensor) -> torch.Tensor:
        """Return the standard deviation of the noise at each entry of the noiseless measurement y."""
        return torch.full_like(y, self.sigma)

    def __repr__(self) -> str:
        return f"GaussianNoise({self.sigma:g})"


class PoissonNoise:
    """Photon counts: k ~ Poisson(255 rate (y + 1) / 2), y_noisy = 2 k / (255 rate) - 1.

    The convention of DPS (Chung et al. 2023, Sec. 4). y is clamped to [-1, 1] before.

    rate: counts per grey level of 255; a larger rate means less noise.
    clip: clamp the result to [-1, 1], as DPS does (a saturating sensor), which biases bright pixels; with False the
        mean of y_noisy is y and its variance 2 (y + 1) / (255 rate) everywhere.
    """

    def __init__(self, rate: float = 1.0, *, clip: bool = True):
        self.rate = validate.require_positive(rate, "rate")
        self.clip = bool(clip)

    def __call__(self, y: torch.Tensor, generator=None) -> torch.Tensor:
        """Return the noisy y, without a gradient. generator: see `Operator.__call__`."""
        scale = 255.0 * self.rate

        def draw(y, g):
            expected = ((y.clamp(-1.0, 1.0) + 1.0) / 2.0) * scale
            return torch.poisson(expected, generator=g) / scale * 2.0 - 1.0

        noisy = draw_per_image(y, generator, draw)
        return noisy.clamp(-1.0, 1.0) if self.clip else noisy

    def std(self, y: torch.Tensor) -> torch.Tensor:
        """Return the standard deviation of the (unclipped) noise at each entry of the noiseless measurement y."""
        return (2.0 * (y.clamp(-1.0, 1.0) + 1.0) / (255.0 * self.rate)).sqrt()

    def __repr__(self) -> str:
        return f"PoissonNoise({self.rate:g}{'' if self.clip else ', clip=False'})"


def translate_noise(model) -> GaussianNoise | None:
    """Return the noise model of a deepinv physics as one of ours, its sigma taken on [-1, 1]. Raises RestoreError if it
    is not Gaussian with one sigma."""
    kind = type(model).__name__
    if model is None or kind == "ZeroNoise":
        return None
    if kind == "GaussianNoise" and torch.as_tensor(model.sigma).numel() == 1:
        return GaussianNoise(float(model.sigma))
    raise RestoreError(
        f"noise_model of the physics must be Gaussian with one sigma, got {kind}; try as_operator(physics, noise=...)"
    )


def draw_per_image(y: torch.Tensor, generator, draw: Callable) -> torch.Tensor:
    """Return draw(y, generator), or draw(y[i:i+1], generator[i]) for each image if there is a list of generators.

    draw sees y in float32 on the generator's device, so that float64 and half precision get the same noise.
    """

    def draw_part(part, g):
        source = part.detach().float().to(part.device if g is None else g.device)
        return draw(source, g).to(part.dtype).to(part.device)

    if generator is None or isinstance(generator, torch.Generator):
        return draw_part(y, generator)
    if not isinstance(generator, Sequence) or len(generator) != len(y):
        given = len(generator) if isinstance(generator, Sequence) else type(generator).__name__
        raise RestoreError(f"generator must be one torch.Generator or one for each of the {len(y)} images, got {given}")
    return torch.cat([draw_part(y[i : i + 1], g) for i, g in enumerate(generator)])
