"""Diffusion Posterior Sampling (DPS, Chung et al. 2023, Algorithm 1) with guided scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from operators import RestoreError
from restore.backbones.base import Backbone
from restore.guidance import estimator
from restore.samplers.steps import Diffusion


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
    backbone: Backbone,
    operator,
    y: torch.Tensor,
    *,
    x_T: torch.Tensor,
    timesteps: Iterable[int],
    zeta: float,
    noise: Callable[..., torch.Tensor],
    guidance=None,
    condition: Any = None,
    ddim_eta: float | None = None,
    data_norm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = l2_norm,
    clip: bool = True,
    callback: Callable[[dict], None] | None = None,
) -> torch.Tensor:
    """Sample x_0 ~ p(x_0 | y) approximately.

    operator: anything with a differentiable `A` (its noise is not used).
    y: measurement (B, ...). x_T: standard normal start (B, C, H, W).
    timesteps: original indices to visit. zeta: step size on the gradient of the data norm.
    noise: noise(k, shape, "latent") -> standard normal, k counting from the noisiest step.
    guidance: e.g. PAG(...); the data term sees the unguided x0_hat, the update the guided eps
        (PAG, Ahn et al. 2024, App. C.1). None is plain DPS.
    ddim_eta: None for DDPM with the learned variance (the paper's), else DDIM(eta).
    data_norm: (y - A(x0_hat), y) -> (B,), see DATA_NORMS; one number per image, so that images of a
        batch do not influence each other.
    callback: called after every step with step, steps, t, x_t, x0_hat, eps and residual (B,).
    Returns x_0 (B, C, H, W), not clamped. Raises RestoreError when the iterate is no longer finite.
    """
    diffusion = Diffusion(backbone.alphas_cumprod, timesteps)
    x_t = x_T
    with estimator(backbone, guidance) as estimate:
        for k, i in enumerate(reversed(range(len(diffusion)))):
            # Score: a pass with a graph for the likelihood.
            x_t = x_t.detach().requires_grad_()
            strong = estimate.strong(x_t, diffusion.timesteps[i], condition)

            # Likelihood: gradient of the data norm through A, the clamp and the network.
            x0_hat = diffusion.x0(x_t, strong.eps, i, clip)
            residual = data_norm(y - operator.A(x0_hat), y)
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
                    }
                )
    return x_t.detach()


def require_finite(x_t: torch.Tensor, k: int, setting: str) -> None:
    """Stop a diverged run at the step where it happened. Raises RestoreError."""
    if not torch.isfinite(x_t).all():
        raise RestoreError(
            f"the sample is not finite after step {k + 1}; lower the step size ({setting}) or the guidance scale, "
            "or use --precision fp32"
        )
