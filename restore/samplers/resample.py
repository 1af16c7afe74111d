"""ReSample: hard data consistency in latent diffusion (Song et al. 2024, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch

from operators.device import is_on_host
from operators.ranges import Count, NonNegative, Positive, Range, enforce_ranges
from restore.backbones.base import normalise
from restore.guidance import estimator
from restore.samplers.likelihood import l2_norm, likelihood_variance
from restore.samplers.steps import FiniteCheck, alpha_bars, as_column, ldm_timesteps, report

ASK_EVERY = 50  # iterations after which an accelerator is asked whether all images fit; those that do stay as they are


@enforce_ranges
def resample(
    prior,
    operator,
    y,
    *,
    noise,
    steps,
    guidance=None,
    condition=None,
    callback=None,
    zeta: NonNegative = 0.5,
    gamma: Positive = 40.0,
    every: Count = 10,
    travel: Count = 5,
    pixel_lr: Positive = 1e-2,
    pixel_iterations: Annotated[int, Range(0)] = 2000,
    latent_lr: Positive = 5e-3,
    latent_iterations: Annotated[int, Range(0)] = 500,
    tolerance: Positive | None = 1e-3,
    guided_estimate: bool = False,
    slips: bool = False,
) -> torch.Tensor:
    """Sample z_0 with decode(z_0) ~ p(x_0 | y) approximately: DDIM steps with a DPS step of zeta alpha_bar on
    ||y - A(D(z0_hat))||, and every so often, in the last two thirds, z0_y = argmin ||y - A(D(z))||² near z0_hat and

        z_t ~ N((s sqrt(alpha_bar) z0_y + (1 - alpha_bar) z_t) / (s + 1 - alpha_bar), (1 / s + 1 / (1 - alpha_bar))^-1),
        s = gamma (1 - alpha_bar_prev) / (1 - alpha_bar) (1 - alpha_bar / alpha_bar_prev)      (resampling, eq. 11).

    operator: a differentiable `A`, linear or not. The arguments of all samplers are in `restore.samplers`.
    steps: a number as `restore.samplers.steps.ldm_timesteps` takes it, or the times to visit.
    every, travel: data consistency at every `every`-th step, on the estimate `travel` DDIM steps further on.
    pixel_lr, pixel_iterations, latent_lr, latent_iterations: AdamW on the image, which is then encoded, while a third
        of the steps or more remains; on the latent later, and once at the end.
    tolerance: an image's optimisation ends once its root mean square residual is below; None: at sigma_y, because the
        published 1e-3 fits the noise of y too.
    guidance: moves the DDIM steps; guided_estimate: also the estimates that are fitted to y.
    slips: two mistakes of the authors' code: (1 - alpha_bar) eps for sqrt(1 - alpha_bar) eps in z0_hat, and the steps
        of `travel` with the alpha_bar of the step before.
    callback: also z0_hat, and after data consistency z_start (what it started from) and z0_y.
    """
    prior = normalise(prior, "vp")
    timesteps = ldm_timesteps(prior.schedule, steps)
    alpha_bar, alpha_bar_prev = alpha_bars(prior.schedule, timesteps)
    N = len(timesteps)
    if tolerance is None:
        tolerance = (likelihood_variance(operator, None, "tolerance") / 2) ** 0.5

    def clean(z, eps, a):
        return (z - (1 - a if slips else (1 - a) ** 0.5) * eps) / a**0.5

    def ddim(z, eps, a, a_prev):
        return a_prev**0.5 * (z - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - a_prev) ** 0.5 * eps

    def fit_to_y(z0, in_pixels):
        if in_pixels:
            return prior.encode(fit(prior.decode(z0), operator.A, y, pixel_lr, pixel_iterations, tolerance))
        return fit(z0, lambda z: operator.A(prior.decode(z)), y, latent_lr, latent_iterations, tolerance)

    z = noise(0, (len(y), *prior.shape), "start")
    check_finite = FiniteCheck(N)
    with estimator(prior, guidance) as estimate:
        for k, t in enumerate(timesteps):
            a, a_prev, left = alpha_bar[k], alpha_bar_prev[k], N - 1 - k

            # Soft data consistency: a DPS step through the decoder and the network.
            z = z.detach().requires_grad_()
            strong = estimate.strong(z, t, condition)
            eps = estimate.guided(strong, z, t, condition) if guided_estimate else None
            z0_hat = clean(z, strong.eps + (eps - strong.eps).detach() if guided_estimate else strong.eps, a)
            x0_hat = prior.decode(z0_hat)
            residual = l2_norm(y - operator.A(x0_hat), y)
            (gradient,) = torch.autograd.grad(residual.sum(), z)
            more = {}
            with torch.no_grad():
                eps = estimate.guided(strong, z, t, condition) if eps is None else eps
                z = ddim(z, eps, a, a_prev) - zeta * a * gradient

                # Hard data consistency, on the estimate some steps ahead.
                if 0 < left <= N - N // 3 and left % every == 0:
                    z_ahead = z
                    for i in range(k + 1, min(k + travel, N - 1) + 1):
                        at = i - 1 if slips else i
                        strong, guided = estimate(z_ahead, timesteps[i], condition)
                        z_start = clean(z_ahead, guided if guided_estimate else strong.eps, alpha_bar[at])
                        z_ahead = ddim(z_ahead, guided, alpha_bar[at], alpha_bar_prev[at])
                    z0_y = fit_to_y(z_start, left >= N // 3)
                    s = gamma * (1 - a_prev) / (1 - a) * (1 - a / a_prev)
                    mean = (s * a_prev**0.5 * z0_y + (1 - a_prev) * z) / (s + 1 - a_prev)
                    z = mean + (1 / (1 / s + 1 / (1 - a_prev))) ** 0.5 * noise(k, z.shape, "latent")
                    more = {"z_start": z_start, "z0_y": z0_y}
                if left == 0:
                    more = {"z_start": z, "z0_y": (z := fit_to_y(z, in_pixels=False))}
            check_finite(z, k, f"zeta={zeta:g}, pixel_lr={pixel_lr:g}, latent_lr={latent_lr:g}")
            more = {"z0_hat": z0_hat, "residual": residual, **more}
            report(callback, k, N, t, x_t=z, x0_hat=x0_hat, eps=eps, **more)
    with torch.no_grad():
        return prior.decode(z)


def fit(
    start: torch.Tensor, predict: Callable, y: torch.Tensor, lr: float, iterations: int, tolerance: float
) -> torch.Tensor:
    """Return argmin mean((y - predict(x))²) near `start`, by AdamW (weight decay 0.01) from there; each image stops by
    itself one step after its root mean square residual falls below `tolerance`."""
    with torch.enable_grad():
        x = start.detach().clone().requires_grad_()
        adam, active = torch.optim.AdamW([x], lr=lr, weight_decay=0.01), None
        ask_every = 1 if is_on_host(x) else ASK_EVERY
        for i in range(iterations):
            loss = (y - predict(x)).square().flatten(1).mean(dim=1)
            (x.grad,) = torch.autograd.grad(loss.sum(), x)
            before = x.detach().clone()
            adam.step()
            if active is not None:
                x.data = torch.where(active, x.data, before)
            unfitted = as_column(loss.detach() >= tolerance**2, x)
            active = unfitted if active is None else active & unfitted
            if (i + 1) % ask_every == 0 and not active.any():
                break
    return x.detach()
