"""Masks and kernels given as files."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
import torch

import operators
from operators import RestoreError
from restore import paths
from restore.app import files
from restore.images import io, masks


def test_masks(tmp_path):
    white = np.full((6, 9), 255, np.uint8)
    hole = white.copy()
    hole[1:3, 2:5] = 0

    def read(array, **options):
        PIL.Image.fromarray(array).save(tmp_path / "m.png")
        return masks.read_mask(tmp_path / "m.png", **options)

    mask = read(hole, size=(6, 9))
    assert mask.shape == (1, 1, 6, 9) and mask.sum() == 54 - 6 and mask[0, 0, 1, 2] == 0 and mask[0, 0, 0, 0] == 1
    assert torch.equal(read(np.stack([hole] * 3, -1)), mask) and torch.equal(read(hole > 0), mask)
    soft = hole.copy()
    soft[1, 2] = 100
    for array, options, message in (
        (hole, {"size": (9, 6)}, "6 x 9, got 9 x 6"),
        (white, {}, "nothing is missing"),
        (white * 0, {}, "no pixel is known"),
        (soft, {}, "between"),
        (np.stack([hole, white, hole], -1), {}, "colours"),
        (np.stack([hole, hole, hole, hole], -1), {}, "transparent"),
    ):
        with pytest.raises(RestoreError, match=message):
            read(array, **options)
    assert torch.equal(read(soft, threshold=127), mask)
    assert read(soft, threshold=99).sum() == mask.sum() + 1


def test_kernels(tmp_path):
    kernel = np.array([[0, 1, 0], [0, 2, 4], [0, 1, 0]], float) / 8
    np.save(tmp_path / "k.npy", kernel)
    np.savetxt(tmp_path / "k.txt", kernel)
    np.savetxt(tmp_path / "k.csv", kernel, delimiter=",")
    PIL.Image.fromarray((kernel * 400).astype(np.uint8)).save(tmp_path / "k.png")
    for name in ("k.npy", "k.txt", "k.csv", "k.png"):
        read = masks.read_kernel(tmp_path / name).numpy()
        assert np.allclose(read, kernel[::-1, ::-1], rtol=1e-6, atol=1e-7), name
    for bad, message in (
        (kernel * 2, "must sum to 1, got 2"),
        (np.where(kernel == 0, np.nan, kernel), "NaN"),
        (kernel[None], "table of numbers"),
        (np.array([{"a": 1}]), "not a readable kernel"),  # a pickled object is never loaded
    ):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(RestoreError, match=message):
            masks.read_kernel(tmp_path / "bad.npy")
    PIL.Image.fromarray(np.zeros((3, 3), np.uint8)).save(tmp_path / "black.png")
    (tmp_path / "words.txt").write_text("no numbers")
    for name in ("black.png", "words.txt", "missing.npy", "missing.png"):
        with pytest.raises(RestoreError, match=name):
            masks.read_kernel(tmp_path / name)


def test_shipped_files_are_found_and_usable():
    photos = files.expand_inputs([paths.data_dir() / "photos"])
    assert len(photos) >= 8 and (paths.configs_dir() / "model").is_dir()
    for path in photos:
        assert io.read_image(path).bits == 8
    mask = masks.read_mask(paths.data_dir() / "masks" / "chelsea-scratches.png", size=(300, 451))
    assert 0.8 < mask.mean() < 0.99
    assert masks.read_mask(paths.data_dir() / "masks" / "box-64.png", (64, 64)).sum() == 64 * 64 - 24 * 24


@pytest.mark.parametrize("shape", [(3, 5), (4, 6), (1, 2)])
def test_a_kernel_file_is_what_a_point_of_light_becomes(tmp_path, shape):
    """As scipy.ndimage.convolve, and with it DPIR and DiffPIR, apply it: a tail to the right smears to the right."""
    kernel = np.random.default_rng(0).random(shape)
    kernel /= kernel.sum()
    np.save(tmp_path / "k.npy", kernel)
    x = np.random.default_rng(1).random((24, 20))
    y = operators.Blur(masks.read_kernel(tmp_path / "k.npy"), border="circular").A(torch.tensor(x)[None, None])
    assert np.allclose(y[0, 0].numpy(), scipy.ndimage.convolve(x, kernel, mode="wrap"), atol=1e-12)
