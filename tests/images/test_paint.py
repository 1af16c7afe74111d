"""Pixels that are missing or painted over are found exactly, and nothing in photos that have none."""

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from operators import RestoreError
from restore.images import io, paint
from restore.images.findings import inspect_photo
from restore.images.masks import Mask
from restore.images.paint import find_paint
from restore.paths import data_dir
from restore.repair import choose_repair

PHOTOS = data_dir() / "photos"


@pytest.fixture(scope="module")
def levels():
    """The cat, (3, 292, 448) on 0..255."""
    return (io.read_image(PHOTOS / "chelsea.jpg").pixels[0, :, 4:296, :448].numpy() + 1) * 127.5


def find(levels):
    pixels = torch.from_numpy(np.clip(np.rint(levels), 0, 255)).float()[None] / 127.5 - 1
    return find_paint(pixels)[0, 0].numpy() == 0


def draw(levels, missing, colour):
    return np.where(missing, np.reshape(colour, (3, 1, 1)), levels)


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (255, 0, 0)], ids=["white", "black", "red"])
@pytest.mark.parametrize("kind", ["hole", "pixels", "lines"])
def test_every_missing_pixel_and_no_other(levels, kind, colour):
    missing = np.zeros(levels.shape[1:], bool)
    if kind == "hole":
        missing[100:140, 200:240] = True
    elif kind == "pixels":
        missing = np.random.default_rng(0).random(missing.shape) < 0.5
    else:
        for k in range(250):
            missing[20 + k, 50 + k : 52 + k] = True
    assert np.array_equal(find(draw(levels, missing, colour)), missing)


def test_lines_are_found_in_the_light_too(levels):
    """Next to them lies nearly their colour; the others tell what they are, and what shines by itself is left."""
    light = levels.copy()
    light[:, 90:150] = 246
    y, x = np.mgrid[: levels.shape[1], : levels.shape[2]]
    shine = 400 * np.exp(-((y - 200) ** 2 + (x - 400) ** 2) / 600)
    light = np.clip(light + shine, 0, 255)
    missing = np.zeros(levels.shape[1:], bool)
    for k in range(250):
        missing[20 + k, 50 + k // 2 : 53 + k // 2] = missing[20 + k, 150 + k // 4 : 153 + k // 4] = True
    missing[240:243, 260:420] = True
    assert (np.rint(light) == 255).all(0).sum() > 300 and np.array_equal(
        find(draw(light, missing, (255,) * 3)), missing
    )


def test_light_frames_and_noise_are_no_paint(levels):
    assert not find(levels).any()
    assert not find(3 * levels - 200).any()  # large white and black parts, clipped
    random = np.random.default_rng(0)
    for sigma in (25, 50):
        noise = sigma * random.standard_normal(levels.shape)
        assert not find(levels + noise).any()
        assert not find(np.repeat(levels[:1] + noise[:1], 3, axis=0)).any()  # grey
    framed = levels.copy()
    framed[:, :30] = framed[:, :, -40:] = 255
    assert not find(framed).any()


def test_a_hole_in_a_noisy_photo(levels):
    missing = np.zeros(levels.shape[1:], bool)
    missing[100:140, 200:240] = True
    noisy = levels + 25 * np.random.default_rng(0).standard_normal(levels.shape)
    assert np.array_equal(find(draw(noisy, missing, (255, 255, 255))), missing)


def test_bands_of_rows_change_nothing(levels, monkeypatch):
    random = np.random.default_rng(0)
    picture = draw(levels, random.random(levels.shape[1:]) < 0.3, (255, 255, 255))
    picture = draw(picture, random.random(levels.shape[1:]) < 0.1, (0, 0, 255))
    picture[:, 60:90, 200:300] = 0
    whole = find(picture)
    assert whole.mean() > 0.3
    for pixels in (1, 5000):
        monkeypatch.setattr(paint, "BAND", pixels)
        assert np.array_equal(find(picture), whole)


def test_a_large_photo_takes_little_memory(levels, monkeypatch):
    """It is looked at before the memory of its restoration is planned."""
    monkeypatch.setattr(paint, "BAND", 1 << 14)
    picture = torch.from_numpy(draw(levels, levels[0] > 240, (255, 255, 255))).float()[None] / 127.5 - 1
    tracemalloc.start()
    try:
        find_paint(picture)
        assert tracemalloc.get_traced_memory()[1] < 30 * picture[0, 0].numel()
    finally:
        tracemalloc.stop()


def test_a_photo_with_missing_pixels_is_filled_in(levels, tmp_path):
    """Nothing else is believed of it: the edges of the paint are neither noise nor sharpness of the photo."""
    missing = np.random.default_rng(0).random(levels.shape[1:]) < 0.3
    picture = draw(levels, missing, (255, 255, 255))
    Image.fromarray(np.rint(picture).astype(np.uint8).transpose(1, 2, 0)).save(tmp_path / "holes.png")
    found = inspect_photo(tmp_path / "holes.png")
    assert found.painted and not found.noisy and np.array_equal(found.mask[0, 0].numpy() == 0, missing)
    repair = choose_repair(found)
    assert repair.config["name"] == "inpainting_mask" and repair.keep_known
    assert repair.seen == (f"missing or painted over on {missing.mean():.1%}",)
    mask = Mask(tmp_path / "holes.png", sensitivity=0.5)
    assert np.array_equal(mask.read()[0, 0].numpy() == 0, missing)


def test_compression_blends_the_edges(levels, tmp_path):
    missing = np.zeros(levels.shape[1:], bool)
    missing[100:140, 200:240] = True
    picture = np.rint(draw(levels, missing, (255, 255, 255))).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(picture).save(tmp_path / "holes.jpg", quality=80)
    assert not inspect_photo(tmp_path / "holes.jpg").painted
    with pytest.raises(RestoreError, match="no scratches"):
        Mask(PHOTOS / "coffee-64.png", sensitivity=0.5).read()
