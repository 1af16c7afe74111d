"""Options of samplers that exist: dual, flower and lamp of DiffPIR, lamp of DDNM and DDRM, adam of DPS; by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import operators
from benchmarks.posteriors import MixturePrior
from restore.samplers.ddnm import ddnm
from restore.samplers.ddrm import ddrm
from restore.samplers.diffpir import diffpir
from restore.samplers.dps import dps
from restore.samplers.steps import Diffusion, Momentum, levels

SHAPE, D, SIGMA_Y = (3, 2, 2), 12, 0.3
IDENTITY = operators.Denoising(noise=operators.GaussianNoise(SIGMA_Y))


def draw(k, shape, kind="latent"):
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(k), dtype=torch.float64)


def white(deviation=1.0):
    zero, one = torch.zeros(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
    return MixturePrior.gaussian(zero, deviation**2 * one, SHAPE)


def relative(a, b):
    return float((a - b).norm() / b.norm())


Y = draw(99, (2, *SHAPE))


def by_hand(steps, *, lam=1.0, zeta=0.5, dual=False, variance=lambda a, s: (s / a) ** 2, beta=lambda k: 0.0):
    """DiffPIR's loop for A = I and x_0 ~ N(0, I), whose clean estimate is alpha x_t."""
    prior = white()
    x_t, u, before = draw(0, Y.shape), 0.0, None
    for k, ((_, a, s), (_, a_s, s_s)) in enumerate(pairwise(levels(prior.schedule, steps))):
        x0_hat = a * x_t / (a**2 + s**2)
        rho = lam * SIGMA_Y**2 / variance(a, s)
        x = (Y + rho * (x0_hat - (u if dual else 0.0))) / (1 + rho)
        x0 = x if not beta(k) else (1 - beta(k)) * x + beta(k) * before
        before = x
        x_s = a_s * x0
        if s_s:
            x_s = x_s + s_s * ((1 - zeta) ** 0.5 * (x_t - a * x0) / s + zeta**0.5 * draw(k, Y.shape))
            if dual:
                x_s, u = x_s + a_s * u, (u + x0 - x0_hat) * (s_s * a / (a_s * s)) ** 2
        x_t = x_s
    return x_t


def run(sampler=diffpir, deviation=1.0, steps=6, **own):
    return sampler(white(deviation), IDENTITY, Y, noise=draw, steps=steps, **own)


def test_dual():
    got = run(lam=1.0, zeta=0.5, clip=False, dual=True)
    assert relative(got, by_hand(6, dual=True)) < 1e-6
    assert relative(got, run(lam=1.0, zeta=0.5, clip=False)) > 1e-2
    assert relative(run(lam=1.0, zeta=0.5, clip=False), by_hand(6)) < 1e-6


def test_flower_is_exact_on_a_white_prior():
    """lam = 1: x0 is the posterior mean of x_0 given x_t and y, so that one step gives that of the last x."""
    got = run(lam=1.0, zeta=1.0, clip=False, prox="flower", steps=[500])
    prior = white()
    alpha, sigma = prior.schedule.alpha(500), prior.schedule.sigma(500)
    x_t = draw(0, Y.shape)
    precision = 1 + alpha**2 / sigma**2 + 1 / SIGMA_Y**2
    assert relative(got, (alpha * x_t / sigma**2 + Y / SIGMA_Y**2) / precision) < 1e-6
    assert relative(run(lam=1.0, zeta=1.0, clip=False, steps=[500]), got) > 1e-2


def lamp_factor(strength, k, visited):
    def h(i):
        (_, a, s), (_, a_s, s_s) = visited[i], visited[i + 1]
        return math.log(a_s / s_s) - math.log(a / s)

    if k < 3 or not visited[k + 1][2]:
        return 0.0
    return strength * (1 - (1 + h(k)) * math.exp(-h(k))) / h(k - 1)


def test_lamp_in_diffpir():
    visited = levels(white().schedule, 8)
    expected = by_hand(8, beta=lambda k: lamp_factor(2.0, k, visited))
    got = run(lam=1.0, zeta=0.5, clip=False, lamp=2.0, steps=8)
    assert relative(got, expected) < 1e-6 and relative(got, by_hand(8)) > 1e-3
    assert [k for k in range(8) if lamp_factor(2.0, k, visited)] == [3, 4, 5, 6]


def test_momentum():
    """Three steps without, then less a share of the change; strength 0 and the step to no noise give x0 itself."""
    momentum, x = Momentum(6.0), [draw(k, (1, 2)) for k in range(6)]
    grid = [(1.0, math.exp(-0.2 * k)) for k in range(6)]  # log(alpha / sigma) grows by 0.2
    beta = 6 * (1 - 1.2 * math.exp(-0.2)) / 0.2
    for k in range(5):
        got = momentum(x[k], grid[k], grid[k + 1])
        assert torch.equal(got, x[k]) if k < 3 else relative(got, x[k] - beta * (x[k] - x[k - 1])) < 1e-12
    assert momentum(x[5], grid[5], (1.0, 0.0)) is x[5]
    off = Momentum(0.0)
    assert all(off(x[k], grid[k], grid[k + 1]) is x[k] for k in range(5))


def test_lamp_in_ddnm():
    """Without noise, by hand: known pixels are y in every step, the others have momentum."""
    prior, mask = white(0.7), torch.ones(1, 1, 2, 2, dtype=torch.float64)
    mask[..., 0, 0] = 0
    visited, eta, before = levels(prior.schedule, 6), 0.85, None
    x_t = draw(0, Y.shape)
    for k, ((_, a, s), (_, a_s, s_s)) in enumerate(pairwise(visited)):
        x0_hat = a * 0.49 * x_t / (a**2 * 0.49 + s**2)
        x = torch.where(mask > 0, Y, x0_hat)
        beta = lamp_factor(2.0, k, visited)
        x0 = (1 - beta) * x + beta * before if beta else x
        eps, before = (x_t - a * x0_hat) / s, x
        x_t = a_s * x0 + s_s * (eta * draw(k, Y.shape) + (1 - eta**2) ** 0.5 * eps)
    own = {"noise": draw, "steps": 6, "sigma_y": 0.0}
    got = ddnm(prior, operators.Inpainting(mask), Y * mask, lamp=2.0, **own)
    assert relative(got, x_t) < 1e-5
    assert relative(ddnm(prior, operators.Inpainting(mask), Y * mask, **own), got) > 1e-3


ETA, ETA_B = 0.85, 0.7


def step_of_ddnm(x0_hat, a_s, s_s, n):
    """What DDNM+ makes of A = I: the estimate of x_0 to go on from, and the noise beside it."""
    own = a_s * SIGMA_Y  # the noise that y brings along
    weight = 1.0 if s_s > own else s_s * (1 - ETA**2) ** 0.5 / own
    return x0_hat + weight * (Y - x0_hat), ((s_s**2 - own**2) ** 0.5 if s_s > own else s_s * ETA) * n


def step_of_ddrm(x0_hat, a_s, s_s, n):
    """What DDRM makes of A = I."""
    r = s_s / a_s
    if r < SIGMA_Y:
        return x0_hat, s_s * ((1 - ETA**2) ** 0.5 * (Y - x0_hat) / SIGMA_Y + ETA * n)
    return (1 - ETA_B) * x0_hat + ETA_B * Y, a_s * (r**2 - (ETA_B * SIGMA_Y) ** 2) ** 0.5 * n


@pytest.mark.parametrize("sampler, step, own", [(ddnm, step_of_ddnm, {}), (ddrm, step_of_ddrm, {"eta_b": ETA_B})])
def test_lamp_in_singular_bases(sampler, step, own):
    """By hand: momentum on what is gone on from, not on its noise."""
    prior, before, x_t = white(0.7), None, draw(0, Y.shape)
    visited = levels(prior.schedule, 6)
    if sampler is ddrm:
        (_, a, s), *_ = visited
        x_t = a * (Y + ((s / a) ** 2 - SIGMA_Y**2) ** 0.5 * x_t)
    for k, ((_, a, s), (_, a_s, s_s)) in enumerate(pairwise(visited)):
        n = draw(k, Y.shape) if s_s else torch.zeros_like(Y)
        known, added = step(a * 0.49 * x_t / (a**2 * 0.49 + s**2), a_s, s_s, n)
        beta = lamp_factor(2.0, k, visited)
        x_t = a_s * ((1 - beta) * known + beta * before if beta else known) + added
        before = known
    got = run(sampler, deviation=0.7, steps=6, lamp=2.0, **own)
    assert relative(got, x_t) < 1e-5 and relative(run(sampler, deviation=0.7, steps=6, **own), got) > 1e-3


def test_adam_in_dps():
    """Two steps by hand: the direction's first value is the gradient's sign, the second has both moments.

    Divided by the root of its number of values it is as long as 1, and `zeta` is scaled as without."""
    seen, zeta = [], 0.5
    prior = white()
    own = {"zeta": zeta, "ddim_eta": 0.0, "clip": False}
    dps(prior, IDENTITY, Y, noise=draw, steps=[800, 400], adam=True, callback=seen.append, **own)
    diffusion, x_t, grads = Diffusion(prior.schedule, [800, 400]), draw(0, Y.shape), []
    for k, i in enumerate((1, 0)):
        a = float(diffusion.alpha_bar[i] ** 0.5)
        x0_hat = a * x_t
        residual = Y - x0_hat
        grads.append(-a * residual / residual.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        if k == 0:
            direction = grads[0].sign()
        else:
            m = (0.25 * grads[0] + 0.5 * grads[1]) / 0.75
            v = (0.21 * grads[0] ** 2 + 0.3 * grads[1] ** 2) / 0.51
            direction = m / v.sqrt()
        step = seen[k]["used"]["zeta"] * direction / Y[0].numel() ** 0.5
        x_t = diffusion.ddim(x_t, x0_hat, 0.0, i, draw(k, Y.shape)) - step
        assert relative(seen[k]["x_t"], x_t) < 1e-5
        x_t = seen[k]["x_t"]
    assert seen[0]["used"] == {"zeta": pytest.approx(zeta * (Y.shape[-2] * Y.shape[-1]) ** 0.5 / prior.resolution)}
    plain = dps(prior, IDENTITY, Y, noise=draw, steps=[800, 400], **own)
    assert relative(plain, seen[-1]["x_t"]) > 1e-3
