"""Unconditional and class-conditional sampling: DDPM (Ho et al. 2020) and DDIM (Song et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from restore.backbones.base import Backbone
from restore.guidance import estimator
from restore.samplers.dps import require_finite
from restore.samplers.steps import Diffusion


@torch.no_grad()
def generate(
    backbone: Backbone,
    *,
    x_T: torch.Tensor,
    timesteps: Iterable[int],
    noise: Callable[..., torch.Tensor],
    guidance=None,
    condition: Any = None,
    ddim_eta: float | None = None,
    clip: bool = True,
    callback: Callable[[dict], None] | None = None,
) -> torch.Tensor:
    """Sample x_0 ~ p(x_0) with guided scores (PAG, Ahn et al. 2024, sec. 5.1-5.2).

    x_T: standard normal start (B, C, H, W). condition: class labels (B,) or what the backbone takes.
    The other arguments are those of `restore.samplers.dps.dps`.
    Returns x_0 (B, C, H, W), not clamped; for a latent backbone a latent, to be decoded.
    """
    diffusion = Diffusion(backbone.alphas_cumprod, timesteps)
    x_t = x_T
    with estimator(backbone, guidance) as estimate:
        for k, i in enumerate(reversed(range(len(diffusion)))):
            strong, eps = estimate(x_t, diffusion.timesteps[i], condition)
            x0_hat = diffusion.x0(x_t, eps, i, clip)
            n = noise(k, x_t.shape, "latent")
            x_t = diffusion.step(x_t, eps, strong.variance, i, n, ddim_eta=ddim_eta, clip=clip)
            require_finite(x_t, k, "DDIM eta" if ddim_eta else "guidance")
            if callback is not None:
                step = {"step": k, "steps": len(diffusion), "t": diffusion.timesteps[i]}
                callback({**step, "x_t": x_t, "x0_hat": x0_hat, "eps": eps})
    return x_t
