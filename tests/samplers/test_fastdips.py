"""FAST-DIPS: its inner problem against closed forms, and the whole sampler where every step is known."""

from __future__ import annotations

import pytest
import torch
from weak_passes import latent_prior

import operators
from benchmarks.posteriors import MixturePrior
from operators import GaussianNoise, PoissonNoise, RestoreError
from restore.samplers.fastdips import descend, fastdips, fit
from restore.samplers.steps import annealing_levels, rho_grid

SHAPE, D = (3, 2, 2), 12


def draw(k, shape, kind="latent"):
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(k), dtype=torch.float64)


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def matrix():
    return draw(3, (7, D)) / D**0.5


@pytest.fixture(scope="module")
def white():
    return MixturePrior.gaussian(torch.zeros(D, dtype=torch.float64), 0.25 * torch.eye(D, dtype=torch.float64), SHAPE)


@pytest.mark.parametrize("line_search", ["exact", "difference"])
def test_a_step_of_descent_is_the_best_along_the_gradient(matrix, line_search):
    """For a linear A: F along x − a g is a parabola, whose least value is at the a that is taken; per image."""
    x, x0, b, gamma, rho = draw(0, (2, D)), draw(1, (2, D)), draw(2, (2, 7)), 0.3, 2.0
    b[1] *= 30
    got = descend(lambda z: z @ matrix.T, x, x0, b, gamma, rho, line_search)
    for i in range(2):
        g = (x[i] - x0[i]) / gamma + rho * (matrix @ x[i] - b[i]) @ matrix
        hessian = torch.eye(D, dtype=torch.float64) / gamma + rho * matrix.T @ matrix
        assert relative(got[i], x[i] - (g @ g) / (g @ hessian @ g) * g) < 1e-8
        alone = descend(lambda z: z @ matrix.T, x[i : i + 1], x0[i : i + 1], b[i : i + 1], gamma, rho, line_search)
        assert relative(alone[0], got[i]) < 1e-8


def test_a_step_is_halved_while_the_objective_grows():
    """A(x) = x⁴ around x = 0.1, far from b: linearised, the best step is too long by far."""
    x = torch.full((1, 1), 0.1, dtype=torch.float64)

    def objective(z):
        return float(((z - x) ** 2 / 2e4 + 0.5 * (z**4 - 1) ** 2).sum())

    got = descend(lambda z: z**4, x, x, torch.ones(1, 1, dtype=torch.float64), 1e4, 1.0, "exact")
    assert objective(got) <= objective(x) and not torch.equal(got, x)
    g = float(4 * 0.1**3 * (0.1**4 - 1))
    slope, curvature = g * g, g * g / 1e4 + (4 * 0.1**3 * g) ** 2
    step = min(slope / curvature, 1.0)
    assert float(got) == pytest.approx(0.1 - step * g)
    longer = descend(lambda z: torch.sin(40 * z), x, x, torch.zeros(1, 1, dtype=torch.float64), 1e4, 1.0, "exact")
    before, after = (float((torch.sin(40 * z) ** 2).sum()) for z in (x, longer))
    assert after <= before


def test_admm_projects_onto_the_ball_around_y(matrix):
    """A = I: the nearest point of the ball. A mask: known pixels. A matrix: the constraint holds, with the multiplier's
    optimality condition x − x0 in the row space, along A^T (A x − y)."""
    x0, y = draw(0, (2, D)), draw(1, (2, D))
    radius = 0.5
    got = fit(lambda z: z, x0, y, 0.04, 100.0, radius, 60, 1, "exact")
    expected = y + radius * (x0 - y) / (x0 - y).norm(dim=1, keepdim=True)
    assert relative(got, expected) < 1e-4
    inside = fit(lambda z: z, x0, x0 + 1e-3, 0.04, 100.0, radius, 5, 2, "exact")
    assert torch.equal(inside, x0)
    y = draw(2, (2, 7))
    got = fit(lambda z: z @ matrix.T, x0, y, 0.04, 100.0, radius, 400, 20, "exact")
    r = got @ matrix.T - y
    assert torch.allclose(r.norm(dim=1), torch.full((2,), radius, dtype=torch.float64), rtol=1e-2)
    cosine = torch.nn.functional.cosine_similarity(x0 - got, r @ matrix)
    assert (cosine > 0.999).all()
    assert torch.equal(fit(lambda z: z, x0, x0 + 1, 0.04, 100.0, 0.0, 0, 1, "exact"), x0)


def test_levels():
    schedule = MixturePrior.gaussian(torch.zeros(D), torch.eye(D), SHAPE).schedule
    assert annealing_levels(schedule, 5, 10.0, 0.1, to_zero=False) == rho_grid(10.0, 0.1, 4)
    assert annealing_levels(schedule, 1, 10.0, 0.1, to_zero=False) == pytest.approx([10.0])
    assert annealing_levels(schedule, [900, 100], 10.0, 0.1, to_zero=False) == [schedule.ratio(t) for t in (900, 100)]


def test_the_whole_sampler_on_a_white_prior(white):
    """x_0 ~ N(0, s² I), A = I, epsilon = 0 and many steps: every x_0 is y, the result D(y + sigma n, sigma)."""
    y, seen = draw(9, (2, *SHAPE)), []
    own = {"epsilon": 0.0, "admm_steps": 40, "sigma_max": 5.0, "sigma_min": 0.2}
    got = fastdips(white, operators.Denoising(), y, noise=draw, steps=4, callback=seen.append, **own)
    shrink = 0.25 / (0.25 + 0.2**2)
    assert relative(got, shrink * (y + 0.2 * draw(2, (2, *SHAPE)))) < 1e-3
    assert len(seen) == 4 and seen[0]["used"] == {"rho": 2e4, "epsilon": 0.0, "sigma_max": pytest.approx(5.0)}
    prior_draw = fastdips(white, operators.Denoising(), y, noise=draw, steps=4, **own | {"admm_steps": 0})
    unrelated = fastdips(white, operators.Denoising(), y + 1, noise=draw, steps=4, **own | {"admm_steps": 0})
    assert torch.equal(prior_draw, unrelated) and relative(got, prior_draw) > 0.1


def test_rho_and_epsilon_from_the_noise(white):
    """rho is the published 200 at the published noise; fixed, results at three times that noise were noise."""
    seen = []

    def run(noise, **own):
        y = draw(9, (1, *SHAPE))
        fastdips(white, operators.Denoising(noise=noise), y, noise=draw, callback=seen.append, **own)
        return seen.pop()["used"]

    for noise, rho in ((GaussianNoise(0.05), 200.0), (GaussianNoise(0.15), 0.5 / 0.15**2), (PoissonNoise(1.0), 200.0)):
        assert run(noise, steps=1)["rho"] == pytest.approx(rho)
    assert run(GaussianNoise(0.3), steps=1, epsilon=None)["epsilon"] == pytest.approx(0.3 * D**0.5)
    with pytest.raises(RestoreError, match="sigma_min must be at most sigma_max"):
        run(None, steps=2, sigma_min=5.0, sigma_max=1.0)


@pytest.mark.parametrize("operator", [operators.Clipping(2.0), operators.PhaseRetrieval(2.0)])
@pytest.mark.parametrize("line_search", ["exact", "difference"])
def test_nonlinear_operators(operator, line_search):
    """From an image near the truth the measurement is nearly met; of clipped values only those that are not."""
    truth = 0.6 * draw(0, (2, 3, 8, 8)).clamp(-1, 1)
    y, near = operator.A(truth), truth + 0.05 * draw(1, (2, 3, 8, 8))
    got = fit(operator.A, near, y, 1.0, 200.0, 1e-3, 20, 5, line_search)
    assert float((operator.A(got) - y).norm()) < 0.2 * float((operator.A(near) - y).norm())
    assert relative(got, truth) < relative(near, truth)


def test_latents_seek_the_image_first_and_the_latent_then():
    prior = latent_prior()
    operator = operators.SuperResolution(4)
    y = operator.A(0.3 * draw(0, (1, 3, 32, 32)))
    prior.shape = (4, 8, 8)
    calls = []
    encode = prior.encode
    prior.encode = lambda image, noise=None: (calls.append(1), encode(image))[1]
    for above, count in ((0.0, 4), (1e9, 0)):
        calls.clear()
        options = {"noise": draw, "steps": 3, "sigma_max": 5.0, "admm_steps": 1}
        got = fastdips(prior, operator, y, pixels_above=above, **options)
        assert got.shape == (1, 3, 32, 32) and torch.isfinite(got).all() and len(calls) == count
