"""DPIR on Gaussian priors, whose denoiser and posterior are closed formulas, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

import operators
import restore
from benchmarks.posteriors import SHAPE, MixturePrior, linear_schedule, smooth_covariance
from restore.backbones.base import Prediction
from restore.images.io import read_image
from restore.metrics.single import psnr
from restore.samplers.dpir import dpir
from restore.samplers.steps import turn, turn_back

SIGMA = 0.2


@pytest.fixture(scope="module")
def prior():
    mean = 0.2 * torch.randn(math.prod(SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return MixturePrior.gaussian(mean, smooth_covariance(SHAPE, 0))


def measure(prior, operator, n=1):
    g = torch.Generator().manual_seed(1)
    y = operator.A(prior.sample(n, g))
    return y + SIGMA * torch.randn(y.shape, generator=g, dtype=torch.float64)


def matrix(operator):
    return operator.A(torch.eye(math.prod(SHAPE), dtype=torch.float64).view(-1, *SHAPE)).flatten(1).T


def refuse_noise(*_):
    raise AssertionError("DPIR is deterministic")


@pytest.mark.parametrize("kind", ["vp", "ve", "flow"])
def test_one_step_on_plain_noise_is_the_posterior_mean(prior, kind):
    schedule = linear_schedule().normalise(kind)
    same = MixturePrior(prior.weights, prior.means, prior.covs, schedule=schedule)
    operator = operators.Denoising(noise=operators.GaussianNoise(SIGMA))
    y = measure(prior, operator)
    exact, _ = prior.posterior(operator, y, SIGMA).moments()
    before = same.evaluations
    found = dpir(same, operator, y, noise=refuse_noise, steps=1)
    assert same.evaluations == before + 1
    assert torch.allclose(found.flatten(), exact, atol=1e-5)
    assert float((y.flatten() - exact).norm()) > 0.5


@pytest.mark.parametrize(
    "operator",
    [
        operators.GaussianBlur(3, 0.8, noise=operators.GaussianNoise(SIGMA)),
        operators.Inpainting(
            (torch.arange(16).view(1, 1, 4, 4) % 3 != 0).float(), noise=operators.GaussianNoise(SIGMA)
        ),
        operators.SuperResolution(2, method="average", noise=operators.GaussianNoise(SIGMA)),
    ],
    ids=lambda operator: operator.name,
)
def test_every_step_is_that_of_the_paper(prior, operator):
    """Equations 6a and 6b written out with matrices: the data step solved, the denoiser a Gaussian's."""
    y, lam, levels = measure(prior, operator, 2), 0.3, [0.5, 0.5 * (SIGMA / 0.5) ** 0.5, SIGMA]
    A, mean, cov = matrix(operator), prior.means[0], prior.covs[0]
    eye, seen = torch.eye(len(cov), dtype=torch.float64), []
    found = dpir(prior, operator, y, noise=refuse_noise, steps=3, lam=lam, sigma_max=0.5, callback=seen.append)
    flat = y.flatten(1).T
    if y.shape[1:] == SHAPE:
        z = flat
    else:
        z = torch.linalg.solve(A.T @ A + SIGMA**2 * eye, A.T @ flat)
    for level, step in zip(levels, seen, strict=True):
        rho = lam * SIGMA**2 / level**2
        x = torch.linalg.solve(A.T @ A + rho * eye, A.T @ flat + rho * z)
        z = mean[:, None] + cov @ torch.linalg.solve(cov + level**2 * eye, x - mean[:, None])
        assert prior.schedule.ratio(step["t"]) == pytest.approx(level, rel=1e-6)
        assert torch.allclose(step["x0_hat"].flatten(1).T, z, atol=2e-2 if operator.name == "gaussian_blur" else 1e-5)
    assert torch.equal(found, seen[-1]["x0_hat"]) and len(seen) == 3


def test_estimates_are_clamped_if_the_prior_is_bounded(prior):
    operator = operators.Denoising(noise=operators.GaussianNoise(SIGMA))
    y = 3 * measure(prior, operator)
    assert dpir(prior, operator, y, noise=refuse_noise, steps=1).abs().max() > 1
    assert dpir(prior, operator, y, noise=refuse_noise, steps=1, clip=True).abs().max() == 1


def test_a_measurement_without_noise_is_explained(prior):
    operator = operators.GaussianBlur(3, 0.5)
    y = operator.A(prior.sample(1, torch.Generator().manual_seed(2)))
    found = dpir(prior, operator, y, noise=refuse_noise, steps=8)
    assert float((operator.A(found) - y).norm() / y.norm()) < 0.02


def test_steps_and_noise_that_do_not_apply(prior):
    operator = operators.Denoising(noise=operators.GaussianNoise(SIGMA))
    for steps in (0, "quad:20", [10, 20], True):
        with pytest.raises(restore.RestoreError, match="steps must be a number of noise levels"):
            dpir(prior, operator, measure(prior, operator), noise=refuse_noise, steps=steps)
    with pytest.raises(restore.RestoreError, match="dpir needs Gaussian noise"):
        noisy = operators.Denoising(noise=operators.PoissonNoise(0.1))
        dpir(prior, noisy, measure(prior, operator), noise=refuse_noise, steps=1)


class Sided:
    """A prior whose estimates depend on where up is; it records the orientations of its inputs."""

    def __init__(self, inner):
        self.inner, self.seen = inner, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def predict(self, x_t, t, condition=None):
        self.seen.append(x_t)
        ramp = torch.linspace(-1, 1, x_t.shape[-2], dtype=x_t.dtype)[:, None]
        return Prediction(self.inner.predict(x_t, t, condition).eps + ramp)


def test_orientations(prior):
    """All: the mean over the eight, whose ramps cancel. Turns: one after another, at no cost."""
    white = MixturePrior.gaussian(
        torch.zeros(math.prod(SHAPE), dtype=torch.float64), torch.eye(math.prod(SHAPE)).double()
    )
    operator = operators.Denoising(noise=operators.GaussianNoise(SIGMA))
    y = measure(prior, operator)
    plain = dpir(white, operator, y, noise=refuse_noise, steps=1)
    sided = Sided(white)
    averaged = dpir(sided, operator, y, noise=refuse_noise, steps=1, orientations="all")
    assert torch.allclose(averaged, plain, atol=1e-6) and len(sided.seen) == 8
    assert len({tuple(x.flatten().tolist()) for x in sided.seen}) == 8
    assert not torch.allclose(dpir(Sided(white), operator, y, noise=refuse_noise, steps=1), plain, atol=0.05)
    turned = Sided(white)
    dpir(turned, operator, y, noise=refuse_noise, steps=8, orientations="turns")
    assert len(turned.seen) == 8


@pytest.mark.parametrize("k", range(8))
def test_turns_are_undone(k):
    x = torch.arange(24.0).view(1, 2, 3, 4)
    assert torch.equal(turn_back(turn(x, k), k), x)
    assert turn(x, k).shape == ((1, 2, 4, 3) if k % 2 else x.shape)


def test_the_eight_orientations_differ():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    assert len({tuple(turn(x, k).flatten().tolist()) for k in range(8)}) == 8


@pytest.mark.parametrize("kind", ["motion", "gaussian"])
def test_strong_noise_is_removed_with_a_blur(kind):
    """Noise of 25 of 255, which the data step must not magnify beyond what the denoiser is told of."""
    if kind == "motion":
        options = {"kernel_size": 15, "intensity": 0.5, "seed": 3, "border": "unknown"}
        operator = operators.MotionBlur(**options, noise=operators.GaussianNoise(25 / 127.5))
    else:
        operator = operators.GaussianBlur(15, 1.5, border="unknown", noise=operators.GaussianNoise(25 / 127.5))
    x = read_image("data/photos/coffee.jpg").pixels[..., 100:196, 200:296]
    y, truth = operator(x, torch.Generator().manual_seed(0)), operators.cut_margin(operator, x)
    restorer = restore.load("embedded-photo")
    method = restorer.method(operator, size=x.shape[-2:])
    found = restorer(y, operator, method).samples[:, 0]
    assert float(psnr(found, truth)) > {"motion": 28.5, "gaussian": 29.3}[kind]
