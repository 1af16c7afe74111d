"""RED-diff: variational sampling by score matching (Mardani et al. 2024, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch

import operators
from operators.naming import lookup
from operators.ranges import Names, NonNegative, Positive, enforce_ranges
from restore.guidance import estimator
from restore.samplers.likelihood import DataNorm, find_data_norm, gaussian_sigma
from restore.samplers.steps import FiniteCheck, FirstEstimate, reconstruct, report

# Weight of the prior at the noise-to-signal ratio q = sigma / alpha; the paper's choice is linear.
WEIGHTINGS = {"linear": lambda q: q, "sqrt": lambda q: q**0.5, "square": lambda q: q * q, "constant": lambda q: 1.0}


@enforce_ranges
def reddiff(
    prior,
    operator,
    y,
    *,
    noise,
    steps,
    guidance=None,
    condition=None,
    callback=None,
    lam: NonNegative = 0.25,
    lr: Positive = 0.1,
    weighting: Annotated[str | Callable, Names(WEIGHTINGS)] = "linear",
    v: NonNegative = 1.0,
    start_from: FirstEstimate | None = None,
    data_norm: DataNorm | None = None,
    start: FirstEstimate | None = None,
) -> torch.Tensor:
    """Return the mode mu of a narrow Gaussian fitted to p(x_0 | y): one Adam step per time t, from noisy to clean, on

        v ||y - A(mu)||² / (2 m) + lam w(sigma_t / alpha_t) mean(sg(eps(x_t) - n) mu),   x_t = alpha_t mu + sigma_t n,

    m the number of entries of one y, the mean over one image (so lam depends on m, and stands for sigma_y). The network
    is not differentiated. On latents mu is decoded before A. The arguments of all samplers are in `restore.samplers`.

    operator: a differentiable `A`, linear or not. noise: only of kind "latent". steps: the authors' are "ddimN".
    guidance: its eps takes the place of eps. weighting: w, a function of sigma / alpha.
    lam, lr: lambda, and Adam's step size (betas 0.9 and 0.99). Adam moves every pixel by about lr, whatever the loss.
    start_from: the first mu; None: "dagger" (the paper's), or "zero" if A is not linear. start: its
        older name. callback: x_t is mu; `used` has the start.
    """
    schedule, norm = prior.schedule, find_data_norm(operator, data_norm)
    w = weighting if callable(weighting) else lookup(weighting, WEIGHTINGS, "weighting")
    timesteps, shape = schedule.timesteps(steps), (len(y), *prior.shape)
    start_from = start_from or start or ("dagger" if operators.is_linear(operator) else "zero")
    with torch.no_grad():
        mu = reconstruct(start_from, prior, operator, y, gaussian_sigma(operator) or 0.0).clone().requires_grad_()
    adam = torch.optim.Adam([mu], lr=lr, betas=(0.9, 0.99))
    check_finite = FiniteCheck(len(timesteps))
    with estimator(prior, guidance) as estimate:
        for k, t in enumerate(timesteps):
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            n = noise(k, shape, "latent")
            with torch.no_grad():
                x_t = alpha * mu + sigma * n
                eps = estimate(x_t, t, condition)[1]
            with torch.enable_grad():
                residual = norm(y - operator.A(prior.decode(mu)), y)
                data = v * residual.square() / (2 * y[0].numel())
                regulariser = lam * w(sigma / alpha) * ((eps - n) * mu).flatten(1).mean(dim=1)
                (mu.grad,) = torch.autograd.grad((data + regulariser).sum(), mu)
            adam.step()
            check_finite(mu, k, f"lr={lr:g}")
            with torch.no_grad():
                x0_hat = prior.decode((x_t - sigma * eps) / alpha)
            state = {"x_t": mu.detach().clone(), "x0_hat": x0_hat, "eps": eps, "residual": residual}
            report(callback, k, len(timesteps), t, **state, used={"start": start_from})
    with torch.no_grad():
        return prior.decode(mu.detach())
