"""DAPS and LatentDAPS against trajectories of the authors' code (tests/golden/samplers_daps, samplers_latent_daps)."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_langevin import arrange, cases, latent_bank, noise_bank, sd_prior
from golden_samplers import network as adm_prior
from golden_samplers import reference, relative

import operators
from benchmarks.posteriors import example_operators, example_priors
from operators import Clipping, GaussianNoise, PoissonNoise, RestoreError
from restore.backbones.schedule import Schedule
from restore.guidance import CFG, PAG
from restore.samplers.daps import daps
from restore.samplers.likelihood import find_data_norm, likelihood_variance
from restore.samplers.noise import ImageNoise
from restore.samplers.steps import annealing_levels, rho_grid

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
        **{**options, **reference("daps"), **changes},
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


def batch_noise(seed=1):
    g = torch.Generator().manual_seed(seed)
    return lambda k, shape, kind: torch.randn(tuple(shape), generator=g, dtype=torch.float64)


def on_the_gaussian(task, n=600, **options):
    """Bias of the samples' mean in units of how far y moves the prior's, and their variance over the true one."""
    prior, operator, sigma = example_priors()["smooth Gaussian"], example_operators(0.1)[task], 0.1
    g = torch.Generator().manual_seed(3)
    y = operator.A(prior.sample(1, g))
    y = y + sigma * torch.randn(y.shape, generator=g, dtype=torch.float64)
    mean, cov = prior.posterior(operator, y, sigma).moments()
    many = y.expand(n, *y.shape[1:]).contiguous()
    common = {"steps": 20, "sigma_max": 10.0, "tau": None, "lr_min_ratio": 1.0, "noise": batch_noise()}
    x = daps(prior, operator, many, **{**common, **options}).flatten(1)
    bias = (x.mean(0) - mean).norm() / (prior.moments()[0] - mean).norm()
    return float(bias), float(torch.cov(x.T).trace() / cov.trace())


def test_exact_conditional_samples_the_posterior_of_a_gaussian_prior():
    bias, spread = on_the_gaussian("SR x2", conditional="exact", mcmc_steps=100, lr=5e-4)
    assert bias < 0.05 and 0.9 < spread < 1.15  # what is left is the size of a Langevin step


def test_gaussian_conditional_has_the_right_mean_and_twice_the_variance():
    """The ODE moves x by half of what E[x_0 | x] does, so the paper's x0_y sees the root of the prior: on a Gaussian
    its covariance doubled. A change of these numbers is a change of DAPS."""
    bias, spread = on_the_gaussian("SR x2", steps=60, sigma_min=0.05, mcmc_steps=30, lr=2e-3)
    assert bias < 0.1 and 1.6 < spread < 2.3
    # The published tau is a tenth of sigma_y here: y is believed too much.
    bias, spread = on_the_gaussian("SR x2", steps=60, mcmc_steps=30, tau=0.01, lr=1e-4, lr_min_ratio=0.01)
    assert spread < 1


@pytest.mark.parametrize("conditional", ["gaussian", "exact"])
def test_clipping_is_undone_with_the_prior(conditional):
    """A nonlinear operator, for which DAPS needs only A: saturated pixels come from the prior's correlations."""
    prior = example_priors()["smooth Gaussian"]
    truth = prior.sample(40, torch.Generator().manual_seed(5))
    operator = Clipping(4.0, noise=GaussianNoise(0.05))
    y = operator.A(truth) + 0.05 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(6)).double()
    saturated = operator.A(truth).abs() == 1
    assert 0.2 < saturated.double().mean() < 0.8
    options = {"tau": None, "sigma_max": 10.0, "mcmc_steps": 50, "lr": 1e-4, "conditional": conditional}
    x = daps(prior, operator, y, noise=batch_noise(), steps=20, lr_min_ratio=1.0, **options)
    naive, plain = y / 4, prior.moments()[0].view(1, *prior.shape)
    for other in (naive, plain):
        assert (x - truth)[saturated].norm() < 0.75 * (other - truth)[saturated].norm()
    assert (y - operator.A(x)).norm() < 0.2 * (y - operator.A(plain)).norm()


def test_likelihood_is_that_of_the_noise():
    d, y = torch.randn(2, 3, 5, 5, dtype=torch.float64), torch.rand(2, 3, 5, 5, dtype=torch.float64) * 1.8 - 0.9
    for noise in (GaussianNoise(0.07), PoissonNoise(0.5)):
        operator = SimpleNamespace(noise=noise)
        exact = (d**2 / (2 * noise.std(y) ** 2)).flatten(1).sum(1)
        assert torch.allclose(find_data_norm(operator, None)(d, y) ** 2 / likelihood_variance(operator, None), exact)
    assert likelihood_variance(operator, 0.01) == 0.01**2
    for operator in (SimpleNamespace(noise=None), SimpleNamespace(), SimpleNamespace(noise=GaussianNoise(0.0))):
        with pytest.raises(RestoreError, match="tau must be positive"):
            likelihood_variance(operator, None)


FEW = {"steps": 3, "ode_steps": 2, "mcmc_steps": 2}


@pytest.fixture(scope="module")
def adm():
    return adm_prior(double=False)


def test_scale_zero_is_plain_daps_and_guidance_acts(adm):
    y, operator = torch.zeros(1, 3, 8, 8), operators.SuperResolution(4)
    common = {"noise": ImageNoise([(0, "x", 0)]), **FEW}
    plain = daps(adm, operator, y, **common)
    assert torch.equal(plain, daps(adm, operator, y, guidance=PAG(0.0, layers="m1"), **common))
    assert relative(daps(adm, operator, y, guidance=PAG(1.0, layers="m1"), **common), plain) > 1e-3


def test_batch_equals_single_images(adm):
    operator = operators.SuperResolution(4)
    y = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.3
    keys = [(0, f"image{i}", 0) for i in range(3)]
    options = {**FEW, "momentum": 0.5, "guidance": PAG(1.0, layers="m1")}
    together = daps(adm, operator, y, noise=ImageNoise(keys), **options)
    for i in range(3):
        single = daps(adm, operator, y[i : i + 1], noise=ImageNoise(keys[i : i + 1]), **options)
        assert relative(single, together[i : i + 1]) < 1e-5
    assert relative(together[:1], together[1:2]) > 0.1


def test_every_draw_is_its_own(adm):
    seen = []

    def noise(k, shape, kind):
        seen.append((k, kind))
        return torch.zeros(shape)

    daps(adm, operators.SuperResolution(4), torch.zeros(1, 3, 8, 8), noise=noise, momentum=0.5, **FEW)
    # start; per level a velocity and two Langevin steps; the last level is not noised again
    assert len(seen) == len(set(seen)) == 1 + 3 * 3 + 2


def test_annealing_levels():
    schedule = example_priors()["smooth Gaussian"].schedule
    assert annealing_levels(schedule, "12", 100.0, 0.1)[:2] == pytest.approx([100, 68.67398], rel=1e-6)
    assert annealing_levels(schedule, [900, 100], 100.0, 0.1) == [schedule.ratio(900), schedule.ratio(100), 0.0]
    for steps in (0, "none"):
        with pytest.raises(RestoreError, match=f"steps.*{steps}"):
            annealing_levels(schedule, steps, 100.0, 0.1)


def test_bad_options_and_divergence(adm):
    operator, y = operators.SuperResolution(4), torch.zeros(1, 3, 8, 8)
    common = {"noise": ImageNoise([(0, "x", 0)]), **FEW}
    with pytest.raises(RestoreError, match="conditional 'exakt'.*exact"):
        daps(adm, operator, y, conditional="exakt", **common)
    with pytest.raises(RestoreError, match="not finite after step 1.*lr=1e.30"):
        daps(adm, operator, y, lr=1e30, **common)
