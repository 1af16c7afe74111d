"""DPIR: plug-and-play restoration by half-quadratic splitting (Zhang et al. 2021, Algorithm 1), and the posterior mean
of plain noise, which is its single step."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

import operators
from operators import RestoreError
from operators.ranges import NonNegative, Positive, enforce_ranges
from restore.backbones.base import normalise
from restore.guidance import estimator, remembers
from restore.samplers.likelihood import require_linear_gaussian
from restore.samplers.steps import ORIENTATIONS, FiniteCheck, reconstruct, report, turn, turn_back

APART = {"one": 8, "four": 2, "all": 1}  # every how many of the orientations are averaged
LAST_LEVEL_FLOOR = 0.01  # a network trained with noise removes none below it


@enforce_ranges
@torch.no_grad()
def dpir(
    prior,
    operator,
    y,
    *,
    noise,
    steps,
    guidance=None,
    condition=None,
    callback=None,
    lam: Positive = 0.23,
    sigma_max: NonNegative = 0.384,
    orientations: Literal["one", "turns", "four", "all"] = "one",
    sigma_y: NonNegative | None = None,
    clip: bool | None = None,
) -> torch.Tensor:
    """Estimate x_0 given y, near the posterior mean; all samples are equal. At noise levels sigma_k from sigma_max down
    to sigma_y, evenly spaced in log, starting with z = y (or a linear reconstruction if A changes the image's size),

        x = argmin ||y - A x||^2 + rho ||x - z||^2,  rho = lam (sigma_y / sigma_k)^2      (eq. 6a)
        z = x0_hat of the network, with x as its input of noise level sigma_k             (eq. 6b)

    If A is the identity, one step at sigma_y is Tweedie's formula, z = E[x_0 | y] as far as the network is right. The
    arguments of all samplers are in `restore.samplers`; noise is not used.

    prior: in pixels. operator: a linear one (see operators.prox_l2). guidance: makes z.
    steps: the number of levels; the last, and only one if 1, is sigma_y (at least LAST_LEVEL_FLOOR).
    orientations: of the network's input, which knows no up and down exactly: "turns" takes the next of the eight
        rotations and mirror images at every level, at no cost (sec. 4.2); "four", "all": the mean of as many of them.
    lam: the paper's lambda. sigma_max: on [-1, 1], at most the largest trained level; the paper has 49 / 255 on [0, 1].
    """
    sigma_y = require_linear_gaussian("dpir", prior, operator, sigma_y)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise RestoreError(f"steps must be a number of noise levels of at least 1 for dpir, got {steps!r}")
    prior = normalise(prior, "vp")
    clip = prior.bounded if clip is None else clip
    last = max(sigma_y, LAST_LEVEL_FLOOR)
    first = last if steps == 1 else max(last, sigma_max)
    z = operators.continue_margin(operator, y)
    if z.shape[-3:] != tuple(prior.shape):
        z = reconstruct("measurement", prior, operator, y, sigma_y)
        z = operators.continue_margin(operator, operators.cut_margin(operator, z))
    if orientations != "one" and remembers(guidance):
        raise RestoreError(
            "orientations must be 'one' for dpir with `every` or apg's momentum, which go from step to step"
        )
    check_finite = FiniteCheck(steps)
    with estimator(prior, guidance) as estimate:
        for k, level in enumerate(np.geomspace(first, last, steps)):
            # Data: the image nearest to z that explains y, an exact measurement as if it had a little noise.
            rho = lam * max(sigma_y / float(level), 1e-3) ** 2
            x = operators.prox_l2(operator, z, y, 1 / rho, rough=True)

            # Prior: x as a noisy image, whose clean estimate is the next z.
            t = prior.schedule.t(float(level))
            alpha, sigma = prior.schedule.alpha(t), prior.schedule.sigma(t)
            views = [k % ORIENTATIONS] if orientations == "turns" else range(0, ORIENTATIONS, APART[orientations])
            eps = torch.zeros_like(x)
            for view in views:
                _, turned = estimate(turn(alpha * x, view), t, condition)
                eps += turn_back(turned, view) / len(views)
            z = x - sigma / alpha * eps
            z = z.clamp(-1, 1) if clip else z
            check_finite(z, k, f"lam={lam:g}")
            report(callback, k, steps, t, x_t=alpha * x, x0_hat=z, eps=eps, operator=operator, y=y)
    return z
