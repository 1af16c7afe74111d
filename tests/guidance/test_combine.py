"""Combinations against their papers' formulas, and scales that depend on t."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from operators import RestoreError
from restore.backbones.adm import ADM
from restore.guidance import APG, CFG, PAG, Guidance, Rescale, estimator
from restore.guidance.combine import weighted_sum

GOLDEN = Path(__file__).parent.parent / "golden"


def relative(a, b):
    return float(torch.linalg.norm(a.detach() - b) / torch.linalg.norm(b))


@pytest.fixture(scope="module")
def model():
    return ADM.load(GOLDEN / "nets/adm_b.safetensors", head_channels=16, null_class=0)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "pag_eps.safetensors")


@pytest.fixture
def eps():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(4)]


def test_sum(eps):
    strong, one, two, _ = eps
    expected = strong + 2.0 * (strong - one) + -0.5 * (strong - two)
    assert torch.equal(weighted_sum(strong, [(2.0, one), (-0.5, two)]), expected)


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_gives_each_image_the_strong_predictions_deviation(eps, phi):
    strong, one, two, _ = eps
    strong = strong * torch.tensor([1.0, 5.0, 0.2]).view(3, 1, 1, 1)
    got = Rescale(phi)(strong, [(2.0, one), (1.0, two)])
    for b in range(3):
        guided = strong[b] + 2.0 * (strong[b] - one[b]) + (strong[b] - two[b])
        expected = phi * guided * strong[b].std() / guided.std() + (1 - phi) * guided
        assert relative(got[b], expected) < 1e-12
    if phi == 1:
        assert torch.allclose(got.std((1, 2, 3)), strong.std((1, 2, 3)))


def test_apg_is_its_algorithm_on_clean_estimates(model, eps):
    """Two steps, image by image, from the paper's definitions in x_0; the momentum belongs to one run."""
    strong, weak, strong_2, weak_2 = eps
    x_t = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    apg, s = APG(eta=0.3, momentum=-0.5, threshold=2.0), 3.0
    run = apg.bind(model)
    got = [run(strong, [(s, weak)], x_t, 600), run(strong_2, [(s, weak_2)], x_t, 500)]
    for b in range(3):
        mean, expected = 0.0, []
        for t, e, w in ((600, strong[b], weak[b]), (500, strong_2[b], weak_2[b])):
            a = float(model.schedule.alphas_cumprod[t])
            clean, clean_weak = ((x_t[b] - (1 - a) ** 0.5 * value) / a**0.5 for value in (e, w))
            mean = (clean - clean_weak) - 0.5 * mean
            d = mean * min(1.0, 2.0 / float(mean.norm()))
            parallel = (d * clean).sum() / (clean * clean).sum() * clean
            clean = clean + s * (d - parallel + 0.3 * parallel)
            expected.append((x_t[b] - a**0.5 * clean) / (1 - a) ** 0.5)
        assert all(relative(one[b], other) < 1e-10 for one, other in zip(got, expected, strict=True))
    assert torch.equal(apg.bind(model)(strong, [(s, weak)], x_t, 600), got[0])
    # Images do not influence each other, in the memory neither.
    alone = apg.bind(model)
    for k, (e, w, t) in enumerate(((strong, weak, 600), (strong_2, weak_2, 500))):
        assert relative(alone(e[1:2], [(s, w[1:2])], x_t[1:2], t), got[k][1:2]) < 1e-12


def test_apg_with_nothing_taken_away_is_the_sum(model, eps):
    strong, one, two, x_t = eps
    weak = [(2.0, one), (-0.5, two)]
    got = APG(eta=1.0, momentum=0.0).bind(model)(strong, weak, x_t, 300)
    assert relative(got, weighted_sum(strong, weak)) < 1e-12


@pytest.mark.parametrize("combine", ["rescale", APG()])
def test_in_the_estimate(model, golden, combine):
    x, y, t = golden["x_t"], golden["y"], 321
    guidance = Guidance((PAG(2.0, "i7"), CFG(1.0)), combine)
    with torch.no_grad(), estimator(model, guidance) as estimate:
        strong, eps = estimate(x, t, y)
        passes = zip(estimate.terms, estimate.passes, strict=True)
        weak = [(term.scale, weak_pass.eps(x, t, y, strong)) for term, weak_pass in passes]
    apply = guidance.combine.bind(model) if combine != "rescale" else lambda eps, weak, x, t: Rescale()(eps, weak)
    assert relative(eps, apply(strong.eps, weak, x, t)) < 1e-6
    assert relative(eps, weighted_sum(strong.eps, weak)) > 1e-3
    with estimator(model, Guidance((PAG(0.0, "i7"),), combine)) as estimate:
        strong, eps = estimate(x, t, y)
    assert torch.equal(eps, strong.eps)


def test_schedules_of_the_scale(model, golden):
    """Factors of t / T whose mean over the times is 1, and functions of t."""
    x, y = golden["x_t"], golden["y"]
    for schedule, factor in (
        ("constant", lambda u: 1.0),
        ("linear", lambda u: 2 - 2 * u),
        ("cosine", lambda u: 1 + math.cos(math.pi * u)),
        (lambda t: t / 100, lambda u: u * 9.99),
    ):
        term = PAG(1.5, "m1", schedule=schedule, interval=(900, 0))
        for t in (0, 250, 300.5, 900, 901, 999):
            expected = 0.0 if t > 900 else 1.5 * factor(t / 999)
            assert term.scale_at(t, model) == pytest.approx(expected, rel=1e-12, abs=1e-12)
        if schedule in ("linear", "cosine"):
            free = PAG(1.0, "m1", schedule=schedule)
            assert sum(free.scale_at(t, model) for t in range(1000)) / 1000 == pytest.approx(1, abs=1e-9)
    with torch.no_grad(), estimator(model, PAG(1.5, "m1", schedule="cosine")) as estimate:
        strong, eps = estimate(x, 250, y)
        weak = estimate.passes[0].eps(x, 250, y, strong)
        before = estimate.evaluations
        assert torch.equal(estimate(x, 999, y)[1], model.predict(x, 999, y).eps)
        assert estimate.evaluations == before + 1  # where the factor is zero no weak pass is run
    assert relative(eps, strong.eps + 1.5 * (1 + math.cos(math.pi * 250 / 999)) * (strong.eps - weak)) < 1e-6


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: Rescale(-0.1), "phi"),
        (lambda: APG(momentum=1.0), "momentum"),
        (lambda: APG(threshold=0.0), "threshold"),
        (lambda: PAG(1.0, "m1", schedule="liner"), "did you mean 'linear'"),
    ],
)
def test_mistakes(make, match):
    with pytest.raises(RestoreError, match=match):
        make()
