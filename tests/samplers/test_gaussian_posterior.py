"""A Gaussian prior has a closed-form score and posterior: samplers are checked against both.

`pytest tests/samplers/test_gaussian_posterior.py -s` prints the bias of DPS that docs/verified.md states.
"""

import pytest
import torch

from benchmarks.posteriors import MixturePrior
from restore.backbones.schedule import Schedule
from restore.samplers.dps import dps
from restore.samplers.generate import generate

N, SHAPE, D = 4000, (3, 2, 2), 12
FEWER = 1000  # samples of DPS, whose bias is many times their error


def exact_prior(mean, cov, schedule=None, kind="eps"):
    return MixturePrior.gaussian(mean, cov, SHAPE, schedule, kind)


class Linear:
    """y = x M^T on flattened images."""

    def __init__(self, matrix):
        self.matrix = matrix

    def A(self, x):
        return x.flatten(1) @ self.matrix.T


@pytest.fixture(scope="module")
def prior():
    g = torch.Generator().manual_seed(0)
    root = torch.randn(D, D, generator=g, dtype=torch.float64) * 0.25
    return 0.5 * torch.randn(D, generator=g, dtype=torch.float64), root @ root.T + 0.01 * torch.eye(D)


def make_noise(seed=1):
    g = torch.Generator().manual_seed(seed)
    return lambda k, shape, kind: torch.randn(tuple(shape), generator=g, dtype=torch.float64)


def moments(x):
    flat = x.flatten(1)
    return flat.mean(0), torch.cov(flat.T)


@pytest.mark.parametrize("ddim_eta", [None, 0.0, 1.0])
def test_unconditional_moments(prior, ddim_eta):
    mean, cov = prior
    noise = make_noise()
    x = generate(exact_prior(mean, cov), N, steps=1000, noise=noise, ddim_eta=ddim_eta)
    got_mean, got_cov = moments(x)
    z = (got_mean - mean) / (cov.diagonal() / N).sqrt()
    assert z.abs().max() < 4
    sampling_error = ((cov.trace() ** 2 + (cov**2).sum()) / N).sqrt()
    assert (got_cov - cov).norm() < 2 * sampling_error
    # The check can fail: a covariance off by 15 % is outside.
    assert (1.15 * got_cov - cov).norm() > 2 * sampling_error


def posterior(prior, matrix, y, sigma):
    mean, cov = prior
    gain = cov @ matrix.T @ torch.linalg.inv(matrix @ cov @ matrix.T + sigma**2 * torch.eye(len(matrix)))
    return mean + gain @ (y - matrix @ mean), cov - gain @ matrix @ cov


def dps_moments(prior, zeta, *family, sigma=0.1):
    mean, cov = prior
    g = torch.Generator().manual_seed(3)
    matrix = torch.randn(6, D, generator=g, dtype=torch.float64)
    truth = mean + torch.linalg.cholesky(cov) @ torch.randn(D, generator=g, dtype=torch.float64)
    y = matrix @ truth + sigma * torch.randn(6, generator=g, dtype=torch.float64)
    noise = make_noise(5)
    x = dps(exact_prior(mean, cov, *family), Linear(matrix), y.expand(FEWER, -1), steps=1000, zeta=zeta, noise=noise)
    true_mean, true_cov = posterior(prior, matrix, y, sigma)
    got_mean, got_cov = moments(x)
    # Bias of the mean in units of how far the measurement moves the prior's mean.
    bias = (got_mean - true_mean).norm() / (mean - true_mean).norm()
    return float(bias), float(got_cov.trace() / true_cov.trace())


def test_dps_bias_is_as_documented(prior):
    """DPS only approximates the posterior. docs/verified.md states these numbers: if they change, DPS has."""
    results = {zeta: dps_moments(prior, zeta) for zeta in (0.0, 0.003, 0.01, 0.03, 0.1)}
    for zeta, (bias, spread) in results.items():
        print(f"zeta {zeta}: bias of the mean {bias:.3f} of the prior-to-posterior shift, variance x {spread:.2f}")
    # Without a data term the samples are the prior's; too small a step stops half-way, with too much spread.
    assert results[0.0] == pytest.approx((1.0, 4.3), rel=0.1)
    assert results[0.003] == pytest.approx((0.48, 2.06), rel=0.2)
    # With a fitting step the mean is 5 to 10 % off and the variance within 15 %: close, but not exact.
    for zeta in (0.01, 0.03, 0.1):
        bias, spread = results[zeta]
        assert 0.02 < bias < 0.13
        assert 0.8 < spread < 1.2


@pytest.mark.parametrize(
    "schedule, kind",
    [
        (Schedule.edm(0.01, 80.0), "x0"),
        (Schedule.flow(1000), "velocity"),
        (Schedule.from_config({"beta_schedule": "squaredcos_cap_v2"}), "v"),
    ],
)
def test_every_family_of_noise_levels_and_predictions(prior, schedule, kind):
    """The same samplers on EDM, flow matching and v-prediction: the prior's moments, and DPS's documented bias."""
    mean, cov = prior
    x = generate(exact_prior(mean, cov, schedule, kind), N, steps=200, noise=make_noise(), ddim_eta=0.0)
    got_mean, got_cov = moments(x)
    assert (got_mean - mean).norm() < 0.1 * mean.norm() + 4 * (cov.trace() / N).sqrt()
    assert (got_cov - cov).norm() < 0.1 * cov.norm() + 2 * ((cov.trace() ** 2 + (cov**2).sum()) / N).sqrt()
    bias, spread = dps_moments(prior, 0.03, schedule, kind)
    assert bias < 0.15 and 0.7 < spread < 1.3
