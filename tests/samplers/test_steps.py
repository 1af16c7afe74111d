"""Schedules and single steps against guided-diffusion's own arrays (tests/golden/schedules)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from operators import RestoreError
from restore.backbones.schedule import Schedule, respace
from restore.samplers.noise import ImageNoise, derive_seed
from restore.samplers.steps import Diffusion

GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "schedules.safetensors")
RESPACINGS = ["250", "ddim25", "ddim50", "1000", "20", "ddim20"]


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("spec", RESPACINGS)
def test_respacing_and_coefficients(spec):
    timesteps = respace(1000, spec)
    assert timesteps == GOLDEN[f"linear.{spec}.timestep_map"].tolist()
    diffusion = Diffusion(Schedule.vp(GOLDEN["linear.base.alphas_cumprod"]), reversed(timesteps))
    for ours, theirs in {
        "alpha_bar": "alphas_cumprod",
        "alpha_bar_prev": "alphas_cumprod_prev",
        "beta": "betas",
        "posterior_variance": "posterior_variance",
        "posterior_log_variance": "posterior_log_variance_clipped",
        "coef_x0": "posterior_mean_coef1",
        "coef_x_t": "posterior_mean_coef2",
    }.items():
        assert relative(getattr(diffusion, ours), GOLDEN[f"linear.{spec}.{theirs}"]) < 1e-10, ours


@pytest.mark.parametrize("clip", [True, False])
def test_one_step_equals_guided_diffusion(clip):
    diffusion = Diffusion(Schedule.vp(GOLDEN["linear.base.alphas_cumprod"]), respace(1000, "250"))
    prefix = f"step.clip{int(clip)}"
    for b, i in enumerate(GOLDEN["step.t_index"].tolist()):
        x, eps, v = (GOLDEN[f"step.{n}"][b : b + 1] for n in ("x", "eps", "v"))
        x0 = diffusion.x0(x, eps, i, clip)
        assert relative(x0, GOLDEN[f"{prefix}.pred_xstart"][b : b + 1]) < 1e-6
        log_variance = diffusion.log_variance(v, i)
        assert relative(log_variance, GOLDEN[f"{prefix}.log_variance"][b : b + 1]) < 1e-6
        noise = GOLDEN["step.ddpm_noise"][b : b + 1]
        sample = diffusion.step(x, eps, v, i, noise, clip=clip)
        assert relative(sample, GOLDEN[f"{prefix}.ddpm_sample"][b : b + 1]) < 1e-6
        for eta in (0.0, 0.5, 1.0):
            noise = GOLDEN["step.ddim_noise"][b : b + 1]
            sample = diffusion.step(x, eps, v, i, noise, ddim_eta=eta, clip=clip)
            assert relative(sample, GOLDEN[f"{prefix}.ddim_eta{eta}_sample"][b : b + 1]) < 2e-6


def test_sections():
    assert respace(1000, "10,20") == respace(500, 10) + [500 + t for t in respace(500, 20)]
    assert respace(1000, 1) == [0]


@pytest.mark.parametrize("spec", [0, -3, 1001, "ten", "ddim7000", "ddim999", "600,600"])
def test_bad_steps(spec):
    with pytest.raises(RestoreError, match="^steps must"):
        respace(1000, spec)


def test_noise_depends_only_on_its_key():
    keys = [(0, "a", 0), (0, "b", 0), (1, "a", 0), (0, "a", 1)]
    together = ImageNoise(keys)(3, (4, 2, 5, 5))
    for i, key in enumerate(keys):
        assert torch.equal(ImageNoise([key])(3, (1, 2, 5, 5))[0], together[i])
    flat = together.flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(4)).abs().max() < 0.6  # 50 numbers each: independent, not equal
    noise = ImageNoise(keys[:1])
    draws = {(k, kind): noise(k, (1, 500), kind) for k in (0, 1) for kind in ("start", "latent")}
    values = list(draws.values())
    for i in range(4):
        for j in range(i):
            assert abs(float((values[i] * values[j]).mean())) < 0.2
    assert derive_seed(0, "a", 0) != derive_seed(0, "a0") and derive_seed(0) >= 0
    with pytest.raises(ValueError):
        noise(0, (2, 3))
