"""Every kind of training: an interrupted run equals an undisturbed one, cards, refusals; latents."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, LDMPipeline
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from tiny_training import TINY, config, falls, rows, smooth

import operators
import restore
from restore.backbones.autoencoder import load_vae
from restore.guidance import PAG
from restore.paths import configs_dir, data_dir
from restore.training import load_training_config, train
from restore.training.card import format_card, write_card
from restore.training.diffusion import build_unet
from restore.training.train import INTERVALS


def test_a_latent_prior_learns_and_restores(latent, autoencoder):
    folder, out = latent
    assert falls(out, "eps_loss") and (out / "samples" / "0000024.png").is_file()
    cache = load_file(out / "latents.safetensors")
    assert cache["training"].shape == (27, 4, 16, 16) and cache["held_out"].shape == (3, 4, 16, 16)
    restorer = restore.load(folder, device="cpu")
    vae = restorer.backbone.vae
    assert vae.config.scaling_factor == pytest.approx(1 / float(cache["training"].float().std()))
    # The autoencoder inside is the one it was trained with, and diffusers' pipeline reads the whole.
    given = load_vae(autoencoder[0]).state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in vae.state_dict().items())
    assert LDMPipeline.from_pretrained(folder).scheduler.config.prediction_type == "v_prediction"
    A = operators.SuperResolution(2, noise=operators.GaussianNoise(0.05))
    y = A.A(torch.rand(1, 3, 32, 32) * 2 - 1)
    result = restorer(y, A, sampler="psld", steps=4, eta=0.1, gamma=0.01, guidance=PAG(1.0, layers="m1"))
    assert torch.isfinite(result.samples).all() and result.samples.shape == (1, 1, 3, 32, 32)


@pytest.mark.parametrize("kind", TINY)
def test_interrupted_training_equals_undisturbed_training(kind, folders, autoencoder, tmp_path):
    more = {"latent": [f"autoencoder={autoencoder[0]}"], "autoencoder": ["discriminator.start=1"]}.get(kind, [])
    more += ["samples_every_steps=100", "held_out_every_steps=100", "discriminator.channels=8"][
        : 3 - (kind != "autoencoder")
    ]
    whole = train(config(kind, folders, tmp_path / "whole", "steps=4", *more))
    train(config(kind, folders, tmp_path / "parts", "steps=2", *more))
    parts = train(config(kind, folders, tmp_path / "parts", "steps=4", *more))
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert files and all((whole / file).read_bytes() == (parts / file).read_bytes() for file in files)
    short = train(config(kind, folders, tmp_path / "short", "steps=2", *more))
    assert any((whole / file).read_bytes() != (short / file).read_bytes() for file in files)


def test_a_run_that_is_out_of_time_ends_with_a_checkpoint(folders, tmp_path):
    train(config("autoencoder", folders, tmp_path, "minutes=0", "steps=100"))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 0 and (tmp_path / "ema" / "config.json").is_file()
    assert not (tmp_path / "log.jsonl").exists()


def test_the_shipped_networks_are_small_enough_for_the_repository():
    shapes = {
        name: OmegaConf.to_container(OmegaConf.load(configs_dir() / "train" / f"{name}.yaml").model) for name in TINY
    }
    with torch.device("meta"):
        vae = AutoencoderKL(**shapes["autoencoder"])
        unet = build_unet(OmegaConf.create({"model": shapes["latent"], "init": None}))
    total = sum(p.numel() for network in (vae, unet) for p in network.parameters())
    assert 15e6 < total < 20e6  # 40 MB as fp16
    side = shapes["autoencoder"]["sample_size"] >> (len(shapes["autoencoder"]["block_out_channels"]) - 1)
    assert side == shapes["latent"]["sample_size"]
    assert shapes["latent"]["in_channels"] == shapes["autoencoder"]["latent_channels"]


def test_cards_of_every_kind(autoencoder, latent, classes, folders, tmp_path):
    cards = {
        "autoencoder": (autoencoder, [f"card.folders=[{folders / 'faces'}]"]),
        "latent": (latent, [f"autoencoder={autoencoder[0]}"]),
        "prior-v2": (classes, []),
    }
    for kind, ((weights, out), more) in cards.items():
        settings = config(kind, folders, out, *more)
        card = write_card(settings, weights, tmp_path / kind, samples=4, steps=3)
        assert json.loads((tmp_path / kind / "card.json").read_text()) == json.loads(json.dumps(card))
        assert (tmp_path / kind / ("pairs.png" if kind == "autoencoder" else "samples.png")).is_file()
        text = format_card(card)
        if kind != "prior-v2":
            assert 5 < card["reconstruction"]["held-out images"]["psnr"] < 60 and "reconstruction" in text
        if kind != "autoencoder":
            losses = card["held_out_eps_mse"]
            baselines = [name for name in losses if name.startswith("Wiener")]
            assert len(baselines) == (2 if kind == "prior-v2" else 1)
            of_all = {f"mean image of all, {label}" for label in ("face", "photo")}
            assert of_all & set(losses) == (of_all if kind == "prior-v2" else set())
            assert all(0 < value < 1.1 for name in baselines for value in losses[name])
            assert card["nearest_training_image"]["samples"]["min"] > 0 and "noise / signal" in text
    assert card["held_out_images"] == {"face": 3, "photo": 4} and "model, photo without label" in text


def test_refusals(folders, autoencoder, tmp_path):
    with pytest.raises(restore.RestoreError, match="autoencoder must be the folder of a trained one.*nowhere"):
        train(config("latent", folders, tmp_path, "autoencoder=nowhere"))
    with pytest.raises(restore.RestoreError, match="model.in_channels must be 4.*got 8"):
        train(config("latent", folders, tmp_path, f"autoencoder={autoencoder[0]}", "model.in_channels=8"))
    with pytest.raises(restore.RestoreError, match="unknown kind.*did you mean 'latents'"):
        config("latent", folders, tmp_path, "kind=latent", f"autoencoder={autoencoder[0]}")
    with pytest.raises(restore.RestoreError, match="leaves autoencoder open; give autoencoder="):
        config("latent", folders, tmp_path)
    for crop in (15, 0, 64):
        with pytest.raises(restore.RestoreError, match=f"crop must be a multiple of 2 and at most 32, got crop={crop}"):
            train(config("autoencoder", folders, tmp_path, f"crop={crop}"))
    with pytest.raises(restore.RestoreError, match="has no key"):
        config("latent", folders, tmp_path, "autoencoder=x", "crop=16")
    with pytest.raises(restore.RestoreError, match="must have the shapes"):
        train(config("autoencoder", folders, tmp_path, f"init={autoencoder[0]}", "model.latent_channels=6"))


@pytest.mark.parametrize("key", [*INTERVALS, "optimizer.warmup_steps"])
def test_intervals_are_whole_numbers(folders, tmp_path, key):
    least = 0 if key == "optimizer.warmup_steps" else 1
    for value in (least - 1, 2.5):
        with pytest.raises(restore.RestoreError, match=f"^{key} must be an integer of at least {least}, got {value}$"):
            config("autoencoder", folders, tmp_path, f"{key}={value}")


def test_training_without_warm_up_and_without_images(folders, tmp_path):
    train(config("autoencoder", folders, tmp_path, "steps=1", "optimizer.warmup_steps=0"))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(4e-4)
    (tmp_path / "one").mkdir()
    shutil.copy(folders / "faces" / "00.png", tmp_path / "one")
    for more in ([f"data.folder={tmp_path / 'one'}"], ["data.held_out_every=1"]):
        with pytest.raises(restore.RestoreError, match="must have images to train on, but all .* are held out"):
            train(config("autoencoder", folders, tmp_path / "out", *more))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY)
def test_the_shipped_configurations_train_and_resume(kind, folders, tmp_path):
    """The networks in their true size, a few steps in two parts, on images of the size they want."""
    rng = np.random.default_rng(1)
    (tmp_path / "images").mkdir()
    for i in range(21):
        Image.fromarray(smooth(rng, 128, 128)).save(tmp_path / "images" / f"{i:02d}.png")
    quick = ["batch=4", "log_every=1", "held_out_every_steps=3", "samples_every_steps=100", f"out={tmp_path / 'run'}"]
    where = [f"data.folder={tmp_path / 'images'}"]
    if kind == "prior-v2":
        where = [f"data.sets.{name}.folder={tmp_path / 'images'}" for name in ("faces", "flowers", "photos")]
        where += [f"init={data_dir() / 'embedded'}", "data.sets.photos.crops=4"]
    if kind == "latent":
        AutoencoderKL(
            **OmegaConf.to_container(OmegaConf.load(configs_dir() / "train" / "autoencoder.yaml").model)
        ).save_pretrained(tmp_path / "vae")
        where += [f"autoencoder={tmp_path / 'vae'}", "data.copies=2"]
    yaml = configs_dir() / "train" / f"{kind}.yaml"
    train(load_training_config(yaml, [*quick, *where, "steps=2"]))
    folder = train(load_training_config(yaml, [*quick, *where, "steps=3"]))
    log = rows(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3] and len(rows(tmp_path / "run" / "held_out.jsonl")) == 1
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert size < 42e6
    if kind != "autoencoder":
        side = 64 if kind == "prior-v2" else 128
        assert restore.load(folder, device="cpu").generate(1, steps=2).shape == (1, 3, side, side)
