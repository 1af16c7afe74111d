"""DAPS and LatentDAPS against trajectories of the authors' code (tests/golden/samplers_daps, samplers_latent_daps)."""

import numpy as np
import pytest
from golden_samplers import adm_prior, arrange, cases, latent_bank, noise_bank, relative, sd_prior

from restore.backbones.schedule import Schedule
from restore.guidance import CFG
from restore.samplers.daps import REFERENCE, daps, rho_grid

CASES = cases("daps", "latent_daps")


def continuous(name):
    """The schedules of the authors' code, which knows no table: t is 999 u in pixels and 1000 u on latents."""
    u = np.geomspace(1e-7, 1.1, 400_000)
    if name == "daps":
        return Schedule(999 * u, np.sqrt(np.expm1(19.9 * u**2 / 2 + 0.1 * u)), "vp")
    b, a = 0.85**0.5, 12**0.5 - 0.85**0.5
    return Schedule(1000 * u, np.sqrt(np.expm1(((a * u + b) ** 3 - b**3) / (3 * a))), "vp")


@pytest.fixture(scope="module")
def priors():
    made = {"daps": adm_prior(), "latent_daps": sd_prior()}
    for name, prior in made.items():
        prior.schedule = continuous(name)
    return made


def run(priors, name, case, after=0, **changes):
    """The callback's steps from the stored state after `after` steps on; with after > 0 one step counts."""
    tensors, own, operator = arrange(name, case)
    prior, hmc = priors[name], own["mc_algo"] == "hmc"
    bank, condition = latent_bank() if name == "latent_daps" else (noise_bank(), None)
    K, M = own["annealing_steps"], own["mcmc_steps"]
    sigmas = rho_grid(own["sigma_max"], own["sigma_min"], K)
    per_step = M + 1 + hmc

    def noise(k, shape, kind):
        if kind == "start":
            return bank[0].reshape(shape) if not after else tensors[f"{letter}_after_{after}"] / sigmas[after]
        j = {"velocity": k * per_step, "latent": k * per_step + per_step - 1}.get(kind)
        if kind == "langevin":
            j = k // M * per_step + hmc + k % M
        return bank[1 + (j + after * per_step) % 25].reshape(shape)

    letter = "x" if name == "daps" else "z"
    options = {key: own[key] for key in ("sigma_max", "sigma_min", "ode_steps", "ode_sigma_min", "mcmc_steps", "lr")}
    options |= {"tau": own["tau"], "lr_min_ratio": own["lr_min_ratio"], "momentum": own["momentum"] if hmc else 0.0}
    steps, seen = K, []
    if after:
        steps = [prior.schedule.t(sigma) for sigma in sigmas[after : after + 2]]
        options |= {"lr": own["lr"] * (1 + after / (K + 1) * (own["lr_min_ratio"] - 1)), "sigma_max": sigmas[after]}
    image = daps(
        prior,
        operator,
        tensors["y"],
        noise=noise,
        steps=steps,
        guidance=CFG(own["cfg_scale"] - 1) if own.get("cfg_scale", 1) != 1 else None,
        condition=condition,
        callback=seen.append,
        **{**options, **REFERENCE, **changes},
    )
    return image, seen, tensors, letter


@pytest.mark.parametrize("name,case", CASES)
def test_trajectory_is_the_official_one(priors, name, case):
    image, seen, tensors, letter = run(priors, name, case)
    for key, value in tensors.items():
        if f"{letter}_after_" in key:
            assert relative(seen[int(key.rpartition("_")[2]) - 1]["x_t"], value) < 1e-4, key
    assert relative(seen[4]["z0_hat"], tensors[f"{letter}0_hat_5"]) < 1e-4
    assert relative(seen[4]["z0_y"], tensors[f"{letter}0y_5"]) < 1e-4
    assert relative(seen[-1]["x_t"], tensors[f"{letter}_final"]) < 1e-4
    assert relative(image, tensors["decoded" if letter == "z" else "x_final"]) < 1e-4


@pytest.mark.parametrize("name,case", CASES)
def test_teacher_forced_steps(priors, name, case):
    for k in (1, 5, 9) if name == "daps" and case != "gauss_hmc" else (1, 5):
        _, seen, tensors, letter = run(priors, name, case, after=k)
        assert relative(seen[0]["x_t"], tensors[f"{letter}_after_{k + 1}"]) < 1e-5, k
