"""The tables of samplers on known posteriors."""

import math

import pytest

from benchmarks import known
from benchmarks.known import format_table, measure_sampler
from benchmarks.posteriors import WHITE, compare_with_posterior, draw_measurement, example_priors
from operators import GaussianNoise, RestoreError, SuperResolution
from restore import samplers

SIGMA = 0.1


def test_pigdm_is_exact_on_a_white_gaussian_in_the_limit():
    """gradient="score" with the prior's own variance: the more evaluations, the nearer to the floor."""
    prior = example_priors()["white Gaussian"]
    options = {"gradient": "score", "prior_variance": WHITE}
    few, many = (measure_sampler(prior, "pigdm", {**options, "steps": f"karras:{n}"}, SIGMA, 300, 0) for n in (20, 400))
    assert many["distance"] < 1.3 * many["floor"] < few["distance"]
    assert abs(many["variance"] - 1) < 0.08 < abs(few["variance"] - 1) and many["nfe"] == 400


def test_table_tunes_by_grid_and_says_so():
    budgets = {n: {"steps": n} for n in (20, known.TUNED)}
    entry = known.Entry(known.dps, budgets, grid={"pull": (0.1, 20.0)})
    ddrm = known.Entry("ddrm", {20: {"steps": "ddim20"}})
    lines = list(format_table(example_priors()["white Gaussian"], {"DPS": entry, "DDRM": ddrm}, n=100))
    assert lines[2].startswith("DPS | 20 | ") and lines[2].endswith("pull 20") and lines[3].endswith("pull 20")
    assert lines[4].startswith("DDRM | 20 | ") and len(lines) == 5


def test_every_entry_spends_about_its_budget():
    prior = example_priors()["white Gaussian"]
    operator = SuperResolution(2, method="average", noise=GaussianNoise(SIGMA))
    y, posterior = draw_measurement(prior, operator, 0)
    for name, entry in known.SETTINGS.items():
        options, sampler = entry.list_candidates(20)[0], samplers.find_sampler(entry.sampler)
        got = compare_with_posterior(
            prior, y, posterior, lambda y, noise, o=options, s=sampler: s(prior, operator, y, noise=noise, **o), 4
        )
        assert 18 <= got["nfe"] <= 30, name
        assert all(math.isfinite(v) for v in got.values()), name


def test_a_page_without_tables_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(known, "SETTINGS", {})
    page = tmp_path / "page.md"
    page.write_text("text\n\n## Tables\nold\n")
    known.main(str(page))
    assert page.read_text().startswith("text\n\n## Tables\n\n### white Gaussian") and "old" not in page.read_text()
    page.write_text("text\n")
    with pytest.raises(RestoreError, match="## Tables"):
        known.main(str(page))
