"""Pipelines of pixels that diffusers wrote, as priors: their own noise levels, for every type of prediction."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, ScoreSdeVeScheduler, UNet2DModel, VQModel
from safetensors.torch import load_file, save_file

from operators import RestoreError
from restore import zoo
from restore.backbones.adm import ADM

BLOCKS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
LEARNED = {"variance_type": "learned_range"}


def network(**changes):
    torch.manual_seed(0)
    config = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, **BLOCKS}
    return UNet2DModel(**config | changes).eval()


def save(folder, scheduler, **changes):
    DDPMPipeline(network(**changes), scheduler).save_pretrained(folder)
    return folder


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_x0_is_what_diffusers_own_scheduler_makes_of_the_output(tmp_path, kind, schedule):
    scheduler = DDPMScheduler(prediction_type=kind, beta_schedule=schedule, clip_sample=False, beta_end=0.015)
    found, model = zoo.load_backbone(save(tmp_path, scheduler))
    assert (found.kind, model.resolution, model.channels, model.downscale) == ("adm", 16, 3, 1)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for t in (3, 500, 950):
        with torch.no_grad():
            output = network()(x, t).sample
            prediction = model.predict(x, t)
        expected = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0)).pred_original_sample
        assert relative(prediction.x0, expected) < 1e-4
        alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
        assert relative(alpha * prediction.x0 + sigma * prediction.eps, x) < 1e-5
        assert torch.equal(prediction.eps, output) == (kind == "epsilon")
    assert model.predict(x, 3).variance is None
    assert torch.equal(model.encode(x), x) and torch.equal(model.decode(x), x) and model.encode_prompt is None


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_the_learned_variance_is_no_part_of_what_is_converted(tmp_path, kind):
    model = ADM.load(save(tmp_path, DDPMScheduler(prediction_type=kind, **LEARNED), out_channels=6))
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        output, prediction = network(out_channels=6)(x, 400).sample, model.predict(x, 400)
    a, s = model.schedule.alpha(400), model.schedule.sigma(400)
    x0 = output[:, :3] if kind == "sample" else a * x - s * output[:, :3]
    assert torch.equal(prediction.variance, output[:, 3:]) and relative(prediction.x0, x0) < 1e-5


def test_times_between_the_tables(tmp_path):
    """A network that gives its timestep back: nothing is truncated on the way, and every image has its own."""
    model = ADM.load(save(tmp_path, DDPMScheduler()))
    seen = []
    model.network.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        middle = model.predict(x, 400.25)
        both = model.predict(x, torch.tensor([400.25, 17.0]))
        other = model.predict(x, 17)
    assert seen == [[400.25] * 2, [400.25, 17.0], [17.0, 17.0]]
    assert relative(both.x0[:1], middle.x0[:1]) < 1e-5 and relative(both.x0[1:], other.x0[1:]) < 1e-5
    low, high = model.schedule.alphas_cumprod[401], model.schedule.alphas_cumprod[400]
    assert low < model.schedule.alpha(400.25) ** 2 < high
    for t in (-0.5, 999.5, math.nan, torch.tensor([1.0, 1000.0])):
        with pytest.raises(RestoreError, match="0 to 999"):
            model.predict(x, t)


def test_a_pipelines_own_schedule_survives_saving_and_can_be_overruled(tmp_path):
    scheduler = DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear", num_train_timesteps=400)
    model = ADM.load(save(tmp_path / "pipeline", scheduler))
    model.save(tmp_path / "saved")
    again = ADM.load(tmp_path / "saved")
    assert torch.equal(again.schedule.alphas_cumprod, model.schedule.alphas_cumprod) and len(again.schedule) == 400
    assert again.prediction_type == "v_prediction"
    other = ADM.load(tmp_path / "saved", schedule="cosine", prediction_type="epsilon")
    assert len(other.schedule) == 1000 and other.prediction_type == "epsilon"


def test_pipelines_of_the_hubs_first_days(tmp_path):
    """Parts side by side and attention weights by their former names, which diffusers itself still reads."""
    scheduler = DDPMScheduler(beta_end=0.01)
    folder = save(tmp_path / "new", scheduler)
    old = tmp_path / "old"
    shutil.copytree(folder / "unet", old)
    shutil.copy(folder / "model_index.json", old)
    shutil.copy(folder / "scheduler" / "scheduler_config.json", old)
    path = old / "diffusion_pytorch_model.safetensors"
    state, names = load_file(path), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in state.items():
        for new, former in names.items():
            name = name.replace(f".{new}.", f".{former}.")
        renamed[name] = tensor.clone()
    assert len(renamed.keys() - state.keys()) == 8 * sum("group_norm.weight" in name for name in state)
    save_file(renamed, path, metadata={"format": "pt"})
    x = torch.randn(1, 3, 16, 16)
    theirs = UNet2DModel.from_pretrained(old).eval()
    found, model = zoo.load_backbone(old)
    with torch.no_grad():
        eps = model.predict(x, 700).eps
        assert relative(eps, theirs(x, 700).sample) < 1e-6
        assert torch.equal(eps, ADM.load(folder).predict(x, 700).eps)
    assert found.kind == "adm" and float(model.schedule.alphas_cumprod[0]) == pytest.approx(1 - 1e-4)


def test_folders_without_a_pixel_ddpm_are_refused(tmp_path):
    folder = save(tmp_path / "zero", DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    with pytest.raises(RestoreError, match="zero terminal SNR"):
        ADM.load(folder)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(RestoreError, match="no scheduler/scheduler_config.json: the noise levels"):
        ADM.load(folder)
    ScoreSdeVeScheduler().save_pretrained(folder / "scheduler")
    with pytest.raises(RestoreError, match="ScoreSdeVeScheduler.*noise levels are not known"):
        ADM.load(folder)
    fourier = save(tmp_path / "fourier", DDPMScheduler(), time_embedding_type="fourier")
    with pytest.raises(RestoreError, match="must be a DDPM"):
        ADM.load(fourier)
    latent = tmp_path / "latent"
    LDMPipeline(VQModel(), network(), DDIMScheduler()).save_pretrained(latent)
    with pytest.raises(RestoreError, match="diffusion model of pixels, got a LDMPipeline"):
        ADM.load(latent)
    config = folder / "unet" / "config.json"
    DDPMScheduler().save_pretrained(folder / "scheduler")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"block_out_channels": [32, 64, 64]}))
    with pytest.raises(RestoreError, match="network that cannot be built"):
        ADM.load(folder)
