"""The command line with a Stable Diffusion folder: nothing but --backbone changes for the user."""

import json
import sys

import numpy as np
import pytest
import tiny_sd
import torch
from PIL import Image

import operators
import restore
from restore.app import cli
from restore.images import io, resampling
from restore.paths import data_dir
from restore.samplers.noise import measurement_generator


def run(monkeypatch, capsys, *command):
    """(exit code, stderr) of `restore run ...`."""
    monkeypatch.setattr(sys, "argv", [str(part) for part in ["restore", "run", *command]])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--pag-scale", "2", "--layers", "m1"], {"eta": 1.0, "gamma": 0.1}),
        (["--reference"], {"measurement_noise": True, "encoding": "sample", "index_shift": True}),
        (["gamma=0", "eta=0.5", "--vae-tiling", "--checkpointing"], {"eta": 0.5, "gamma": 0}),
    ],
)
def test_psld_on_a_photo_of_any_size(tmp_path, monkeypatch, capsys, options, expected):
    folder = tiny_sd.save_folder(tmp_path / "model")
    Image.open(data_dir() / "photos" / "coffee-64.png").resize((40, 27)).save(tmp_path / "photo.png")
    command = [tmp_path / "photo.png", "--task", "denoise", "--backbone", folder, "--steps", "2"]
    code, error = run(monkeypatch, capsys, *command, *options, "-o", tmp_path / "out")
    assert code == 0, error
    assert Image.open(tmp_path / "out" / "photo.png").size == (40, 27)
    method = json.loads((tmp_path / "out" / "photo.json").read_text())["protocol"]["method"]
    assert method["sampler"] == "psld" and expected.items() <= method["parameters"].items()


@pytest.mark.parametrize("reference", [False, True])
def test_a_clean_photo_measured_and_solved_at_another_size(tmp_path, monkeypatch, capsys, reference):
    """--degrade --solve-at 32: enlarge, degrade, restore, reduce, and nothing else."""
    folder, photo = tiny_sd.save_folder(tmp_path / "model"), tmp_path / "photo.png"
    Image.open(data_dir() / "photos" / "coffee-64.png").resize((16, 16)).save(photo)
    options = ["--reference"] if reference else []
    command = [photo, "--task", "sr4", "--degrade", "--backbone", folder, "--steps", "2", "--solve-at", "32"]
    code, error = run(monkeypatch, capsys, *command, *options, "-o", tmp_path / "out")
    assert code == 0, error
    sidecar = json.loads((tmp_path / "out" / "photo.json").read_text())
    method = "nearest" if reference else "bicubic"
    assert sidecar["settings"]["resampled"] == {"side": 32, "method": method, "stretch": reference}

    noise = operators.GaussianNoise(0.05)
    A = operators.SuperResolution(4, noise=noise)
    x = resampling.enlarge_image(io.read_image(photo).pixels, 32, method=method, stretch=reference)
    y = A(x, measurement_generator(0, "photo"))
    result = restore.load(folder)(y, A, steps=2, image_ids=["photo"], reference=reference)
    small = resampling.resize_image(result.samples[:, 0], 16, method=method).clamp(-1, 1)
    written = np.asarray(Image.open(tmp_path / "out" / "photo.png"))
    assert np.abs(written.astype(int) - io.to_uint8(small[0]).astype(int)).max() <= 1
    assert written.shape == (16, 16, 3) and 5 < sidecar["psnr"] < 40


def test_a_damaged_photo_solved_at_another_size(tmp_path, monkeypatch, capsys):
    """The measurement is the photo's own: y = A(reduced x), for a mask of the photo's size too."""
    folder, photo, mask = tiny_sd.save_folder(tmp_path / "model"), tmp_path / "photo.png", tmp_path / "mask.png"
    Image.open(data_dir() / "photos" / "coffee-64.png").resize((16, 12)).save(photo)
    hole = np.full((12, 16), 255, np.uint8)
    hole[3:8, 4:9] = 0
    Image.fromarray(hole).save(mask)
    command = [photo, "--task", "inpaint", "--mask", mask, "--backbone", folder, "--steps", "2"]
    code, error = run(monkeypatch, capsys, *command, "--solve-at", "32", "-o", tmp_path / "out")
    assert code == 0, error
    assert Image.open(tmp_path / "out" / "photo.png").size == (16, 12)
    assert "SuperResolution" in json.loads((tmp_path / "out" / "photo.json").read_text())["protocol"]["operator"]

    Image.open(photo).resize((16, 16)).save(tmp_path / "square.png")
    Image.fromarray(np.vstack([hole, hole[:4]])).save(mask)
    command[0] = tmp_path / "square.png"  # (the mask has changed too)
    code, error = run(monkeypatch, capsys, *command, "--degrade", "--solve-at", "32", "-o", tmp_path / "out")
    assert code == 0, error


@pytest.mark.parametrize(
    "options, message",
    [
        (["--solve-at", "50"], "--solve-at must be a multiple of 16, the longer side"),
        (["--solve-at", "0"], "--solve-at must be a number of pixels, got 0"),
        (["--resample", "nearest"], "--resample nearest needs --solve-at"),
        (["--solve-at", "32", "--resample", "lanczos"], "unknown resampling 'lanczos'"),
        (["--solve-at", "32", "--degrade"], "photo.png must be square"),
    ],
)
def test_impossible_sizes(tmp_path, monkeypatch, capsys, options, message):
    folder = tiny_sd.save_folder(tmp_path / "model")
    Image.open(data_dir() / "photos" / "coffee-64.png").resize((16, 12)).save(tmp_path / "photo.png")
    command = [tmp_path / "photo.png", "--task", "denoise", "--backbone", folder, "--steps", "2", *options]
    code, error = run(monkeypatch, capsys, *command, "-o", tmp_path / "out")
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "photo.png").exists()


def test_photos_beyond_the_trained_size_run_in_windows(tmp_path):
    """A latent of 18 x 13 cells with a network trained at 8 x 8: several windows a step, guidance included."""
    restorer = restore.load(tiny_sd.save_folder(tmp_path / "model"))
    calls, predict = [], restorer.backbone.predict

    def counted(z, t, condition=None):
        calls.append(tuple(z.shape))
        return predict(z, t, condition)

    restorer.backbone.predict = counted
    A = operators.Denoising(noise=operators.GaussianNoise(0.05))
    y = torch.randn(1, 3, 72, 50, generator=torch.Generator().manual_seed(0)).tanh()
    result = restorer(y, A, steps=2, guidance=restore.PAG(1.0, layers="m1"))
    assert result.samples.shape == (1, 1, 3, 72, 50) and bool(torch.isfinite(result.samples).all())
    assert result.nfe == 4 and all(shape[0] > 4 and shape[-2:] == (8, 8) for shape in calls)


def test_the_autoencoders_options_reach_it(tmp_path):
    folder = tiny_sd.save_folder(tmp_path / "model")
    vae = restore.load(folder, vae_slicing=True, vae_tiling=True).backbone.vae
    assert vae.use_slicing and vae.use_tiling and not restore.load(folder).backbone.vae.use_tiling
    with pytest.raises(restore.RestoreError, match="vae_tiling must be False for a model of pixels"):
        restore.load("embedded", vae_tiling=True)
