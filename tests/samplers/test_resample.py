"""ReSample against a trajectory of the authors' code (tests/golden/samplers_resample)."""

import pytest
from golden_samplers import arrange, latent_bank, relative, sd_prior

from restore.samplers.resample import REFERENCE, resample

CASE = "sr4_bicubic"


@pytest.fixture(scope="module")
def prior():
    return sd_prior()


def run(prior, **changes):
    tensors, own, operator = arrange("resample", CASE)
    (bank, condition), seen, drawn = latent_bank(), [], []

    def noise(k, shape, kind):
        if kind == "start":
            return bank[0].reshape(shape)
        drawn.append(k)
        return bank[len(drawn)].reshape(shape)

    image = resample(
        prior,
        operator,
        tensors["y"],
        noise=noise,
        condition=condition,
        callback=seen.append,
        **{
            "steps": own["S"],
            "pixel_iterations": own["pixel_iters"],
            "latent_iterations": own["latent_iters"],
            "tolerance": own["pixel_eps"],
            **REFERENCE,
            **changes,
        },
    )
    return image, seen, tensors


def test_trajectory_is_the_official_one(prior):
    image, seen, tensors = run(prior)
    z = [step["x_t"] for step in seen]
    for call in (2, 3, 6, 11):
        print(call, relative(z[call - 2], tensors[f"z_call_{call}"]))
    print(relative(seen[4]["z0_hat"], tensors["pseudo_z0_call_5"]))
    fitted = [step for step in seen if "z0_y" in step]
    for step in fitted: print(step["step"], step["t"])
    print(relative(z[19], tensors["event_2_stochastic_resample"]))
    print(relative(fitted[1]["z0_y"], tensors["event_3_latent_optimization"]))
    print(relative(fitted[1]["x_t"], tensors["event_4_stochastic_resample"]))
    print(relative(fitted[2]["z0_y"], tensors["event_5_latent_optimization"]))
    print(relative(z[-1], tensors["z_final"]))
    assert relative(z[-1], tensors["z_final"]) < 1e-4
