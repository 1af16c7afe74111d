"""Noise levels and predictions, against diffusers' tables and closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from operators import RestoreError
from restore.backbones.base import CONVERSIONS, PREDICTION_TYPES, Pixels, Prediction, normalise
from restore.backbones.schedule import NORMALISATIONS, Schedule, respace

SCHEDULES = {
    "vp": Schedule.from_config({}),
    "cosine": Schedule.from_config({"beta_schedule": "squaredcos_cap_v2"}),
    "ve": Schedule.edm(),
    "flow": Schedule.flow(),
    "shifted flow": Schedule.flow(shift=3.0),
}


def saved(scheduler):
    """The scheduler_config.json of a diffusers scheduler."""
    return json.loads(scheduler.to_json_string())


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_a_table_is_returned_exactly():
    """Also float32 ones: alpha(t)² is the very number, not one that went through the ratio."""
    for dtype in (torch.float32, torch.float64):
        table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=dtype), 0)
        schedule = Schedule.vp(table)
        assert torch.equal(schedule.alphas_cumprod, table.double()) and len(schedule) == 1000
        for t in (0, 1, 499, 998, 999):
            assert schedule.alpha(t) == math.sqrt(float(table[t])) and schedule.sigma(t) == math.sqrt(
                1 - float(table[t])
            )
            assert schedule.alpha(float(t)) == schedule.alpha(t)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_levels_are_normalised_everywhere_and_grow(schedule):
    """alpha² + sigma² = 1, alpha = 1 or alpha + sigma = 1, on the table's times and between them."""
    times = np.unique(np.concatenate([schedule.ts, (schedule.ts[1:] + schedule.ts[:-1]) / 2]))
    pairs = np.array([(schedule.alpha(t), schedule.sigma(t)) for t in times])
    a, s = pairs.T
    norm = {"vp": a**2 + s**2, "ve": a, "flow": a + s}[schedule.kind]
    assert np.allclose(norm, 1, rtol=1e-12) and np.all(np.diff(s / a) > 0)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_t_is_the_inverse_of_the_ratio(schedule):
    rng = np.random.default_rng(0)
    for t in (*schedule.ts[[0, 1, -2, -1]], *rng.uniform(schedule.ts[0], schedule.ts[-1], 50)):
        assert schedule.ratio(t) == pytest.approx(schedule.sigma(t) / schedule.alpha(t), rel=1e-9)
        assert schedule.t(schedule.ratio(t)) == pytest.approx(t, rel=1e-9, abs=1e-9)
    assert schedule.t(1e-30) == schedule.t(0) == schedule.ts[0] and schedule.t(1e30) == schedule.ts[-1]


def test_between_two_times_the_log_ratio_is_linear():
    schedule = SCHEDULES["vp"]
    low, high = (schedule.sigma(t) / schedule.alpha(t) for t in (400, 401))
    for share in (0.25, 0.5, 0.9):
        assert schedule.ratio(400 + share) == pytest.approx(low ** (1 - share) * high**share, rel=1e-12)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_every_beta_schedule_of_diffusers(name):
    theirs = DDPMScheduler(beta_schedule=name, beta_start=2e-4, beta_end=0.015, num_train_timesteps=500)
    ours = Schedule.from_config(saved(theirs))
    assert ours.kind == "vp" and len(ours) == 500 and ours.alphas_cumprod.dtype == torch.float64
    assert relative(ours.alphas_cumprod, theirs.alphas_cumprod.double()) < 1e-6
    last = theirs.alphas_cumprod[-1].double()
    assert relative(ours.alphas_cumprod[-1], last) < 1e-4


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigma_is_t_for_edm_and_flow_also_between(shift):
    rng, edm, flow = np.random.default_rng(0), Schedule.edm(levels=40), Schedule.flow(1000, shift)
    for t in rng.uniform(5, 75, 20):
        assert edm.sigma(t) == pytest.approx(t, rel=1e-12)
        assert flow.sigma(t) == pytest.approx(t / 1000, rel=1e-12) and flow.alpha(t) == pytest.approx(1 - t / 1000)


def test_trained_betas_and_defaults():
    betas = [0.1, 0.2, 0.3]
    assert Schedule.from_config({"trained_betas": betas}).alphas_cumprod.tolist() == pytest.approx([0.9, 0.72, 0.504])
    assert SCHEDULES["vp"].alphas_cumprod[0] == 1 - 1e-4
    assert float(SCHEDULES["vp"].alphas_cumprod[-1]) == pytest.approx(4.0358e-5, rel=1e-4)  # Ho et al. 2020, T = 1000


def test_flow_and_edm_configurations():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = Schedule.from_config(saved(theirs))
    for t in theirs.timesteps[[2, 300, 700, 998]].tolist():  # diffusers: t = 1000 sigma
        assert len(ours) == len(ours.timesteps(1000)) == 1000
        assert ours.sigma(t) == pytest.approx(t / 1000, rel=1e-6) and ours.alpha(t) == pytest.approx(
            1 - t / 1000, rel=1e-4
        )
    edm = Schedule.from_config(saved(EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0)))
    assert (edm.kind, edm.ts[0], edm.ts[-1]) == ("ve", pytest.approx(0.01), pytest.approx(50.0))
    assert edm.sigma(7.5) == pytest.approx(7.5) and edm.alpha(7.5) == 1.0


def test_levels_of_a_batch():
    schedule, x = SCHEDULES["vp"], torch.zeros(3, 3, 4, 4)
    alpha, sigma = schedule.levels(torch.tensor([0.0, 400.5, 999.0]), x)
    assert alpha.shape == sigma.shape == (3, 1, 1, 1) and alpha.dtype == torch.float32
    assert float(alpha[1]) == pytest.approx(schedule.alpha(400.5), rel=1e-6)
    assert float(sigma[2]) == pytest.approx(schedule.sigma(999), rel=1e-6)
    assert schedule.levels(torch.tensor([7]), x) == schedule.levels(7, x) == (schedule.alpha(7), schedule.sigma(7))


@pytest.mark.parametrize("kind", CONVERSIONS)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_every_kind_of_prediction_is_undone(kind, normalisation):
    """At x_t = alpha x_0 + sigma n a perfect network outputs n, x_0, alpha n − sigma x_0 or n − x_0."""
    x0, n = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for ratio in (0.05, 1.0, 20.0):
        a, s = NORMALISATIONS[normalisation](ratio)
        output = {"eps": n, "x0": x0, "v": a * n - s * x0, "velocity": n - x0}[kind]
        found = Prediction.of(kind, output, a * x0 + s * n, a, s)
        assert relative(found.eps, n) < 1e-12 and relative(found.x0, x0) < 1e-12 and found.variance is None
    if kind == "eps":
        assert found.eps is output  # no rounding on the way


def test_diffusers_names_of_predictions():
    x0, n = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for name in ("epsilon", "sample", "v_prediction"):
        theirs = DDPMScheduler(prediction_type=name, clip_sample=False)
        a, s = SCHEDULES["vp"].alpha(300), SCHEDULES["vp"].sigma(300)
        expected = theirs.step(n, 300, x0, generator=torch.Generator().manual_seed(0)).pred_original_sample
        assert relative(Prediction.of(PREDICTION_TYPES[name], n, x0, a, s).x0, expected) < 1e-5
    with pytest.raises(RestoreError, match="one of eps, x0, v, velocity, got 'score'"):
        Prediction.of("score", n, x0, 1.0, 1.0)


@pytest.mark.parametrize("name", ["ve", "flow"])
def test_normalise_to_variance_preserving(name):
    schedule = SCHEDULES[name]

    class Network(Pixels):
        def predict(self, x, t, condition=None):
            seen.append(x)
            return Prediction.of("eps", torch.ones_like(x), x, self.schedule.alpha(t), self.schedule.sigma(t))

    network, seen = Network(), []
    network.schedule = schedule
    prior = normalise(network, "vp")
    t = float(schedule.ts[500] + schedule.ts[501]) / 2
    assert prior.schedule.ratio(t) == schedule.ratio(t) and prior.schedule.timesteps(7) == schedule.timesteps(7)
    x0, n = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prediction = prior.predict(prior.schedule.alpha(t) * x0 + prior.schedule.sigma(t) * n, t)
    assert relative(seen[0], schedule.alpha(t) * x0 + schedule.sigma(t) * n) < 1e-5
    assert prior.schedule.alpha(t) ** 2 + prior.schedule.sigma(t) ** 2 == pytest.approx(1)
    x = prior.schedule.alpha(t) * x0 + prior.schedule.sigma(t) * n
    assert relative(prior.schedule.alpha(t) * prediction.x0 + prior.schedule.sigma(t) * prediction.eps, x) < 1e-5
    network.schedule = SCHEDULES["vp"]
    assert normalise(network, "vp") is network


def test_timesteps():
    schedule = SCHEDULES["vp"]
    assert schedule.timesteps(4) == schedule.timesteps("4") == [999, 666, 333, 0]
    assert all(isinstance(t, int) for t in schedule.timesteps("10,5"))
    assert schedule.timesteps("ddim250") == list(range(996, -1, -4))
    assert schedule.timesteps([3, 700.5, 20]) == [700.5, 20, 3]
    for spec in ("karras:12", "log:12"):
        times = schedule.timesteps(spec)
        assert len(times) == 12 and (times[0], times[-1]) == (pytest.approx(999), pytest.approx(0, abs=1e-9))
        assert all(a > b for a, b in zip(times, times[1:], strict=False))
    ratios = [schedule.ratio(t) for t in schedule.timesteps("log:5")]
    assert np.allclose(np.diff(np.log(ratios)), np.log(ratios[1] / ratios[0]))
    karras = [schedule.ratio(t) ** (1 / 7) for t in schedule.timesteps("karras:5")]
    assert np.allclose(np.diff(karras), karras[1] - karras[0])
    assert Schedule.edm(levels=11).timesteps(3) == pytest.approx([80, 0.4, 0.002])
    assert respace(1000, 4) == [0, 333, 666, 999]


@pytest.mark.parametrize(
    "spec", [0, -3, 1001, "abc", "", "ddim", "ddim7x", "ddim999", "5,,5", "karras:0", "karras:x", "cubic:5", 2.5, None]
    + [[], [1000], [-1, 5], ["a"], [math.nan], [5, 5], {"a": 1}]
)  # fmt: skip
def test_wrong_timesteps_are_refused(spec):
    with pytest.raises(RestoreError) as caught:
        SCHEDULES["vp"].timesteps(spec)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "config, message",
    [
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ({"trained_betas": [0.5, 1.0]}, "zero terminal SNR"),
        ({"beta_schedule": "quadratic"}, "quadratic"),
        ({"beta_start": "x"}, "must describe noise levels"),
        ({"num_train_timesteps": None}, "must describe noise levels"),
        ({"num_train_timesteps": -3}, "must describe noise levels"),
        ({"num_train_timesteps": 1}, "at least two times"),
        ({"trained_betas": "x"}, "must describe noise levels"),
        ({"trained_betas": [[0.1, 0.2]]}, "."),
        ({"beta_start": 0.0, "beta_end": 0.0}, "strictly between 0 and 1"),
        ({"_class_name": "ScoreSdeVeScheduler", "sigma_max": 1348}, "ScoreSdeVeScheduler.*not known"),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 90.0}, "grow with its times"),
    ],
)
def test_wrong_configurations_are_refused(config, message):
    with pytest.raises(RestoreError, match=message) as caught:
        Schedule.from_config(config)
    assert "\n" not in str(caught.value)


def test_wrong_tables_and_times():
    for ts, ratios, kind in (([0, 1], [1, 2], "vb"), ([0], [1], "vp"), ([0, 1], [2, 1], "vp"), ([1, 0], [1, 2], "ve")):
        with pytest.raises(RestoreError):
            Schedule(ts, ratios, kind)
    for table in (torch.tensor([0.9, 0.0]), torch.tensor([1.0, 0.5]), torch.tensor([0.9, math.nan]), torch.rand(3, 3)):
        with pytest.raises(RestoreError, match="strictly between 0 and 1"):
            Schedule.vp(table)
    for t in (-1, 1000, 999.001, math.nan):
        with pytest.raises(RestoreError, match="must lie in 0 to 999"):
            SCHEDULES["vp"].alpha(t)
