"""Unconditional and class-conditional sampling: DDPM (Ho et al. 2020) and DDIM (Song et al. 2021)."""

from __future__ import annotations

import torch

from operators.ranges import Count, Share, enforce_ranges
from restore.backbones.base import normalise
from restore.guidance import estimator
from restore.samplers.steps import Diffusion, FiniteCheck, report


@enforce_ranges
@torch.no_grad()
def generate(
    prior,
    n: Count,
    *,
    noise,
    steps,
    guidance=None,
    condition=None,
    callback=None,
    ddim_eta: Share | None = None,
    clip: bool | None = None,
) -> torch.Tensor:
    """Draw n images (n, 3, H, W), not clamped, with guided scores (PAG, Ahn et al. 2024, sec. 5.1-5.2). ddim_eta: None
    for DDPM, else DDIM(eta). callback: x0_hat is not decoded. The rest is as in `restore.samplers`."""
    prior = normalise(prior, "vp")
    diffusion = Diffusion(prior.schedule, prior.schedule.timesteps(steps))
    clip = prior.bounded if clip is None else clip
    x_t = noise(0, (n, *prior.shape), "start")
    check_finite = FiniteCheck(len(diffusion))
    with estimator(prior, guidance) as estimate:
        for k, i in enumerate(reversed(range(len(diffusion)))):
            strong, eps = estimate(x_t, diffusion.timesteps[i], condition)
            x0_hat = diffusion.x0(x_t, eps, i, clip)
            z = noise(k, x_t.shape, "latent")
            x_t = diffusion.step(x_t, eps, strong.variance, i, z, ddim_eta=ddim_eta, clip=clip)
            check_finite(x_t, k, "ddim_eta" if ddim_eta else "guidance")
            report(callback, k, len(diffusion), diffusion.timesteps[i], x_t=x_t, x0_hat=x0_hat, eps=eps)
    return prior.decode(x_t)
