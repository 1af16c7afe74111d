"""RED-diff: variational sampling by score matching (Mardani et al. 2024, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from operators.naming import lookup
from restore.backbones.base import Backbone
from restore.guidance import estimator
from restore.samplers.likelihood import norm_of
from restore.samplers.steps import require_finite

# Weight of the prior at the noise-to-signal ratio q = sigma / alpha; the paper's choice is linear.
WEIGHTINGS = {"linear": lambda q: q, "sqrt": lambda q: q**0.5, "square": lambda q: q * q, "constant": lambda q: 1.0}
# Where the optimisation starts, at x of this shape.
STARTS = {
    "dagger": lambda prior, operator, y, shape: prior.encode(operator.A_dagger(y)),
    "adjoint": lambda prior, operator, y, shape: prior.encode(operator.A_adjoint(y)),
    "zero": lambda prior, operator, y, shape: y.new_zeros(shape),
}


def reddiff(
    prior: Backbone,
    operator,
    y: torch.Tensor,
    *,
    noise: Callable[..., torch.Tensor],
    steps: int | str | Sequence[float],
    guidance=None,
    condition: Any = None,
    lam: float = 0.25,
    lr: float = 0.1,
    weighting: str | Callable[[float], float] = "linear",
    v: float = 1.0,
    start: str | None = None,
    data_norm: str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    callback: Callable[[dict], None] | None = None,
) -> torch.Tensor:
    """The mode mu of a narrow Gaussian fitted to p(x_0 | y): one Adam step per time t, from noisy to clean, on

        v ||y - A(mu)||² / (2 m) + lam w(sigma_t / alpha_t) mean(sg(eps(x_t) - n) mu),   x_t = alpha_t mu + sigma_t n,

    m the number of entries of one y and the mean that of one image, as in the authors' code: so lam depends on how
    many measurements there are, and sigma_y enters through it alone. The network is never differentiated, A is: any
    differentiable operator will do, linear or not.

    prior: a backbone of the image's size (restore.backbones.sizes.Sized); on latents mu is the latent, and decoded
        before A. y: measurement (B, ...).
    noise: noise(k, shape, "latent") -> standard normal, k counting from the noisiest step. Nothing else is drawn.
    steps: times to visit, as `Schedule.timesteps` takes them. The authors' are "ddimN".
    guidance: its eps takes the place of eps, as in score distillation.
    lam, lr: lambda, and Adam's step size (betas 0.9 and 0.99). Adam moves every pixel by about lr, whatever the loss.
    weighting: w, a name in WEIGHTINGS or a function of sigma / alpha.
    v: weight of the data term.
    start: "dagger" (A⁺ y, the paper's), "adjoint" or "zero"; None: dagger, or zero where A is not linear.
    data_norm: as for DPS, squared; None: "poisson" for Poisson noise, else "l2".
    callback: called after every step with step, steps, t, x_t (mu), x0_hat (the image of (x_t − sigma eps) / alpha),
        eps, residual (B,), and `used`: the start.
    Returns images (B, 3, H, W), not clamped. Raises RestoreError when mu is no longer finite.
    """
    schedule, norm = prior.schedule, norm_of(operator, data_norm)
    w = weighting if callable(weighting) else lookup(weighting, WEIGHTINGS, "weighting")
    timesteps, shape = schedule.timesteps(steps), (len(y), *prior.shape)
    start = start or ("dagger" if getattr(operator, "linear", True) else "zero")
    with torch.no_grad():
        mu = lookup(start, STARTS, "start")(prior, operator, y, shape).clone().requires_grad_()
    adam = torch.optim.Adam([mu], lr=lr, betas=(0.9, 0.99))
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
            require_finite(mu, k, f"lr={lr:g}")
            if callback is not None:
                with torch.no_grad():
                    x0_hat = prior.decode((x_t - sigma * eps) / alpha)
                callback(
                    {
                        "step": k,
                        "steps": len(timesteps),
                        "t": t,
                        "x_t": mu.detach().clone(),
                        "x0_hat": x0_hat,
                        "eps": eps,
                        "residual": residual.detach(),
                        "used": {"start": start},
                    }
                )
    with torch.no_grad():
        return prior.decode(mu.detach())
