"""Diffusion Posterior Sampling (DPS, Chung et al. 2023, Algorithm 1) with guided scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from operators.naming import lookup
from restore.backbones.base import Backbone, variance_preserving
from restore.guidance import estimator
from restore.samplers.steps import Diffusion, require_finite


def l2_norm(difference: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """||y - A(x0_hat)||_2 of each image, not squared (DPS's choice for Gaussian noise); (B,)."""
    return torch.linalg.vector_norm(difference.flatten(1), dim=1)


def poisson_norm(difference: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """||y - A(x0_hat)||_Lambda of each image with Lambda = diag(1 / 2y) (DPS, eq. 19); (B,).

    y is taken as an intensity on [0, 1] and floored at one grey level, where the weight would diverge.
    """
    weight = 1 / (2 * ((y + 1) / 2).clamp(min=1 / 255))
    return torch.linalg.vector_norm((weight.sqrt() * difference).flatten(1), dim=1)


def poisson_reference_norm(difference: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """mean(||y - A(x0_hat)||_2 / |y|) of each image: what the DPS code computes for Poisson noise; (B,)."""
    return (l2_norm(difference, y)[:, None] / y.abs().flatten(1)).mean(dim=1)


DATA_NORMS = {"l2": l2_norm, "poisson": poisson_norm, "poisson-reference": poisson_reference_norm}


def dps(
    prior: Backbone,
    operator,
    y: torch.Tensor,
    *,
    noise: Callable[..., torch.Tensor],
    steps: int | str | Sequence[float],
    zeta: float,
    guidance=None,
    condition: Any = None,
    ddim_eta: float | None = None,
    data_norm: str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = "l2",
    scale_zeta: bool = True,
    clip: bool | None = None,
    callback: Callable[[dict], None] | None = None,
) -> torch.Tensor:
    """Sample x_0 ~ p(x_0 | y) approximately.

    prior: a backbone of the image's size (restore.backbones.sizes.Sized). operator: anything with a
        differentiable `A` (its noise is not used). y: measurement (B, ...).
    noise: noise(k, shape, kind) -> standard normal: kind "start" for x_T, "latent" for the steps, k counting
        from the noisiest one.
    steps: times to visit, as `Schedule.timesteps` takes them.
    zeta: step size on the gradient of the data norm, meant for images of the trained resolution: the norm grows
        with the root of the number of pixels, so with scale_zeta the step is zeta sqrt(H W) / resolution.
    guidance: e.g. PAG(...); the data term sees the unguided x0_hat, the update the guided eps
        (PAG, Ahn et al. 2024, App. C.1). None is plain DPS.
    ddim_eta: None for DDPM with the learned variance (the paper's), else DDIM(eta).
    data_norm: a name in DATA_NORMS, or (y - A(x0_hat), y) -> (B,); one number per image, so that images of a
        batch do not influence each other.
    clip: clamp x0_hat to [-1, 1]; None: where the prior's x_0 lies there.
    callback: called after every step with step, steps, t, x_t, x0_hat (image), eps, residual (B,), and `used`:
        the step size after scaling.
    Returns images (B, 3, H, W), not clamped. Raises RestoreError when the iterate is no longer finite.
    """
    prior = variance_preserving(prior)
    diffusion = Diffusion(prior.schedule, prior.schedule.timesteps(steps))
    norm = data_norm if callable(data_norm) else lookup(data_norm, DATA_NORMS, "data_norm")
    clip = prior.bounded if clip is None else clip
    shape = (len(y), *prior.shape)
    if scale_zeta:
        zeta = zeta * (shape[-2] * shape[-1]) ** 0.5 / prior.resolution
    x_t = noise(0, shape, "start")
    with estimator(prior, guidance) as estimate:
        for k, i in enumerate(reversed(range(len(diffusion)))):
            # Score: a pass with a graph for the likelihood.
            x_t = x_t.detach().requires_grad_()
            strong = estimate.strong(x_t, diffusion.timesteps[i], condition)

            # Likelihood: gradient of the data norm through A, the decoder, the clamp and the network.
            x0_hat = prior.decode(diffusion.x0(x_t, strong.eps, i, clip))
            residual = norm(y - operator.A(x0_hat), y)
            (grad,) = torch.autograd.grad(residual.sum(), x_t)

            # Prior: the sampler's own step with the guided score, then the likelihood step. The weak pass comes
            # now, when the graph's memory is free again.
            with torch.no_grad():
                eps = estimate.guided(strong, x_t, diffusion.timesteps[i], condition)
                v = None if strong.variance is None else strong.variance.detach()
                n = noise(k, x_t.shape, "latent")
                x_t = diffusion.step(x_t.detach(), eps, v, i, n, ddim_eta=ddim_eta, clip=clip) - zeta * grad
            require_finite(x_t, k, f"zeta={zeta:g}")
            if callback is not None:
                callback(
                    {
                        "step": k,
                        "steps": len(diffusion),
                        "t": diffusion.timesteps[i],
                        "x_t": x_t,
                        "x0_hat": x0_hat.detach(),
                        "eps": eps,
                        "residual": residual.detach(),
                        "used": {"zeta": zeta},
                    }
                )
    with torch.no_grad():
        return prior.decode(x_t.detach())
