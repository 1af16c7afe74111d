"""DDRM against trajectories of the official code (tests/golden/samplers_ddrm), and its edge cases."""

import golden_samplers as golden
import pytest
import torch

import operators
from restore.samplers.ddrm import ddrm


@pytest.fixture(scope="module")
def prior():
    return golden.network()


def start_for(case, x, schedule, t):
    """The start noise from which ddrm makes x at time t."""
    svd = operators.svd(case.operator, (3, 32, 32), torch.float64)
    r = schedule.sigma(t) / schedule.alpha(t)
    own = case.operator.noise.sigma / svd.singular
    c = svd.V_adjoint(x.double()) / schedule.alpha(t)
    y_bar = svd.U_adjoint(case.y.double()) / svd.singular
    return svd.V(torch.where(own < r, (c - y_bar) / (r**2 - own**2).clamp(min=1e-12).sqrt(), c / r)).float()


@pytest.mark.parametrize("name", golden.cases("ddrm"))
def test_whole_trajectory(prior, name):
    """From the official x_T on."""
    case = golden.Case("ddrm", name)
    steps = case["timesteps_visited"]
    start = start_for(case, case.x_start, prior.schedule, steps[0])
    golden.check_whole(case, golden.walk(ddrm, prior, case, steps, start))


@pytest.mark.parametrize("name", golden.cases("ddrm"))
def test_start(prior, name):
    """x_T given y: the official code divides by sigma_T in place of sqrt(1 + sigma_T^2)."""
    case, t = golden.Case("ddrm", name), 950
    wrong = prior.schedule.sigma(t)  # (sigma / alpha) / sqrt(1 + (sigma / alpha)^2), in their place 1
    start = start_for(case, wrong * case.x_start, prior.schedule, t)
    assert golden.relative(start, case.draw(0)) < 1e-5


@pytest.mark.parametrize("name", golden.cases("ddrm"))
def test_teacher_forced_steps(prior, name):
    case = golden.Case("ddrm", name)
    for k in (1, 5, 10):
        x, steps = case.tensors[f"x_after_{k}"], case["timesteps_visited"][k : k + 2]
        start = start_for(case, x, prior.schedule, steps[0])
        (state, _) = golden.walk(ddrm, prior, case, steps, start, k)
        assert golden.relative(state["x_t"], case.tensors[f"x_after_{k + 1}"]) < 1e-5, k
        assert golden.relative(x, case.tensors[f"x_after_{k + 1}"]) > 1e-2
