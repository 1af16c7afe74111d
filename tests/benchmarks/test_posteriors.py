"""The priors with a known posterior are what they say, and the measure of a sampler is 0 where it is right."""

import math

import pytest
import torch

from benchmarks.posteriors import (
    MixturePrior,
    compare_with_posterior,
    draw_measurement,
    example_operators,
    example_priors,
    sliced_wasserstein,
)

SIGMA = 0.1


@pytest.fixture(scope="module")
def small():
    """A mixture small enough for brute force: two components, three values (3, 1, 1)."""
    g = torch.Generator().manual_seed(0)
    roots = 0.4 * torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
    covs = roots @ roots.mT + 0.05 * torch.eye(3, dtype=torch.float64)
    means = torch.tensor([[0.5, -0.3, 0.2], [-0.6, 0.4, 0.1]], dtype=torch.float64)
    return MixturePrior(torch.tensor([0.3, 0.7], dtype=torch.float64), means, covs, (3, 1, 1))


def log_density(prior, x, alpha=1.0, sigma=0.0):
    """log of sum_k w_k N(x; alpha m_k, alpha² C_k + sigma² I) by torch.distributions, x (N, D)."""
    covs = alpha**2 * prior.covs + sigma**2 * torch.eye(x.shape[1], dtype=x.dtype)
    each = torch.distributions.MultivariateNormal(alpha * prior.means, covs)
    return torch.logsumexp(prior.weights.log() + each.log_prob(x[:, None]), dim=1)


@pytest.mark.parametrize("t", [0, 150, 600, 999])
@pytest.mark.parametrize("name", example_priors())
def test_eps_is_the_score(name, t):
    """eps = -sigma grad log p(x_t)."""
    prior = example_priors()[name]
    alpha, sigma = prior.schedule.alpha(t), prior.schedule.sigma(t)
    g = torch.Generator().manual_seed(1)
    x0 = prior.sample(5, g)
    x_t = (alpha * x0 + sigma * torch.randn(x0.shape, generator=g, dtype=x0.dtype)).requires_grad_()
    (score,) = torch.autograd.grad(log_density(prior, x_t.flatten(1), alpha, sigma).sum(), x_t)
    eps = prior.predict(x_t.detach(), t).eps
    assert torch.allclose(eps, -sigma * score, rtol=1e-6, atol=1e-9)


class Sums:
    """y = the sum of the three values: (B, 1, 1, 1)."""

    def A(self, x):
        return x.sum(dim=1, keepdim=True)


def test_posterior_is_bayes_rule(small):
    """log p(x | y) = log p(y | x) + log p(x) + const at any x, and its moments are those of importance sampling."""
    y = torch.full((1, 1, 1, 1), 1.2, dtype=torch.float64)
    posterior = small.posterior(Sums(), y, SIGMA)
    x = small.sample(200_000, torch.Generator().manual_seed(2)).flatten(1)
    log_likelihood = -0.5 * ((1.2 - x.sum(dim=1)) / SIGMA) ** 2
    constant = log_likelihood[:50] + log_density(small, x[:50]) - log_density(posterior, x[:50])
    # The constant is log p(y) but for the normalisation of the likelihood.
    assert constant.std() < 1e-6
    w = torch.softmax(log_likelihood, dim=0)
    mean, cov = posterior.moments()
    effective = 1 / float((w**2).sum())
    assert effective > 5000
    error = ((w @ x - mean).abs() / (cov.diagonal() / effective).sqrt()).max()
    assert error < 4
    centred = x - mean
    assert (centred.T @ (w[:, None] * centred) - cov).norm() < 0.05 * cov.norm()
    # ... which neither the prior's own moments nor a single Gaussian's weights would pass.
    assert (small.moments()[0] - mean).norm() > 20 * float((cov.diagonal() / effective).sqrt().max())
    assert (posterior.weights - small.weights).abs().max() > 0.05


def test_samples_have_the_moments(small):
    x = small.sample(20_000, torch.Generator().manual_seed(3)).flatten(1)
    mean, cov = small.moments()
    assert ((x.mean(0) - mean).abs() / (cov.diagonal() / len(x)).sqrt()).max() < 4
    assert (torch.cov(x.T) - cov).norm() < 0.03 * cov.norm()


def test_sliced_wasserstein():
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert sliced_wasserstein(x, x.flip(0)) == 0
    # A shift by v is |u v| in direction u, on average |v| E|cos|, which in four dimensions is 4 / (3 pi).
    shift = torch.tensor([1.0, 2.0, 0.0, -1.0], dtype=torch.float64)
    expected = float(shift.norm()) * 4 / (3 * math.pi)
    assert sliced_wasserstein(x, x + shift) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("name", example_priors())
def test_exact_samples_are_at_the_floor_and_the_priors_own_are_at_one(name):
    prior, operator = example_priors()[name], example_operators(SIGMA)["SR x2"]
    y, posterior = draw_measurement(prior, operator, 0)
    g = torch.Generator().manual_seed(5)
    exact = compare_with_posterior(prior, y, posterior, lambda y, noise: posterior.sample(len(y), g))
    assert exact["distance"] < 1.2 * exact["floor"] < 0.3
    assert exact["mean"] < 0.15 and exact["variance"] == pytest.approx(1, abs=0.1) and exact["nfe"] == 0
    plain = compare_with_posterior(prior, y, posterior, lambda y, noise: prior.sample(len(y), g))
    assert plain["distance"] == pytest.approx(1, abs=0.1) and plain["mean"] == pytest.approx(1, abs=0.15)
    assert plain["variance"] > 1.2
