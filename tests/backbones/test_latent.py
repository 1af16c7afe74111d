"""Latent diffusion from diffusers' LDMPipeline folders and from CompVis checkpoints."""

from __future__ import annotations

import io
import json
import os

import pytest
import torch
from backbones.test_adm_weights import interpret, make_state
from diffusers import LDMPipeline
from safetensors.torch import load_file, save_file
from tiny_ldm import (
    AUTOENCODERS,
    interpret_decoder,
    interpret_encoder,
    ldm_autoencoder,
    save_ldm,
    tiny_autoencoder,
    tiny_unet,
    trainers_callbacks,
)

import operators
import restore
from operators import RestoreError
from restore import zoo
from restore.backbones import ldm_weights
from restore.backbones.autoencoder import load_vae
from restore.backbones.base import Backbone
from restore.backbones.latent import LatentDiffusion
from restore.backbones.sizes import Sized
from restore.guidance import CFG, PAG

KINDS = tuple(AUTOENCODERS)


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("ldm")
    return {kind: save_ldm(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def image():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_the_pipelines_own_networks(folders, image, kind):
    pipe = LDMPipeline.from_pretrained(folders[kind])
    found, model = zoo.load_backbone(folders[kind])
    assert found.kind == "latent" and isinstance(model, Backbone)
    assert (model.downscale, model.channels, model.resolution, model.multiple) == (4, 3, 8, 2) and not model.bounded
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(model.predict(z, 401).eps, pipe.unet(z, 401).sample) < 1e-6
        assert relative(model.decode(z), pipe.vqvae.decode(z / pipe.vqvae.config.scaling_factor).sample) < 1e-6
        theirs = pipe.vqvae.encode(image)
        theirs = theirs.latent_dist.mean if kind == "AutoencoderKL" else theirs.latents
        assert relative(model.encode(image), theirs * pipe.vqvae.config.scaling_factor) < 1e-6
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    moved = relative(model.encode(image, noise), model.encode(image))
    assert moved > 1e-2 if kind == "AutoencoderKL" else moved == 0
    assert relative(model.schedule.alphas_cumprod, pipe.scheduler.alphas_cumprod.double()) < 1e-6


def test_the_attention_layers_have_the_names_of_the_u_net(folders):
    restorer = restore.load(folders["VQModel"], device="cpu")
    names = {layer.short: (layer.path, layer.paper) for layer in restorer.backbone.attention.values()}
    assert list(names) == ["i1", "i3", "m1", "o0", "o1", "o2", "o3"]
    assert names["i3"] == ("down_blocks.1.attentions.0", "input_blocks.3.1")
    table = restorer.layer_table()
    assert len(table) == 8 and table[1].split()[-1] == "8" and table[2].split()[-1] == "4"


def test_gradients_pass_the_quantisation_straight_through(folders):
    """As many latent cells as codes: the image is a step function of z, its gradient the decoder's."""
    model = LatentDiffusion.load(folders["VQModel"])
    z = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((weights * model.decode(z)).sum(), z)
    quantised = model.vae.quantize(z)[0].detach().requires_grad_()
    image = model.vae.decode(quantised, force_not_quantize=True).sample
    (expected,) = torch.autograd.grad((weights * image).sum(), quantised)
    assert relative(gradient, expected) < 1e-5
    codes = model.vae.quantize.embedding.weight
    cells = quantised.detach().permute(0, 2, 3, 1).reshape(-1, 3)
    assert torch.cdist(cells, codes).min(1).values.max() < 1e-2  # decoding quantises
    with torch.no_grad():
        assert relative(model.decode(z + 1e-4 * torch.randn_like(z)), model.decode(z)) < 1e-5
        latent = model.encode(image.detach())
        assert torch.cdist(latent.permute(0, 2, 3, 1).reshape(-1, 3), codes).min(1).values.max() > 1e-2  # encoding not


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading(folders, tmp_path, image, kind):
    model = LatentDiffusion.load(folders[kind])
    model.save(tmp_path / "saved")
    again = zoo.load_backbone(tmp_path / "saved")[1]
    z = model.encode(image)
    assert torch.equal(again.encode(image), z) and torch.equal(again.decode(z), model.decode(z))
    assert torch.equal(again.predict(z, 401).eps, model.predict(z, 401).eps)
    pipe = LDMPipeline.from_pretrained(tmp_path / "saved")
    assert relative(model.schedule.alphas_cumprod, pipe.scheduler.alphas_cumprod.double()) < 1e-6
    model.save(tmp_path / "half", dtype="fp16")
    assert relative(LatentDiffusion.load(tmp_path / "half").decode(z), model.decode(z)) < 2e-2


def test_defaults_of_the_published_folder(folders, tmp_path):
    """Its VQModel was trained on unscaled latents, before diffusers' config knew a scaling factor, its attention had
    other names, and its weights may be pickles."""
    folder = save_ldm(tmp_path / "old")
    config = folder / "vqvae" / "config.json"
    content = json.loads(config.read_text())
    content.pop("scaling_factor")
    config.write_text(json.dumps(content))
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for part in ("unet", "vqvae"):
        path = folder / part / "diffusion_pytorch_model.safetensors"
        state = {}
        for name, tensor in load_file(path).items():
            for new, old in former.items():
                name = name.replace(f".{new}.", f".{old}.")
            state[name] = tensor
        torch.save(state, path.with_suffix(".bin"))
        path.unlink()
    old, new = LatentDiffusion.load(folder), LatentDiffusion.load(folders["VQModel"])
    assert old.vae.config.scaling_factor == 1.0
    z = torch.randn(1, 3, 8, 8)
    assert torch.equal(old.predict(z, 401).eps, new.predict(z, 401).eps) and torch.equal(old.decode(z), new.decode(z))


def test_class_conditional_latents(tmp_path):
    folder = save_ldm(tmp_path / "classes", "AutoencoderKL", {"num_class_embeds": 3})
    (folder / "unet" / "restore.json").write_text(json.dumps({"null_class": 2, "labels": ["cat", "dog"]}))
    restorer = restore.load(folder, device="cpu")
    model, z = restorer.backbone, torch.randn(1, 3, 8, 8)
    assert torch.equal(model.predict(z, 10).eps, model.predict(z, 10, 2).eps)
    assert relative(model.predict(z, 10, 0).eps, model.predict(z, 10, 1).eps) > 1e-3
    kwargs = {"steps": 3, "guidance": CFG(1.0), "ddim_eta": 0.0}
    by_name = restorer.generate(2, labels=["dog", "cat"], **kwargs)
    assert torch.equal(by_name, restorer.generate(2, labels=[1, 0], **kwargs))
    assert not torch.equal(by_name[0], by_name[1])
    model.save(tmp_path / "saved")
    assert LatentDiffusion.load(tmp_path / "saved").labels == ("cat", "dog")


def test_sizes_pad_to_cells_and_windows(folders):
    model = LatentDiffusion.load(folders["AutoencoderKL"])
    prior = Sized(model, 37, 70)
    assert prior.shape == (3, 10, 18)  # multiples of 2 cells of 4 pixels
    z = torch.randn(1, *prior.shape)
    with torch.no_grad():
        assert prior.decode(z).shape == (1, 3, 37, 70) and prior.encode(torch.zeros(1, 3, 37, 70)).shape == z.shape
        assert prior.predict(z, 401).eps.shape == z.shape


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_stays_close(folders, image, kind):
    model, low = (LatentDiffusion.load(folders[kind], dtype=d) for d in ("fp32", "bf16"))
    z = model.encode(image)
    assert 0 < relative(low.predict(z, 401).eps, model.predict(z, 401).eps) < 0.05
    assert 0 < relative(low.decode(z), model.decode(z)) < 0.05 and low.decode(z).dtype == torch.float32
    assert 0 < relative(low.encode(image), z) < 0.05
    half = LatentDiffusion.load(folders[kind], dtype="fp16")
    assert half.vae_dtype == torch.float32 and torch.equal(half.decode(z), model.decode(z))


SETTINGS = {
    "psld": {"steps": 4, "eta": 0.1, "gamma": 0.01},
    "psld-without-glue": {"steps": 4, "eta": 0.1, "gamma": 0.0},
    "resample": {"steps": 4, "every": 1, "travel": 1, "pixel_iterations": 2, "latent_iterations": 3},
    "daps": {"steps": 2, "ode_steps": 2, "mcmc_steps": 3, "sigma_max": 10.0, "lr": 1e-5, "tau": 0.1},
    "reddiff": {"steps": 4},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SETTINGS)
def test_latent_samplers_run(folders, image, kind, case):
    restorer = restore.load(folders[kind], device="cpu")
    A = operators.SuperResolution(4, noise=operators.GaussianNoise(0.05))
    y, settings = A.A(image[:1]), dict(SETTINGS[case])
    sampler = case.split("-")[0]
    guidance = PAG(1.0, layers="m1") if sampler in ("psld", "resample", "daps") else None
    result = restorer(y, A, sampler=sampler, guidance=guidance, seed=1, **settings)
    assert result.samples.shape == (1, 1, 3, 32, 32) and torch.isfinite(result.samples).all()
    assert result.nfe > 0 and float(result.residual[0, 0]) > 0


def checkpoint(codes=16, ema=True, **more):
    """A CompVis file, and the U-Net's tensors that count."""
    unet = make_state(64, (1, 2), 1, {1}, updown=False, scale_shift=False, out=3)
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
    if ema:
        averaged = make_state(64, (1, 2), 1, {1}, updown=False, scale_shift=False, out=3, seed=9)
        state |= {"model_ema.diffusion_model" + name.replace(".", ""): tensor for name, tensor in averaged.items()}
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
        unet = averaged
    first = ldm_autoencoder(codes=codes)
    state |= {f"first_stage_model.{name}": tensor for name, tensor in first.items()}
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    state |= {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas, 0).float()}
    return {"state_dict": state | more, "global_step": 5}, unet, first


@pytest.mark.parametrize("codes", [16, None])
def test_a_compvis_checkpoint_is_the_network_its_layout_describes(tmp_path, image, codes):
    content, unet, first = checkpoint(codes, scale_factor=torch.tensor(0.3))
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(RestoreError, match="heads=NUMBER.*attention_order=legacy or new; prediction_type") as refusal:
        zoo.load_backbone(tmp_path / "model.ckpt")
    assert "schedule=" not in str(refusal.value) and "scale_factor=" not in str(refusal.value)  # the file tells them
    options = {"head_channels": 32, "attention_order": "legacy", "prediction_type": "epsilon"}
    found, model = zoo.load_backbone(tmp_path / "model.ckpt", options=options)
    assert found.kind == "latent" and model.downscale == 2 and model.vae.config.scaling_factor == pytest.approx(0.3)
    z, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([401.0, 401.0])
    expected = interpret(unet, z, t, None, lambda c: c // 32, "legacy")
    with torch.no_grad():
        assert relative(model.predict(z, 401).eps, expected) < 1e-5
        latent = interpret_encoder(first, image)
        assert relative(model.encode(image), 0.3 * latent[:, :3]) < 1e-5
        assert relative(model.decode(z), interpret_decoder(first, z / 0.3)) < 1e-5
        if codes is None:
            moved = (model.encode(image, torch.ones(2, 3, 16, 16)) - model.encode(image)) / 0.3
            assert relative(moved, (latent[:, 3:] / 2).exp()) < 1e-5
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    assert relative(model.schedule.alphas_cumprod, torch.cumprod(1 - betas, 0)) < 1e-6
    plain = LatentDiffusion.load(tmp_path / "model.ckpt", ema=False)
    assert relative(plain.predict(z, 401).eps, expected) > 0.1


def test_a_compvis_checkpoint_without_its_buffers_asks_for_them_too(tmp_path):
    content, *_ = checkpoint()
    state = {k: v for k, v in content["state_dict"].items() if k not in ("betas", "alphas_cumprod")}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    options = {"head_channels": 32, "attention_order": "legacy", "prediction_type": "v_prediction"}
    with pytest.raises(RestoreError, match="give schedule=.*; scale_factor="):
        zoo.load_backbone(tmp_path / "model.ckpt", options=options)
    options |= {"schedule": "linear", "scale_factor": 0.2}
    model = zoo.load_backbone(tmp_path / "model.ckpt", options=options)[1]
    assert model.prediction_type == "v_prediction" and model.vae.config.scaling_factor == 0.2
    assert float(model.schedule.alphas_cumprod[0]) == pytest.approx(1 - 1e-4)
    state.pop(next(name for name in state if name.startswith("model_ema.diffusion_model")))
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    with pytest.raises(RestoreError, match="all averaged weights.*ema=False"):
        zoo.load_backbone(tmp_path / "model.ckpt", options=options)


def test_every_tensor_of_the_published_first_stage_has_its_place():
    """vq-f4, by the shapes of its configuration (ffhq-ldm-vq-4.yaml): ch 128, multipliers 1, 2, 4, two blocks."""
    state = ldm_autoencoder(128, (1, 2, 4), 2, 3, codes=8192, attended=(False,) * 3)
    cls, config = ldm_weights.infer_autoencoder(state, "model.ckpt")
    with torch.device("meta"):
        targets = cls(**config).state_dict()
    renamed = {ldm_weights.rename_tensor(name, 3) for name in state}
    assert len(renamed) == len(state) and renamed == set(targets)
    assert config["block_out_channels"] == [128, 256, 512] and config["vq_embed_dim"] == 3
    assert sum(tensor.numel() for tensor in state.values()) == 55_322_782  # the paper's 55.3 M (Table 8)


class Code:
    def __reduce__(self):
        return os.mkdir, (os.environ["RESTORE_TEST_PAYLOAD"],)


def test_wrong_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RESTORE_TEST_PAYLOAD", str(tmp_path / "ran"))
    content, *_ = checkpoint()
    state = content["state_dict"]
    cases = {
        "lacks": (
            {k: v for k, v in state.items() if k != "first_stage_model.decoder.conv_in.bias"},
            "[Mm]issing.*decoder.conv_in.bias",
        ),
        "other": (state | {"first_stage_model.encoder.extra.weight": torch.zeros(1)}, "[Uu]nexpected.*extra.weight"),
        "unet": (state | {"model.diffusion_model.extra.weight": torch.zeros(1)}, "1 unexpected"),
        "text": (state | {"cond_stage_model.weight": torch.zeros(1)}, "conditional model"),
        "empty": ({"weight": torch.zeros(1)}, "latent-diffusion checkpoint"),
        "code": (state | {"hook": Code()}, "asks to run code"),
    }
    for name, (tensors, message) in cases.items():
        torch.save({"state_dict": tensors}, tmp_path / f"{name}.ckpt")
        with pytest.raises(RestoreError, match=message):
            LatentDiffusion.load(tmp_path / f"{name}.ckpt", ema=name != "unet")
    assert not (tmp_path / "ran").exists()
    assert zoo.locate(tmp_path / "text.ckpt").kind == "stable-diffusion"


def test_a_checkpoint_with_the_trainers_callbacks_is_read(tmp_path, monkeypatch):
    """The published files name a class of the training library; nothing of it is imported."""
    content, *_ = checkpoint(ema=False)
    with trainers_callbacks(monkeypatch) as callbacks:
        buffer = io.BytesIO()
        torch.save({**content, "callbacks": callbacks}, buffer)
    (tmp_path / "model.ckpt").write_bytes(buffer.getvalue())
    assert b"pytorch_lightning" in buffer.getvalue()
    assert LatentDiffusion.load(tmp_path / "model.ckpt").channels == 3


def test_wrong_folders_are_refused(tmp_path, folders):
    folder = save_ldm(tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    path = folder / "vqvae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({k: v for k, v in state.items() if k != "decoder.conv_in.bias"}, path, metadata={"format": "pt"})
    with pytest.raises(RestoreError, match="1 weights are missing .* first decoder.conv_in.bias"):
        zoo.load_backbone(folder)
    tiny_unet(in_channels=4, out_channels=4).save_pretrained(folder / "unet")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(RestoreError, match="latents of 4 channels.*got 3"):
        zoo.load_backbone(folder)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(RestoreError, match="no scheduler/scheduler_config.json"):
        zoo.load_backbone(folder)
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "vqvae"}))
    with pytest.raises(RestoreError, match="must hold a diffusion model of latents"):
        LatentDiffusion.load(folder)
    with pytest.raises(RestoreError, match="no model_index.json"):
        LatentDiffusion.load(folder / "unet")
    with pytest.raises(RestoreError, match="must hold an autoencoder .*, got a UNet2DModel"):
        load_vae(folder / "unet")
    with pytest.raises(RestoreError, match="vae_tiling .*VQModel"):
        restore.load(folders["VQModel"], vae_tiling=True)
    assert restore.load(folders["AutoencoderKL"], vae_tiling=True).backbone.vae.use_tiling
    with pytest.raises(RestoreError, match="heads .*converted model"):
        LatentDiffusion.load(folders["VQModel"], heads=2)


def test_the_published_models_are_registered():
    assert {name: entry.kind for name, entry in zoo.read_registry().items() if name.startswith("ldm")} == {
        "ldm-celebahq-256": "latent",
        "ldm-ffhq-256": "latent",
    }
    assert "unpack model.ckpt" in zoo.explain_download(zoo.find_model("ldm-ffhq-256"))
    assert tiny_autoencoder("VQModel").config.scaling_factor == 1.0
