"""CFG-Zero*, TCFG and FDG against diffusers' guiders, s = their scale − 1, and where they are the plain sum."""

from __future__ import annotations

import pytest
import torch
from diffusers import guiders
from weak_passes import relative

from operators import RestoreError
from restore.backbones.adm import ADM
from restore.backbones.schedule import Schedule
from restore.guidance import FDG, PAG, Guidance, ZeroStar
from restore.guidance.base import estimator
from restore.guidance.combine import tcfg, weighted_sum


@pytest.fixture(scope="module")
def plain_adm(tiny_adm):
    return ADM.load(tiny_adm)


class Prior:
    def __init__(self, kind):
        self.schedule = Schedule.flow() if kind == "flow" else Schedule.vp(torch.linspace(0.999, 0.01, 1000).double())


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(*shape):
    strong = draw(0, *shape)
    return strong, 0.6 * strong + 0.5 * draw(1, *shape)


@pytest.mark.parametrize("kind", ["flow", "vp"])
def test_zero_star_is_diffusers_on_velocities(kind):
    """velocity = eps − x_0; on a flow-matching prior that is what the network predicts."""
    prior, (strong, weak), x, t, g = Prior(kind), pair(2, 3, 6, 5), draw(2, 2, 3, 6, 5), 400.0, 4.0
    alpha, sigma = prior.schedule.alpha(t), prior.schedule.sigma(t)
    v, v_weak = (e - (x - sigma * e) / alpha for e in (strong, weak))
    guider = guiders.ClassifierFreeZeroStarGuidance(g, zero_init_steps=0)
    guider.set_state(step=1, num_inference_steps=10, timestep=t)
    eps = ZeroStar(zero_steps=0).bind(prior)(strong, [(g - 1, weak)], x, t)
    assert relative(eps - (x - sigma * eps) / alpha, guider.forward(v, v_weak).pred) < 1e-6
    assert relative(eps, weighted_sum(strong, [(g - 1, weak)])) > 1e-3


def test_zero_star_begins_without_velocity():
    """In the first steps of a run eps = x_0, so that a step of flow matching moves nothing."""
    prior, (strong, weak), x = Prior("flow"), pair(2, 3, 6, 5), draw(2, 2, 3, 6, 5)
    run, again = ZeroStar(zero_steps=2).bind(prior), ZeroStar(zero_steps=0).bind(prior)
    for t, zero in ((900.0, True), (900.0, True), (800.0, True), (700.0, False), (900.0, False)):
        eps = run(strong, [(3.0, weak)], x, t)
        alpha, sigma = prior.schedule.alpha(t), prior.schedule.sigma(t)
        x0 = (x - sigma * eps) / alpha
        assert (relative(eps, x0) < 1e-10) == zero
        if zero:
            assert relative((1 - 0.5) * x0 + 0.5 * eps, x) < 1e-10
        else:
            assert torch.equal(eps, again(strong, [(3.0, weak)], x, t))


def test_zero_star_counts_the_steps_of_the_run(plain_adm):
    """Also those that no term guides, as diffusers' guider does; later ones without guidance are the plain ones."""
    x, alpha_of = draw(3, 1, 3, 16, 16).float(), plain_adm.schedule.levels
    with torch.no_grad(), estimator(plain_adm, Guidance((PAG(2.0, "m1", interval=(500, 400)),), "zero_star")) as run:
        found = {t: run(x, t) for t in (900, 700, 500, 300)}
    for t, (strong, eps) in found.items():
        alpha, sigma = alpha_of(t, x)
        assert (relative(eps, (x - sigma * eps) / alpha) < 1e-4) == (t == 900)
        assert torch.equal(strong.eps, eps) == (t in (700, 300))


def test_tcfg_is_diffusers():
    strong, weak = pair(2, 3, 6, 5)
    guider = guiders.TangentialClassifierFreeGuidance(7.5)
    guider.set_state(step=1, num_inference_steps=10, timestep=1)
    got = tcfg(strong, [(6.5, weak)])
    assert relative(got, guider.forward(strong, weak).pred) < 1e-5
    assert relative(got, weighted_sum(strong, [(6.5, weak)])) > 1e-2
    parallel = tcfg(strong, [(6.5, 0.5 * strong)])  # nothing is outside of the dominant direction
    assert relative(parallel, strong + 6.5 * 0.5 * strong) < 1e-10


@pytest.mark.parametrize("scales", [[10.0, 5.0], [4.0, 1.5], [6.0, 3.0, 2.0]])
def test_fdg_is_diffusers(scales):
    strong, weak = pair(2, 3, 16, 32)
    guider = guiders.FrequencyDecoupledGuidance(scales)
    guider.set_state(step=1, num_inference_steps=10, timestep=1)
    s = scales[0] - 1
    got = FDG([(scale - 1) / s for scale in scales])(strong, [(s, weak)])
    assert relative(got, guider.forward(strong, weak).pred) < 1e-10
    assert relative(got, weighted_sum(strong, [(s, weak)])) > 1e-2


def test_fdg_of_equal_bands_is_the_sum():
    """At any size; and bands act on what all terms add."""
    for size in ((16, 16), (17, 21), (8, 12)):
        strong, weak, other = draw(0, 1, 3, *size), draw(1, 1, 3, *size), draw(2, 1, 3, *size)
        terms = [(2.0, weak), (-0.5, other)]
        assert relative(FDG((1.0, 1.0))(strong, terms), weighted_sum(strong, terms)) < 1e-10
        half = weighted_sum(strong, [(0.5 * scale, eps) for scale, eps in terms])
        assert relative(FDG((0.5, 0.5))(strong, terms), half) < 1e-10
    low = torch.full((1, 3, 16, 16), 0.7, dtype=torch.float64)  # a constant has no fine band
    assert torch.allclose(FDG((0.0, 1.0))(low, [(1.0, 0 * low)]), 2 * low)
    assert torch.allclose(FDG((1.0, 0.0))(low, [(1.0, 0 * low)]), low)


def test_too_small_for_the_bands():
    strong, weak = pair(1, 3, 8, 6)
    with pytest.raises(RestoreError, match="2 bands of fdg need images of 8 cells"):
        FDG()(strong, [(1.0, weak)])
    with pytest.raises(RestoreError, match="bands of fdg must be at least one number"):
        FDG(())
