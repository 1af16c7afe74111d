"""Diffusion Posterior Sampling (DPS, Chung et al. 2023, Algorithm 1) with guided scores."""

from __future__ import annotations

import torch

from operators.ranges import NonNegative, Share, enforce_ranges
from restore.backbones.base import normalise
from restore.guidance import estimator
from restore.samplers.likelihood import DataNorm, find_data_norm
from restore.samplers.steps import Diffusion, FiniteCheck, report

BETAS = 0.5, 0.7  # of Adam: few steps have no time for its usual 0.9 and 0.999


@enforce_ranges
def dps(
    prior,
    operator,
    y,
    *,
    noise,
    steps,
    guidance=None,
    condition=None,
    callback=None,
    zeta: NonNegative,
    ddim_eta: Share | None = None,
    data_norm: DataNorm | None = "l2",
    scale_zeta: bool = True,
    clip: bool | None = None,
    adam: bool = False,
) -> torch.Tensor:
    """Sample x_0 ~ p(x_0 | y) approximately; the arguments of all samplers are in `restore.samplers`.

    operator: anything with a differentiable `A`.
    zeta: step size on the gradient of the data norm, for images of the trained resolution: the norm grows with the
        root of the number of pixels, so with scale_zeta the step is zeta sqrt(H W) / resolution (`used` has it).
    guidance: in the update; the data term sees the unguided x0_hat (PAG, Ahn et al. 2024, App. C.1).
    adam: the step is zeta times the direction of Adam (BETAS) over the gradients of all steps, divided by the root of
        the number of values of x_t, so that it is about as long as a step without (AdamDPS, arXiv 2603.16797).
    ddim_eta: None for DDPM with the learned variance (the paper's), else DDIM(eta).
    """
    prior = normalise(prior, "vp")
    diffusion = Diffusion(prior.schedule, prior.schedule.timesteps(steps))
    norm = find_data_norm(operator, data_norm)
    clip = prior.bounded if clip is None else clip
    shape = (len(y), *prior.shape)
    if scale_zeta:
        zeta = zeta * (shape[-2] * shape[-1]) ** 0.5 / prior.resolution
    x_t, m, v2, (b1, b2) = noise(0, shape, "start"), 0.0, 0.0, BETAS
    check_finite = FiniteCheck(len(diffusion))
    with estimator(prior, guidance) as estimate:
        for k, i in enumerate(reversed(range(len(diffusion)))):
            t = diffusion.timesteps[i]

            # Score: a pass with a graph for the likelihood.
            x_t = x_t.detach().requires_grad_()
            strong = estimate.strong(x_t, t, condition)

            # Likelihood: gradient of the data norm through A, the decoder, the clamp and the network.
            x0_hat = prior.decode(diffusion.x0(x_t, strong.eps, i, clip))
            residual = norm(y - operator.A(x0_hat), y)
            (grad,) = torch.autograd.grad(residual.sum(), x_t)

            if adam:
                m, v2 = b1 * m + (1 - b1) * grad, b2 * v2 + (1 - b2) * grad.square()
                grad = m / (1 - b1 ** (k + 1)) / ((v2 / (1 - b2 ** (k + 1))).sqrt() + 1e-8) / grad[0].numel() ** 0.5

            # Prior: the sampler's own step with the guided score, then the likelihood step.
            with torch.no_grad():
                eps = estimate.guided(strong, x_t, t, condition)
                v = None if strong.variance is None else strong.variance.detach()
                n = noise(k, x_t.shape, "latent")
                x_t = diffusion.step(x_t.detach(), eps, v, i, n, ddim_eta=ddim_eta, clip=clip) - zeta * grad
            check_finite(x_t, k, f"zeta={zeta:g}")
            used = {"zeta": zeta}
            report(callback, k, len(diffusion), t, x_t=x_t, x0_hat=x0_hat, eps=eps, residual=residual, used=used)
    with torch.no_grad():
        return prior.decode(x_t.detach())
