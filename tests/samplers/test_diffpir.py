"""DiffPIR against trajectories of the official code (tests/golden/samplers_diffpir), and its edge cases."""

import golden_samplers as golden
import pytest

from restore.samplers.diffpir import diffpir


@pytest.fixture(scope="module")
def prior():
    return golden.network()


def settings(case):
    # The authors' sigma_n is on [0, 1], half of ours: their lambda is four times ours.
    return {"lam": case.setting("paper lambda") / 4, "zeta": case.setting("paper zeta")}


@pytest.mark.parametrize("name", golden.cases("diffpir"))
def test_whole_trajectory(prior, name):
    """The official result is the x that enters the last step; ours goes one step further."""
    case = golden.Case("diffpir", name)
    steps = f"quad:{len(case['timesteps_visited'])}"
    assert prior.schedule.timesteps(steps) == case["timesteps_visited"]
    states = golden.walk(diffpir, prior, case, steps, case.x_start, **settings(case))
    assert len(states) == case["n_updates"] + 1
    golden.check_whole(case, states)


@pytest.mark.parametrize("name", golden.cases("diffpir"))
def test_teacher_forced_steps(prior, name):
    case = golden.Case("diffpir", name)
    for k in (1, 5, 10):
        x, steps = case.tensors[f"x_after_{k}"], case["timesteps_visited"][k : k + 2]
        (state, _) = golden.walk(diffpir, prior, case, steps, x, k, **settings(case))
        assert golden.relative(state["x_t"], case.tensors[f"x_after_{k + 1}"]) < 1e-5, k
        assert golden.relative(x, case.tensors[f"x_after_{k + 1}"]) > 1e-2
