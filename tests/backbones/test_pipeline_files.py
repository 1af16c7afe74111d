"""Loading Stable Diffusion from folders, hub caches and single files written by the real libraries."""

import gc
import json
import pickle
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_ldm import trainers_callbacks
from tiny_sd import SCHEDULER, save_folder, save_single_file, tiny_text_encoder, tiny_vae
from transformers import CLIPTextModel

from operators import RestoreError
from restore.backbones.stable_diffusion import StableDiffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture
def broken(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "broken")


@pytest.fixture(scope="module")
def latent():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_folder_gives_the_pipelines_own_prediction(folder, latent):
    backbone = StableDiffusion.load(folder)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    prompt, empty = pipe.encode_prompt("a cat", "cpu", 1, True, "")
    assert relative(backbone.null_condition, empty) < 1e-6
    assert relative(backbone.encode_prompt("a cat"), prompt) < 1e-6
    with torch.no_grad():
        expected = pipe.unet(latent, 401, encoder_hidden_states=prompt.expand(2, -1, -1)).sample
    assert relative(backbone.predict(latent, 401, backbone.encode_prompt("a cat")).eps, expected) < 1e-6
    alphas = pipe.scheduler.alphas_cumprod
    assert relative(backbone.schedule.alphas_cumprod, alphas.double()) < 1e-6


def test_the_text_encoder_is_read_with_the_first_prompt(folder, tmp_path):
    def encoders():
        gc.collect()
        return sum(type(thing) is CLIPTextModel for thing in gc.get_objects())

    single = save_single_file(tmp_path / "model.safetensors", folder)
    for source, options in ((folder, {}), (single, {"config": folder, "offline": True})):
        before = encoders()
        backbone = StableDiffusion.load(source, **options)
        assert encoders() == before
        first = backbone.encode_prompt("a cat")
        assert first.shape == (1, 12, 16) and torch.equal(backbone.encode_prompt(""), backbone.null_condition)
        assert relative(first, backbone.null_condition) > 1e-3
        assert encoders() == before + 1
        with pytest.raises(RestoreError, match="prompt must be a string, got a list"):
            backbone.encode_prompt(["a cat"])
        del backbone


def test_prediction_type_is_read_from_the_scheduler(broken, latent):
    eps = StableDiffusion.load(broken).predict(latent, 401).eps
    path = broken / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    backbone = StableDiffusion.load(broken)
    a = backbone.schedule.alphas_cumprod[401]
    assert relative(backbone.predict(latent, 401).eps, a.sqrt() * eps + (1 - a).sqrt() * latent) < 1e-6


def test_half_precision_leaves_the_vae_in_float32(folder, latent):
    backbone = StableDiffusion.load(folder, dtype=torch.float16)
    assert backbone.network.dtype == torch.float16 and backbone.vae.dtype == torch.float32
    assert StableDiffusion.load(folder, dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    assert backbone.decode(latent).dtype == torch.float32


def test_a_checkpoint_with_the_trainers_callbacks_is_read(folder, tmp_path, latent, monkeypatch):
    with trainers_callbacks(monkeypatch) as callbacks:
        path = save_single_file(tmp_path / "model.ckpt", folder, callbacks=callbacks)
    single = StableDiffusion.load(path, config=folder, offline=True)
    assert relative(single.decode(latent), StableDiffusion.load(folder).decode(latent)) < 1e-6


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_single_file_is_the_same_model(folder, tmp_path, latent, suffix):
    single = StableDiffusion.load(save_single_file(tmp_path / f"model{suffix}", folder), config=folder, offline=True)
    backbone = StableDiffusion.load(folder)
    assert relative(single.predict(latent, 401).eps, backbone.predict(latent, 401).eps) < 1e-6
    assert relative(single.decode(latent), backbone.decode(latent)) < 1e-6
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    assert relative(single.encode(image), backbone.encode(image)) < 1e-6
    assert relative(single.encode_prompt("a cat"), backbone.encode_prompt("a cat")) < 1e-6
    assert single.prediction_type == "epsilon"


def test_hub_id_is_read_from_the_cache(folder, tmp_path, monkeypatch, latent):
    commit = "0" * 40
    repo = tmp_path / "models--owner--tiny-sd"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    eps = StableDiffusion.load("owner/tiny-sd", offline=True).predict(latent, 401).eps
    assert torch.equal(eps, StableDiffusion.load(folder).predict(latent, 401).eps)
    with pytest.raises(RestoreError, match="owner/other .*not in the local cache"):
        StableDiffusion.load("owner/other", offline=True)


class Code:
    def __reduce__(self):
        return print, ("code ran",)


def test_pickles_with_code_are_refused(tmp_path, capsys):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}, "callback": Code()}, path)
    with pytest.raises(RestoreError, match="asks to run code.*safetensors"):
        StableDiffusion.load(path)
    path.write_bytes(pickle.dumps(Code()))
    with pytest.raises(RestoreError, match="asks to run code|not a readable checkpoint"):
        StableDiffusion.load(path)
    assert "code ran" not in capsys.readouterr().out


def test_wrong_files_are_refused(tmp_path, folder):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(RestoreError, match="could not be read as a Stable Diffusion checkpoint"):
        StableDiffusion.load(path, config=folder, offline=True)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(RestoreError, match="not a readable checkpoint"):
        StableDiffusion.load(path, config=folder, offline=True)
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(RestoreError, match="must be one of .safetensors"):
        StableDiffusion.load(tmp_path / "picture.png")
    with pytest.raises(RestoreError, match="does not exist"):
        StableDiffusion.load(tmp_path / "missing.safetensors")
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(RestoreError, match="truncated, corrupt"):
        StableDiffusion.load(tmp_path / "cut.ckpt")


def test_wrong_folders_are_refused(tmp_path, broken):
    with pytest.raises(RestoreError, match="diffusers' save_pretrained.*model_index.json"):
        StableDiffusion.load(tmp_path)
    index = json.loads((broken / "model_index.json").read_text())
    flux = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (broken / "model_index.json").write_text(json.dumps(flux))
    with pytest.raises(RestoreError, match="StableDiffusionPipeline, got a FluxPipeline"):
        StableDiffusion.load(broken)
    (broken / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(RestoreError, match="StableDiffusionPipeline, got a StableDiffusionXLPipeline"):
        StableDiffusion.load(broken)
    (broken / "model_index.json").write_text("{")
    with pytest.raises(RestoreError, match="cannot be read as JSON"):
        StableDiffusion.load(broken)


def test_missing_parts(broken):
    shutil.move(broken / "text_encoder", broken / "elsewhere")
    with pytest.raises(RestoreError, match="it has no text_encoder;"):
        StableDiffusion.load(broken)
    shutil.move(broken / "elsewhere", broken / "text_encoder")
    shutil.rmtree(broken / "vae")
    with pytest.raises(RestoreError, match="incomplete: it has no vae"):
        StableDiffusion.load(broken)


def test_parts_of_different_models(broken):
    tiny_text_encoder(width=24).save_pretrained(broken / "text_encoder")
    with pytest.raises(RestoreError, match="embeddings must be 16 wide.*got 24"):
        StableDiffusion.load(broken)
    tiny_vae(latent_channels=8).save_pretrained(broken / "vae")
    with pytest.raises(RestoreError, match="."):
        StableDiffusion.load(broken)


@pytest.mark.parametrize("part,file", [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_a_missing_weight_is_fatal(broken, part, file):
    path = broken / part / f"{file}.safetensors"
    state = load_file(path)
    state.pop(sorted(state)[-1])
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(RestoreError, match=f"the {part} in .* weights are missing|the {part} in .* cannot be loaded"):
        StableDiffusion.load(broken)


def test_a_weight_of_another_shape_is_fatal(broken):
    path = broken / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_out_channels": [16, 16, 48]}))
    with pytest.raises(RestoreError, match="the unet in"):
        StableDiffusion.load(broken)
    assert SCHEDULER["beta_schedule"] == "scaled_linear"
