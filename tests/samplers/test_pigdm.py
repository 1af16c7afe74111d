"""PiGDM against trajectories of RED-diff's (noiseless) and InverseBench's (noisy) implementation."""

import math

import golden_samplers as golden
import numpy as np
import pytest
import torch

from restore.backbones.base import Renormalised
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
    states = golden.walk(pigdm, prior, case, steps, case.x_start, **settings)
    golden.check_whole(case, states)


@pytest.mark.parametrize("name", golden.cases("pigdm_noiseless"))
def test_teacher_forced_noiseless_steps(prior, name):
    case = golden.Case("pigdm_noiseless", name)
    for k in (1, 5, 10):
        x, steps = case.tensors[f"x_after_{k}"], case["timesteps_visited"][k : k + 2]
        states = golden.walk(pigdm, prior, case, steps, x, k, eta=case.setting("eta"))
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
    golden.walk(pigdm, watched, case, [t], case.draw(0), start_from="measurement")
    assert golden.relative(starts[0], case.x_start) < 1e-6


def continuous(prior, sigmas):
    """The prior with InverseBench's times: sigma^2 = exp(19.9 u^2 / 2 + 0.1 u) - 1, t = 999 u, exact at `sigmas`."""
    logs = np.log1p(np.asarray(sorted(set(sigmas))) ** 2)
    u = (-0.1 + np.sqrt(0.01 + 2 * 19.9 * logs)) / 19.9
    twin = Renormalised(prior, "vp")
    twin.schedule = Schedule(999 * u, sorted(set(sigmas)), "vp")
    return twin


@pytest.mark.parametrize("name", golden.cases("pigdm_noisy"))
def test_noisy_steps(prior, name):
    """Step by step, because they inject eta sigma_s n whatever the step's size: DDIM's eta is solved for it, beyond
    1 at some. Their last step, which does not lower sigma, is not ours; the state before it is."""
    case, states = golden.Case("pigdm_noisy", name), []
    sigmas, n = case["sigma_steps"], case.setting("num_steps")
    twin = continuous(prior, sigmas[:n])
    times = twin.schedule.timesteps(twin.schedule.ts.tolist())
    scales = [math.hypot(1, sigma) for sigma in sigmas]  # of their x over ours

    def step(k, x):
        """The state after step k (from 0) on their x."""
        eta = case.setting("eta") * (sigmas[k] / scales[k]) / math.sqrt(1 - (scales[k + 1] / scales[k]) ** 2)
        state, _ = golden.walk(pigdm.__wrapped__, twin, case, times[k : k + 2], x / scales[k], k, eta=eta)
        return {"x_t": state["x_t"] * scales[k + 1], "x0_hat": state["x0_hat"]}

    x = case.x_start
    for k in range(n - 1):
        states.append(step(k, x))
        x = states[-1]["x_t"]
    stored = [k for k in golden.STORED if k < n]
    for k in stored:
        assert golden.relative(states[k - 1]["x_t"], case.tensors[f"x_after_{k}"]) < 1e-4, k
    norms = torch.tensor([float(state["x_t"].norm()) for state in states])
    assert golden.relative(norms, case.x_norms[: n - 1]) < 1e-4
    assert golden.relative(states[4]["x0_hat"], case.x0_hat_5) < 1e-4
    for k in (k for k in stored if k + 1 in stored):  # teacher-forced
        forced = step(k, case.tensors[f"x_after_{k}"])["x_t"]
        assert golden.relative(forced, case.tensors[f"x_after_{k + 1}"]) < 1e-5, k
        assert golden.relative(case.tensors[f"x_after_{k}"], forced) > 1e-3
