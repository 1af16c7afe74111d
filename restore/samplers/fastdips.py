"""FAST-DIPS (2026, arXiv 2603.01591): a few steps of ADMM towards y from one clean estimate a level, for any A."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch

from operators import RestoreError
from operators.device import is_on_host
from operators.ranges import Count, NonNegative, Positive, Range, enforce_ranges
from restore.guidance import estimator
from restore.samplers.consistency import encode_change
from restore.samplers.likelihood import gaussian_sigma, l2_norm
from restore.samplers.steps import FiniteCheck, annealing_levels, as_column, report

HALVINGS = 8  # of a step that makes its objective larger
DIFFERENCE = 1e-3  # h of the forward difference
PUBLISHED_SIGMA = 0.05  # sigma_y at which 1 / (2 sigma_y²) is the published rho
LEAST_SIGMA = 0.005  # sigma_y that rho follows


@enforce_ranges
@torch.no_grad()
def fastdips(
    prior,
    operator,
    y,
    *,
    noise,
    steps,
    guidance=None,
    condition=None,
    callback=None,
    rho: Positive | None = None,
    epsilon: NonNegative | None = 0.05,
    admm_steps: Annotated[int, Range(0)] = 3,
    descent_steps: Count = 1,
    line_search: Literal["exact", "difference"] = "exact",
    sigma_max: Positive = 100.0,
    sigma_min: Positive = 0.1,
    pixels_above: NonNegative = 1.0,
    clip: bool | None = False,
) -> torch.Tensor:
    """Sample x_0 ~ p(x_0 | y) approximately: at every level sigma, in coordinates x = x_0 + sigma n,

        x_0     argmin ||x - x0_hat||² / (2 sigma²)  s.t.  ||A(x) - y|| <= epsilon,  by `admm_steps` steps of ADMM
        x_next  x_0 + sigma_next n

    without a gradient of the network; the last x0_hat is the result. The arguments of all samplers are in
    `restore.samplers`.

    operator: a differentiable `A`, linear or not; with "exact" its derivative is differentiated, too.
    steps: levels, as DAPS's, the last of them sigma_min, or their times. guidance: makes x0_hat.
    rho: ADMM's penalty; None: 1 / (2 sigma_y²), the published 200 at the published sigma_y of 0.05, and at noise that
        is not Gaussian. epsilon: of the whole y; None: sigma_y sqrt(m), m numbers in y.
    descent_steps, line_search: see `descend`. pixels_above: on latents, sigma above which x_0 is sought in the image
        and its change encoded, below it through the decoder.
    """
    schedule, clip = prior.schedule, prior.bounded if clip is None else clip
    sigma_y = gaussian_sigma(operator)
    radius = (sigma_y or 0.0) * y[0].numel() ** 0.5 if epsilon is None else epsilon
    if rho is None:
        rho = 0.5 / max(PUBLISHED_SIGMA if sigma_y is None else sigma_y, LEAST_SIGMA) ** 2
    sigma_max = min(sigma_max, float(schedule.ratios[-1]))
    if sigma_min > sigma_max:
        raise RestoreError(f"sigma_min must be at most sigma_max, {sigma_max:g}, got {sigma_min:g}")
    sigmas = annealing_levels(schedule, steps, sigma_max, sigma_min, to_zero=False)
    x_t = sigmas[0] * noise(0, (len(y), *prior.shape), "start")

    used = {"rho": rho, "epsilon": radius, "sigma_max": sigmas[0]}
    check_finite = FiniteCheck(len(sigmas))
    with estimator(prior, guidance) as estimate:
        for k, sigma in enumerate(sigmas):
            # Prior: one clean estimate.
            t = schedule.t(sigma)
            _, eps = estimate(schedule.alpha(t) * x_t, t, condition)
            x0_hat = x_t - sigma * eps
            x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
            image = prior.decode(x0_hat)

            # Data, and the noise of the next level.
            if k + 1 < len(sigmas):
                settings = (y, sigma**2, rho, radius, admm_steps, descent_steps)
                if prior.downscale > 1 and sigma <= pixels_above:
                    # A decoder's attention has no second derivative.
                    x0 = fit(lambda z: operator.A(prior.decode(z)), x0_hat, *settings, "difference")
                else:
                    x0 = encode_change(prior, x0_hat, image, fit(operator.A, image, *settings, line_search))
                x_t = x0 + sigmas[k + 1] * noise(k, x_t.shape, "latent")
            check_finite(x_t, k, f"rho={rho:g}")
            state = {"x_t": x_t, "x0_hat": image, "eps": eps}
            report(callback, k, len(sigmas), t, **state, used=used, operator=operator, y=y)
    return image


def fit(A: Callable, x0, y, gamma: float, rho: float, radius: float, admm_steps, descent_steps, line_search):
    """Return x near argmin ||x - x0||² / (2 gamma) with ||A(x) - y|| <= radius, each image for itself, by scaled ADMM:
    x descends at b = v - u, v = A(x) + u is drawn into the ball around y, u gathers what is left."""
    x, v, u = x0, A(x0), 0.0
    for _ in range(admm_steps):
        for _ in range(descent_steps):
            x = descend(A, x, x0, v - u, gamma, rho, line_search)
        w = A(x) + u
        distance = as_column(l2_norm(w - y, y), w)
        v = y + (w - y) * (radius / distance.clamp(min=torch.finfo(w.dtype).tiny)).clamp(max=1)
        u = w - v
    return x


def descend(A: Callable, x, x0, b, gamma: float, rho: float, line_search: str):
    """Return x after a step of steepest descent, each image's own, on

        F(x) = ||x - x0||² / (2 gamma) + rho/2 ||A(x) - b||².

    The step is the best one for A linearised at x ("exact", by a Jacobian-vector product) or along a forward difference
    of A, at most 1, and halved up to HALVINGS times where F grows.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        a = A(x)
        r = (a - b).detach().requires_grad_()
        (pulled,) = torch.autograd.grad(a, x, r, create_graph=line_search == "exact")  # J^T r
        g = ((x - x0) / gamma + rho * pulled).detach()
        pushed = (
            torch.autograd.grad(pulled, r, g)[0] if line_search == "exact" else None
        )  # J g, J^T r being linear in r
    x, r = x.detach(), r.detach()
    if pushed is None:
        pushed = (A(x + DIFFERENCE * g) - a.detach()) / DIFFERENCE
    slope = _dot(x - x0, g) / gamma + rho * _dot(r, pushed)
    curvature = _dot(g, g) / gamma + rho * _dot(pushed, pushed)
    step = (slope / curvature.clamp(min=torch.finfo(x.dtype).tiny)).clamp(0, 1)

    def objective(x, r):
        return _dot(x - x0, x - x0) / (2 * gamma) + rho / 2 * _dot(r, r)

    # For an accelerator a question costs more than the A of an operator, but less than a decoder.
    asks = is_on_host(x) or line_search == "difference"
    before = objective(x, r)
    for _ in range(HALVINGS):
        moved = x - as_column(step, x) * g
        grows = objective(moved, A(moved) - b) > before
        if asks and not grows.any():
            break
        step = torch.where(grows, step / 2, step)
    return x - as_column(step, x) * g


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).flatten(1).sum(dim=1)
