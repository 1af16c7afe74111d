"""PiGDM against trajectories of RED-diff's (noiseless) and InverseBench's (noisy) implementation."""

import math

import golden_samplers as golden
import numpy as np
import pytest
import torch

from restore.backbones.base import VariancePreserving
from restore.backbones.schedule import Schedule
from restore.samplers.pigdm import pigdm


@pytest.fixture(scope="module")
def prior():
    return golden.network()


@pytest.mark.parametrize("name", golden.cases("pigdm_noiseless"))
def test_whole_noiseless_trajectory(prior, name):
    case = golden.Case("pigdm_noiseless", name)
    settings = {"eta": case.setting("eta"), "weight": case.setting("weight")}
    steps = case["timesteps_visited"]
    states = golden.walk(pigdm, prior, case, steps, case.x_start, lambda k: case.draw(k + 1), **settings)
    golden.check_whole(case, states)


@pytest.mark.parametrize("name", golden.cases("pigdm_noiseless"))
def test_teacher_forced_noiseless_steps(prior, name):
    case = golden.Case("pigdm_noiseless", name)
    for k in (1, 5, 10):
        x, steps = case.tensors[f"x_after_{k}"], case["timesteps_visited"][k : k + 2]
        states = golden.walk(pigdm, prior, case, steps, x, lambda _: case.draw(k + 1), eta=case.setting("eta"))
        assert golden.relative(states[0]["x_t"], case.tensors[f"x_after_{k + 1}"]) < 1e-5, k
        assert golden.relative(x, case.tensors[f"x_after_{k + 1}"]) > 1e-2


def test_start_from_the_measurement(prior):
    """RED-diff's start: y's pseudo-inverse at the first noise level."""
    case, starts = golden.Case("pigdm_noiseless", "sr4_bicubic"), []
    t = case["timesteps_visited"][0]
    alpha, sigma = prior.schedule.alpha(t), prior.schedule.sigma(t)
    expected = alpha * case.operator.A_dagger(case.y) + sigma * case.draw(0)
    assert golden.relative(expected, case.x_start) < 1e-6

    class Watched(golden.Sized):
        def predict(self, x_t, t, condition=None):
            starts.append(x_t.detach())
            return super().predict(x_t, t, condition)

    watched = Watched(prior.inner, 32, 32)
    golden.walk(pigdm, watched, case, [t], case.draw(0), lambda k: case.draw(k + 1), start_from="measurement")
    assert golden.relative(starts[0], case.x_start) < 1e-6


def continuous(prior, sigmas):
    """The prior with InverseBench's times: sigma^2 = exp(19.9 u^2 / 2 + 0.1 u) - 1, t = 999 u, exact at `sigmas`."""
    logs = np.log1p(np.asarray(sorted(set(sigmas))) ** 2)
    u = (-0.1 + np.sqrt(0.01 + 2 * 19.9 * logs)) / 19.9
    twin = VariancePreserving(prior)
    twin.schedule = Schedule(999 * u, sorted(set(sigmas)), "vp")
    return twin


@pytest.mark.parametrize("name", golden.cases("pigdm_noisy"))
def test_noisy_steps(prior, name):
    """Step by step along their own trajectory, because they inject eta sigma_s n whatever the step's size (DDIM's
    eta is solved for it). Their last step, which does not lower sigma, is not ours; the state before it is."""
    case = golden.Case("pigdm_noisy", name)
    sigmas = case["sigma_steps"]
    n = case.setting("num_steps")
    twin = continuous(prior, sigmas[:n])
    times = twin.schedule.timesteps([float(t) for t in twin.schedule.ts])
    x, states = case.x_start / math.hypot(1, sigmas[0]), []
    for k in range(n - 1):
        r, r_s = sigmas[k], sigmas[k + 1]
        alpha, alpha_s = 1 / math.hypot(1, r), 1 / math.hypot(1, r_s)
        sigma_s, sigma = r_s * alpha_s, r * alpha
        eta = case.setting("eta") * sigma / math.sqrt(1 - (alpha / alpha_s) ** 2)
        state, _ = golden.walk(pigdm, twin, case, times[k : k + 2], x, lambda _: case.draw(k + 1), eta=eta)
        assert sigma_s > 0
        x = state["x_t"]
        states.append((x / alpha_s, state["x0_hat"]))
    for k in [k for k in golden.STORED if k < n]:
        assert golden.relative(states[k - 1][0], case.tensors[f"x_after_{k}"]) < 1e-4, k
    norms = torch.tensor([float(x.norm()) for x, _ in states])
    assert golden.relative(norms, case.x_norms[: n - 1]) < 1e-4
    assert golden.relative(states[4][1], case.x0_hat_5) < 1e-4
    for k in [k for k in (1, 5, 10) if k + 1 < n]:  # teacher-forced
        x = case.tensors[f"x_after_{k}"] / math.hypot(1, sigmas[k])
        r, r_s = sigmas[k], sigmas[k + 1]
        alpha, alpha_s = 1 / math.hypot(1, r), 1 / math.hypot(1, r_s)
        eta = case.setting("eta") * r * alpha / math.sqrt(1 - (alpha / alpha_s) ** 2)
        state, _ = golden.walk(pigdm, twin, case, times[k : k + 2], x, lambda _: case.draw(k + 1), eta=eta)
        assert golden.relative(state["x_t"] / alpha_s, case.tensors[f"x_after_{k + 1}"]) < 1e-5, k
