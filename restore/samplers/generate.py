"""Unconditional and class-conditional sampling: DDPM (Ho et al. 2020) and DDIM (Song et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from restore.backbones.base import Backbone, variance_preserving
from restore.guidance import estimator
from restore.samplers.steps import Diffusion, require_finite


@torch.no_grad()
def generate(
    prior: Backbone,
    n: int,
    *,
    noise: Callable[..., torch.Tensor],
    steps: int | str | Sequence[float],
    guidance=None,
    condition: Any = None,
    ddim_eta: float | None = None,
    clip: bool | None = None,
    callback: Callable[[dict], None] | None = None,
) -> torch.Tensor:
    """n samples x_0 ~ p(x_0) with guided scores (PAG, Ahn et al. 2024, sec. 5.1-5.2).

    condition: class labels (n,) or what the prior takes. The other arguments are those of `restore.samplers.dps.dps`.
    Returns images (n, 3, H, W), not clamped. Raises RestoreError when the iterate is no longer finite.
    """
    prior = variance_preserving(prior)
    diffusion = Diffusion(prior.schedule, prior.schedule.timesteps(steps))
    clip = prior.bounded if clip is None else clip
    x_t = noise(0, (n, *prior.shape), "start")
    with estimator(prior, guidance) as estimate:
        for k, i in enumerate(reversed(range(len(diffusion)))):
            strong, eps = estimate(x_t, diffusion.timesteps[i], condition)
            x0_hat = diffusion.x0(x_t, eps, i, clip)
            z = noise(k, x_t.shape, "latent")
            x_t = diffusion.step(x_t, eps, strong.variance, i, z, ddim_eta=ddim_eta, clip=clip)
            require_finite(x_t, k, "ddim_eta" if ddim_eta else "guidance")
            if callback is not None:
                step = {"step": k, "steps": len(diffusion), "t": diffusion.timesteps[i]}
                callback({**step, "x_t": x_t, "x0_hat": x0_hat, "eps": eps})
    return prior.decode(x_t)
