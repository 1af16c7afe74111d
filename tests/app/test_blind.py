"""Photos of which nobody said how noisy they are: each is measured, and what an inpainting knows stays as it is."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from restore.images import io
from restore.images.tint import estimate_tint
from restore.metrics.single import psnr
from restore.paths import data_dir
from restore.task import load_task

PHOTOS = data_dir() / "photos"
FACE = PHOTOS / "astronaut-face-64.png"


def make_noisy(path, sigma: float, side: int = 64):
    clean = io.read_image(FACE).pixels[..., :side, :side]
    io.write_image(path, clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)))
    return clean


def read_sigma(folder, name: str) -> float:
    noise = json.loads((folder / f"{name}.json").read_text())["settings"]["task"]["noise"]
    return 0.0 if noise is None else noise["sigma"]


def test_every_photo_of_a_folder_has_its_own_noise(command, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    levels = {"clean": 0.0, "noisy": 0.1, "worse": 0.3}
    truths = {name: make_noisy(folder / f"{name}.png", sigma) for name, sigma in levels.items()}
    code, _, err = command("run", folder, "--task", "denoise", "--quality", "fast", "-o", out)
    assert code == 0, err
    for name, sigma in levels.items():
        assert read_sigma(out, name) == pytest.approx(sigma, abs=0.045)  # pictures of 64 pixels read too much
    noisy, restored = (psnr(io.read_image(at / "worse.png").pixels, truths["worse"]) for at in (folder, out))
    assert restored > noisy + 7


@pytest.mark.parametrize("task", ["sr2", "gaussian-blur", "motion-blur", "colorize"])
def test_every_task_measures(tmp_path, task):
    make_noisy(tmp_path / "a.png", 0.2)
    sigma = load_task(task, {}, blind=True).for_photo(tmp_path / "a.png").config["noise"]["sigma"]
    assert sigma == pytest.approx(0.2, rel=0.2)


def test_what_was_said_is_kept(tmp_path):
    make_noisy(tmp_path / "a.png", 0.2)
    make_noisy(tmp_path / "tiny.png", 0.2, side=24)
    (tmp_path / "own.yaml").write_text("{name: denoising, noise: {name: gaussian, sigma: 0.5}}")

    def read(task, photo="a.png", degrade=False, **settings):
        return load_task(str(task), settings, blind=True).for_photo(tmp_path / photo, degrade).config["noise"]["sigma"]

    assert read("denoise", sigma=0.3) == 0.3
    assert read(tmp_path / "own.yaml") == 0.5
    assert read("denoise", degrade=True) == 0.05  # that of configs/task
    assert read("denoise", "tiny.png") == 0.05  # too small to measure anything in it


def test_known_pixels_stay_as_they_are(command, tmp_path):
    make_noisy(tmp_path / "a.png", 0.2)
    mask = np.full((64, 64), 255, np.uint8)
    mask[20:30, 20:40] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ("run", tmp_path / "a.png", "--task", "inpaint", "--mask", tmp_path / "mask.png", "--steps", "3")
    code, _, err = command(*arguments, "-o", tmp_path / "kept", "--samples", 2)
    assert code == 0, err
    before = np.asarray(Image.open(tmp_path / "a.png"))
    for name in ("a.png", "a-sample1.png", "a-mean.png"):
        after = np.asarray(Image.open(tmp_path / "kept" / name))
        assert (after[mask == 255] == before[mask == 255]).all() and (after[mask == 0] != before[mask == 0]).any()
    settings = json.loads((tmp_path / "kept" / "a.json").read_text())["settings"]["task"]
    assert settings["keep_known"] and settings["noise"]["sigma"] == pytest.approx(0.2, rel=0.2)
    # The same with the noise asked for by name: it is removed everywhere.
    assert command(*arguments, "sigma=auto", "-o", tmp_path / "removed")[0] == 0
    after = np.asarray(Image.open(tmp_path / "removed" / "a.png"))
    assert (after[mask == 255] != before[mask == 255]).mean() > 0.5


@pytest.mark.parametrize("holes, expected", [("half of the pixels", 0.0), ("lines", 0.1)])
def test_holes_are_not_noise(tmp_path, holes, expected):
    """White pixels that the mask says are missing do not count: the noise is that of blocks without any."""
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    generator = torch.Generator().manual_seed(0)
    known = (
        torch.rand(256, 256, generator=generator) > 0.5 if holes == "half of the pixels" else torch.ones(256, 256) > 0
    )
    if holes == "lines":
        known[::40] = False
    smooth = torch.linspace(-0.5, 0.5, 256).expand(1, 3, 256, 256)
    noisy = smooth + 0.1 * torch.randn(smooth.shape, generator=generator)
    io.write_image(photo, torch.where(known, noisy, 1.0))
    Image.fromarray(known.numpy().astype(np.uint8) * 255).save(mask)
    task = load_task("inpaint", {}, mask=mask, blind=True).for_photo(photo)
    sigma = 0.0 if task.config["noise"] is None else task.config["noise"]["sigma"]
    assert sigma == pytest.approx(expected, rel=0.08)


def test_a_hole_is_filled_by_the_prior_of_photos(command, tmp_path):
    """It starts from a smooth fill, computes only what the hole needs, and is better than what was there by far."""
    record = io.read_image(PHOTOS / "chelsea.jpg")
    truth = record.pixels[..., 40:196, 60:276]
    known = torch.ones(1, 1, *truth.shape[-2:])
    known[..., 20:44, 20:44] = 0
    io.write_image(tmp_path / "photo.png", torch.where(known > 0, truth, 1.0)[0])
    Image.fromarray((known[0, 0].numpy() * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    out = tmp_path / "out"
    mask = ("--task", "inpaint", "--mask", tmp_path / "mask.png", "--backbone", "embedded-photo")
    code, _, err = command("run", tmp_path / "photo.png", *mask, "-o", out)
    assert code == 0, err
    restored = io.read_image(out / "photo.png").pixels
    inside = known.expand_as(truth) > 0
    assert torch.equal(restored[inside], io.read_image(tmp_path / "photo.png").pixels[inside])
    hole = (..., slice(20, 44), slice(20, 44))
    assert psnr(restored[hole], truth[hole]) > 20
    method = json.loads((out / "photo.json").read_text())["settings"]["method"]
    assert method["parameters"]["start_from"] == "fill"


def test_the_colour_of_holes_is_not_the_photos():
    """White holes do not make a colour photo one of a single hue, nor red ones a grey photo colourful."""
    known = (torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) - 0.5
    x = torch.nn.functional.interpolate(x.mean(1, keepdim=True) + 0.15 * x, scale_factor=8)
    assert estimate_tint(x) is None
    assert estimate_tint(torch.where(known > 0, x, 1.0)) is not None  # what the mask is for
    assert estimate_tint(torch.where(known > 0, x, 1.0), known) is None
    grey = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    assert estimate_tint(torch.where(known > 0, grey, red), known) is not None


def test_the_inverse_of_a_blur_is_never_exact(tmp_path):
    """A file without noise was rounded: without that the inverse of its blur is all ringing (12 dB, the file 45)."""
    Image.new("RGB", (64, 64), (90, 120, 40)).save(tmp_path / "flat.png")
    for task in ("gaussian-blur", "denoise"):
        noise = load_task(task, {}, blind=True).for_photo(tmp_path / "flat.png").config["noise"]
        assert noise == ({"name": "gaussian", "sigma": 0.00226} if task == "gaussian-blur" else None)
