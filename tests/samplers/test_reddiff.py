"""RED-diff against trajectories of the authors' code (tests/golden/samplers_reddiff)."""

import pytest
from golden_samplers import adm_prior, arrange, cases, noise_bank, relative

from restore.samplers.reddiff import reddiff

CASES = [case for _, case in cases("reddiff")]


@pytest.fixture(scope="module")
def prior():
    return adm_prior()


def run(prior, case):
    tensors, own, operator = arrange("reddiff", case)
    bank, seen = noise_bank(), []
    image = reddiff(
        prior,
        operator,
        tensors["y"],
        noise=lambda k, shape, kind: bank[k].reshape(shape),
        steps=f"ddim{own['num_steps']}",
        lam=own["lambda"],
        lr=own["lr"],
        weighting=own["weighting"],
        v=own["obs_weight"],
        callback=seen.append,
    )
    return image, seen, tensors


@pytest.mark.parametrize("case", CASES)
def test_trajectory_is_the_official_one(prior, case):
    image, seen, tensors = run(prior, case)
    for key, value in tensors.items():
        if key.startswith("x_after_"):
            print(key, relative(seen[int(key[8:]) - 1]["x_t"], value))
            assert relative(seen[int(key[8:]) - 1]["x_t"], value) < 1e-4, key
    print(relative(image, tensors["x_final"]))
    assert relative(seen[4]["x0_hat"], tensors["x0_hat_5"]) < 1e-4
    assert relative(image, tensors["x_final"]) < 1e-4
