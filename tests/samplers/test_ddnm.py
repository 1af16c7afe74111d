"""DDNM and DDNM+ against trajectories of the (corrected) official code, tests/golden/samplers_ddnm."""

import golden_samplers as golden
import pytest

from restore.samplers.ddnm import ddnm, travel_order


@pytest.fixture(scope="module")
def prior():
    return golden.network()


@pytest.mark.parametrize("name", golden.cases("ddnm"))
def test_whole_trajectory(prior, name):
    case = golden.Case("ddnm", name)
    path, states = case["time_path_incl_travel"], []
    length, repeat = case.setting("paper l"), case.setting("paper r")
    grid = sorted(set(path) - {-1}, reverse=True)
    assert [grid[i] for i in travel_order(len(grid), length, repeat)] == case["network_timesteps_in_order"]

    # Their draws count every move along the path; a journey back is `length` of them, of which the last one lasts.
    moves, evaluated = {}, 0
    for j, (t, following) in enumerate(zip(path, path[1:], strict=False)):
        if following < t:
            moves[evaluated, "latent"] = j
            evaluated += 1
        else:
            moves[evaluated - 1, "travel"] = j

    def noise(k, shape, kind):
        return case.draw(0 if kind == "start" else 1 + moves[k, kind] % 25)

    settings = {"travel_length": length, "travel_repeat": repeat, "travel_from": "x0"}
    ddnm(prior, case.operator, case.y, steps=grid, noise=noise, callback=states.append, **settings)
    assert len(states) == len(case["network_timesteps_in_order"])
    golden.check_whole(case, states)


@pytest.mark.parametrize("name", [name for name in golden.cases("ddnm") if "travel" not in name])
def test_teacher_forced_steps(prior, name):
    case = golden.Case("ddnm", name)
    for k in (1, 5, 10):
        x, steps = case.tensors[f"x_after_{k}"], case["network_timesteps_in_order"][k : k + 2]
        (state, _) = golden.walk(ddnm, prior, case, steps, x, k)
        assert golden.relative(state["x_t"], case.tensors[f"x_after_{k + 1}"]) < 1e-5, k
        assert golden.relative(x, case.tensors[f"x_after_{k + 1}"]) > 1e-2
