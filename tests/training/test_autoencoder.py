"""Training autoencoders: whole images, crops, only the decoder, the discriminator."""

from __future__ import annotations

import shutil

import numpy as np
import torch
from diffusers import AutoencoderKL
from tiny_training import config, falls, rows

import restore
from restore.backbones.autoencoder import load_vae
from restore.training import train
from restore.training.autoencoder import Autoencoder, PatchDiscriminator, measure_reconstruction


def test_an_autoencoder_learns_and_is_one_of_diffusers(autoencoder, folders):
    folder, out = autoencoder
    assert falls(out, "l1") and {"kl", "l1", "images_per_second", "step"} == set(rows(out / "log.jsonl")[0])
    psnrs = [row["reconstruction"]["psnr"] for row in rows(out / "held_out.jsonl")]
    assert psnrs[-1] > psnrs[0] + 0.5 and (out / "samples" / "0000024.png").is_file()
    vae = AutoencoderKL.from_pretrained(folder)
    assert torch.equal(vae.decoder.conv_in.weight, load_vae(folder).decoder.conv_in.weight)


def test_an_autoencoder_learns_from_crops_of_its_images(folders, tmp_path):
    settings = config("autoencoder", folders, tmp_path, "crop=16", "batch=6")
    kind, seen = Autoencoder(settings, torch.device("cpu")), []

    def forward(x, noise):
        seen.append((x, noise.shape))
        return x, noise, noise

    _, logged, _ = kind.loss(forward, 3, torch.Generator().manual_seed(0))
    whole, _ = kind.source.batch(3, torch.Generator().manual_seed(0))
    ((x, latent),) = seen
    assert x.shape == (6, 3, 16, 16) and latent == (6, 4, 8, 8) and logged["l1"] == 0
    # Each is a crop of its own image, at different positions.
    windows = whole.unfold(2, 16, 1).unfold(3, 16, 1)  # (6, 3, 17, 17, 16, 16)
    found = (windows == x[:, :, None, None]).flatten(-2).all(-1).all(1).nonzero()
    assert set(found[:, 0].tolist()) == set(range(6)) and len({tuple(row) for row in found[:, 1:].tolist()}) > 2


def assert_only_the_decoder_learned(before, after):
    """The encoder keeps its bits and every weight of the decoder moves; the bias of the attention's keys need not: the
    softmax takes no notice of it, so that its gradient is rounding error, and zero on some machines."""
    start, end = before.state_dict(), after.state_dict()
    same = {name for name, tensor in start.items() if torch.equal(tensor, end[name])}
    encoder = {name for name in start if name.startswith(("encoder.", "quant_conv."))}
    assert encoder <= same
    assert {name for name in same - encoder if not name.endswith("attentions.0.to_k.bias")} == set()


def test_a_decoder_is_trained_further_on_the_same_latents(folders, autoencoder, latent, tmp_path):
    """A prior trained on them stays valid: the encoder's weights keep their bits, the decoder gets better, and the
    prior takes it without encoding anything again."""
    start, more = autoencoder[0], ["frozen_encoder=true", "steps=60", "optimizer.lr=2e-3", "optimizer.weight_decay=0.1"]
    settings = config("autoencoder", folders, tmp_path, f"init={start}", *more)
    before, after = load_vae(start), load_vae(train(settings))
    assert_only_the_decoder_learned(before, after)
    held_out = Autoencoder(settings, torch.device("cpu")).source.held_out[""]
    first, last = (measure_reconstruction(vae, held_out, "cpu", None)["psnr"] for vae in (before, after))
    assert last > first + 0.2
    shutil.copytree(latent[1], tmp_path / "latent")
    encoded = tmp_path / "latent" / "latents.safetensors"
    written = encoded.stat().st_mtime_ns
    folder = train(config("latent", folders, tmp_path / "latent", f"autoencoder={tmp_path / 'ema'}", "steps=24"))
    assert encoded.stat().st_mtime_ns == written
    new, old = (restore.load(path, device="cpu").backbone for path in (folder, latent[0]))
    assert torch.equal(new.vae.decoder.conv_in.weight, after.decoder.conv_in.weight)
    assert new.vae.config.scaling_factor == old.vae.config.scaling_factor
    assert all(torch.equal(a, b) for a, b in zip(new.network.parameters(), old.network.parameters(), strict=True))


def test_an_encoder_frozen_on_the_way_keeps_its_average(folders, tmp_path):
    """Latents were encoded with the average; the live weights are discarded."""
    quiet = ["samples_every_steps=100", "held_out_every_steps=100", "optimizer.lr=2e-3"]
    before = load_vae(train(config("autoencoder", folders, tmp_path, "steps=6", *quiet)))
    after = load_vae(train(config("autoencoder", folders, tmp_path, "steps=9", "frozen_encoder=true", *quiet)))
    assert_only_the_decoder_learned(before, after)


def test_the_discriminator_starts_when_it_is_enabled(folders, tmp_path):
    quiet = ["samples_every_steps=100", "held_out_every_steps=100", "discriminator.channels=8"]
    train(config("autoencoder", folders, tmp_path, "steps=2", *quiet))
    train(config("autoencoder", folders, tmp_path, "steps=5", "discriminator.start=3", *quiet))
    log = rows(tmp_path / "log.jsonl")
    assert ["judging" in row for row in log] == [False] * 3 + [True] * 2
    assert all(np.isfinite(row["judging"] + row["fooling"]) for row in log[3:])
    score = PatchDiscriminator(8)(torch.zeros(1, 3, 128, 96))
    assert score.shape == (1, 1, 14, 10)
