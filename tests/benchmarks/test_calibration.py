"""The measure of calibration: exact samples are at the nominal level, wrong ones are not, and a run resumes."""

import json

import pytest
import torch

from benchmarks import calibration
from benchmarks.calibration import Measured, run_sampler
from benchmarks.known import Entry
from benchmarks.posteriors import MixturePrior, draw_noise
from benchmarks.ranks import Problem, draw_exact, draw_problems, measure, repeat_mean
from operators import RestoreError
from restore.calibration import judge


@pytest.fixture(scope="module")
def problems():
    return draw_problems(8, 0)


def scaled(factor, shift=0.0):
    """Exact samples, their distance from the posterior's mean scaled."""

    def sample(problem, y, noise):
        mean = repeat_mean(problem, y, noise)
        return mean + factor * (draw_exact(problem, y, noise) - mean) + shift

    return sample


def test_exact_samples_have_the_nominal_coverage(problems):
    row, _ = measure(draw_exact, problems)
    for level in (50, 80, 95):
        assert row["coverage"][str(level)] == pytest.approx(level / 100, abs=0.05)
        assert row["intervals"][str(level)] == pytest.approx(level / 100, abs=0.03)
    assert row["spread_error"] == pytest.approx(1, abs=0.05) and row["spread"] == pytest.approx(1, abs=0.05)
    assert all(0.8 < share < 1.2 for share in row["histogram"]) and sum(row["histogram"]) == pytest.approx(40, abs=0.1)
    assert row["uniform"] > 0.01 and judge(row) == "samples" and row["evaluations"] == 0 and row["truths"] == 32


def test_the_mean_as_sample_covers_nothing(problems):
    row, _ = measure(repeat_mean, problems)
    assert row["spread_error"] == row["spread"] == 0 and row["uniform"] < 1e-6
    assert row["intervals"] == {"50": 0, "80": 0, "95": 0} and judge(row) == "estimates"
    assert row["histogram"][0] + row["histogram"][-1] == pytest.approx(40)  # below or above all
    gaussian, _ = measure(repeat_mean, problems[:2])  # of a mixture the mean lies between the modes
    assert gaussian["coverage"] == {"50": 0, "80": 0, "95": 0}


@pytest.mark.parametrize(("factor", "verdict"), [(0.4, "estimates"), (0.8, "too narrow"), (1.25, "too wide")])
def test_the_spread_is_measured(problems, factor, verdict):
    row, score = measure(scaled(factor), problems[:2])
    assert row["spread_error"] == pytest.approx(factor, rel=0.06) and row["spread"] == pytest.approx(factor, rel=0.06)
    assert judge(row) == verdict
    # Values of a normal distribution within the central 80 % of one that is scaled.
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = 2 * float(normal.cdf(factor * normal.icdf(torch.tensor(0.9)))) - 1
    assert row["intervals"]["80"] == pytest.approx(expected, abs=0.03)
    assert (row["coverage"]["80"] < 0.6) == (factor < 1) and (row["coverage"]["80"] > 0.9) == (factor > 1)
    assert score > measure(draw_exact, problems[:2])[1]  # a proper score is best for the truth


def test_a_bias_shows_in_the_error_not_in_the_spread(problems):
    row, _ = measure(scaled(1.0, 0.15), problems)
    assert row["spread"] == pytest.approx(1, abs=0.05) and row["spread_error"] < 0.85
    assert row["coverage"]["50"] > 0.9 and judge(row) == "too narrow"  # samples are improbable
    assert sum(row["histogram"][:10]) > 2 * sum(row["histogram"][30:])  # truths are low among the samples


def test_density_up_to_a_constant():
    g = torch.Generator().manual_seed(0)
    root = torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
    covs = root @ root.mT + 0.1 * torch.eye(3, dtype=torch.float64)
    means = torch.randn(2, 3, generator=g, dtype=torch.float64)
    prior = MixturePrior(torch.tensor([0.3, 0.7], dtype=torch.float64), means, covs, (3, 1, 1))
    x = torch.randn(6, 3, 1, 1, generator=g, dtype=torch.float64)
    each = torch.distributions.MultivariateNormal(means, covs).log_prob(x.flatten(1)[:, None])
    gap = prior.log_density(x) - torch.logsumexp(prior.weights.log() + each, dim=1)
    assert gap.std() < 1e-9


def test_the_posteriors_density_is_bayes_rule(problems):
    problem = problems[-1]
    few = Problem(problem.prior, problem.operator, problem.x[:3], problem.y[:3], problem.posteriors[:3], 0)
    x = draw_exact(few, few.y.repeat_interleave(4, 0), draw_noise(0)).view(3, 4, *few.x.shape[1:])
    for row, posterior, one in zip(few.log_density(x), few.posteriors, x, strict=True):
        assert float((row - posterior.log_density(one)).std()) < 1e-6


def test_a_run_resumes_and_measures_again_what_changed(tmp_path, monkeypatch):
    calls, real = [], calibration._measure_row
    monkeypatch.setattr(calibration, "_measure_row", lambda *a: calls.append(a[0]["name"]) or real(*a))
    row = calibration.Row("ddrm", Entry("ddrm", {20: {"steps": "ddim3"}}), {})
    monkeypatch.setattr(calibration, "ROWS", {"DDRM": row})
    run = lambda: calibration.calibrate(["DDRM"], [20], 0.02, Measured(tmp_path / "rows.json"))  # noqa: E731
    first = run()
    assert calls == ["exact samples", "posterior mean", "DDRM"] and run() == first and len(calls) == 3
    assert first[2]["evaluations"] == 3 and first[2]["truths"] == 8
    other = calibration.Row("ddrm", Entry("ddrm", {20: {"steps": "ddim4"}}), {})
    monkeypatch.setattr(calibration, "ROWS", {"DDRM": other})
    assert run()[2]["evaluations"] == 4 and len(calls) == 4
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 4


def test_what_diverges_has_a_row_and_no_numbers():
    problems = draw_problems(2, 0)[:1]
    options = {"steps": 3, "ode_steps": 1, "mcmc_steps": 300, "lr": 1.0, "tau": None}
    row = calibration._measure_row({"name": "x"}, run_sampler("daps", options), problems)
    assert "not finite" in row["error"] and "coverage" not in row
    assert calibration.format_row(row).endswith("diverges")


def test_unknown_rows_are_refused():
    with pytest.raises(RestoreError, match="rows must be samplers among daps"):
        calibration.run(quick=True, rows="nonsense")
