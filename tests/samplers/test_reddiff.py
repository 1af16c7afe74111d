"""RED-diff against trajectories of the authors' code (tests/golden/samplers_reddiff)."""

import pytest
import torch
from golden_langevin import arrange, cases, noise_bank
from golden_samplers import network as adm_prior
from golden_samplers import relative

import operators
from benchmarks.posteriors import example_operators, example_priors
from operators import Clipping, GaussianNoise, PoissonNoise, RestoreError
from restore.guidance import PAG
from restore.samplers.noise import ImageNoise
from restore.samplers.reddiff import reddiff

CASES = [case for _, case in cases("reddiff")]


@pytest.fixture(scope="module")
def prior():
    return adm_prior(double=False)


@pytest.mark.parametrize("case", CASES)
def test_trajectory_is_the_official_one(case):
    tensors, own, operator = arrange("reddiff", case)
    bank, seen = noise_bank(), []
    image = reddiff(
        adm_prior(),
        operator,
        tensors["y"],
        noise=lambda k, shape, kind: bank[k].reshape(shape),
        steps=f"ddim{own['num_steps']}",
        lam=own["lambda"],
        lr=own["lr"],
        weighting=own["weighting"],
        v=own["obs_weight"],
        callback=seen.append,
    )
    # The first step moves every pixel by lr, whatever the gradient's size, so only its direction could be right.
    for k in (1, 2, 5, 6, 10, 11):
        assert relative(seen[k - 1]["x_t"], tensors[f"x_after_{k}"]) < 1e-4, k
    assert relative(seen[4]["x0_hat"], tensors["x0_hat_5"]) < 1e-4
    assert relative(image, tensors["x_final"]) < 1e-4
    assert torch.equal(image, seen[-1]["x_t"])


def batch_noise(seed=1):
    g = torch.Generator().manual_seed(seed)
    return lambda k, shape, kind: torch.randn(tuple(shape), generator=g, dtype=torch.float64)


def test_stationary_point_is_that_of_the_loss():
    """At one time, as good as repeated, the loss is a quadratic on a Gaussian prior, for E[eps − n] is linear in mu."""
    prior, operator, t, lam = example_priors()["smooth Gaussian"], example_operators(0.1)["SR x2"], 300, 2.0
    y = operator.A(prior.sample(1, torch.Generator().manual_seed(3)))
    many = y.expand(400, *y.shape[1:]).contiguous()
    times = torch.linspace(t + 0.2, t - 0.2, 400).tolist()
    options = {"steps": times, "lam": lam, "lr": 0.02, "weighting": "constant", "start": "zero"}
    mu = reddiff(prior, operator, many, noise=batch_noise(), **options).flatten(1).mean(0)
    D, a, s = mu.numel(), prior.schedule.alpha(t), prior.schedule.sigma(t)
    matrix = operator.A(torch.eye(D, dtype=torch.float64).view(D, *prior.shape)).flatten(1).T
    data = matrix.T @ matrix / len(matrix)
    pull = lam / D * s * a * torch.linalg.inv(a**2 * prior.covs[0] + s**2 * torch.eye(D, dtype=torch.float64))
    right = matrix.T @ y.flatten() / len(matrix) + pull @ prior.means[0]
    expected = torch.linalg.solve(data + pull, right)
    assert relative(mu, expected) < 0.05
    assert relative(prior.means[0], expected) > 0.5 and relative(operator.A_dagger(y).flatten(), expected) > 0.2


def test_clipping_is_undone_with_the_prior():
    """A nonlinear operator, for which RED-diff needs only A: saturated pixels come from the prior's correlations."""
    prior = example_priors()["smooth Gaussian"]
    truth = prior.sample(40, torch.Generator().manual_seed(5))
    operator, seen = Clipping(4.0, noise=GaussianNoise(0.05)), []
    y = operator.A(truth) + 0.05 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(6)).double()
    saturated = operator.A(truth).abs() == 1
    x = reddiff(prior, operator, y, noise=batch_noise(), steps=300, lr=0.05, lam=1.0, callback=seen.append)
    assert seen[0]["used"] == {"start": "zero"}
    for other in (y / 4, prior.moments()[0].view(1, *prior.shape)):
        assert (x - truth)[saturated].norm() < 0.6 * (other - truth)[saturated].norm()
    assert seen[-1]["residual"].mean() < 0.2 * seen[0]["residual"].mean()


def test_poisson_noise_weighs_the_entries_of_y(prior):
    y, noise = torch.full((1, 3, 32, 32), -0.9), ImageNoise([(0, "x", 0)])
    y[..., 16:] = 0.9
    operator = operators.Denoising(noise=PoissonNoise(0.1))
    first = []
    for norm in (None, "poisson", "l2"):
        options = {"steps": 1, "lam": 0.0, "data_norm": norm, "callback": lambda step: first.append(step)}
        reddiff(prior, operator, y, noise=noise, start="zero", **options)
    assert torch.equal(first[0]["residual"], first[1]["residual"])
    # 1 / 2y on [0, 1]: 10 where y is 0.05 and 0.526 where it is 0.95
    assert float(first[1]["residual"] ** 2 / first[2]["residual"] ** 2) == pytest.approx((10 + 1 / 1.9) / 2, rel=1e-5)


def test_scale_zero_is_plain_reddiff_and_guidance_acts(prior):
    operator, y = operators.SuperResolution(4), torch.zeros(1, 3, 8, 8)
    common = {"noise": ImageNoise([(0, "x", 0)]), "steps": 3}
    plain = reddiff(prior, operator, y, **common)
    assert torch.equal(plain, reddiff(prior, operator, y, guidance=PAG(0.0, layers="m1"), **common))
    assert relative(reddiff(prior, operator, y, guidance=PAG(1.0, layers="m1"), **common), plain) > 1e-3


def test_batch_equals_single_images(prior):
    operator = operators.SuperResolution(4)
    y = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.3
    keys = [(0, f"image{i}", 0) for i in range(3)]
    together = reddiff(prior, operator, y, noise=ImageNoise(keys), steps=4, lr=0.05)
    for i in range(3):
        single = reddiff(prior, operator, y[i : i + 1], noise=ImageNoise(keys[i : i + 1]), steps=4, lr=0.05)
        assert relative(single, together[i : i + 1]) < 1e-5
    assert relative(together[:1], together[1:2]) > 0.1


def test_bad_options_and_divergence(prior):
    operator, y = operators.SuperResolution(4), torch.zeros(1, 3, 8, 8)
    common = {"noise": ImageNoise([(0, "x", 0)]), "steps": 2}
    for bad in ({"start": "daggers"}, {"weighting": "lineer"}, {"data_norm": "l3"}):
        with pytest.raises(RestoreError, match=next(iter(bad.values()))):
            reddiff(prior, operator, y, **common, **bad)
    with pytest.raises(RestoreError, match="not finite after step 2.*lr=1e.37"):
        reddiff(prior, operator, y, lr=1e37, **common)
    with pytest.raises(RestoreError, match="moderate size, got lr=1e.200"):  # no number of float32
        reddiff(prior, operator, y, lr=1e200, **common)


def test_adam_magnifies_rounding_where_a_gradient_nearly_vanishes(prior):
    """Why results of other batch sizes are not equal to rounding: a first step is lr g / (|g| + 1e-8), whatever |g|."""
    operator, keys = operators.SuperResolution(4, noise=operators.GaussianNoise(0.05)), [(0, "a", 0)]
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y, noise = operator.A(x), ImageNoise(keys)
    plain, moved = [], []
    for states, nudge in ((plain, 0.0), (moved, 1e-6)):
        reddiff(prior, operator, y + nudge, noise=noise, steps=1, start_from="zero", callback=states.append)
    change = (plain[0]["x_t"] - moved[0]["x_t"]).abs()
    assert change.median() < 1e-5 and 1e-5 < change.max() <= 2 * 0.1
