"""Comparison grids."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from operators import RestoreError
from restore.images import grids, io


def test_comparison_grid_shows_every_cell():
    torch.manual_seed(0)
    small, wide = torch.rand(3, 16, 16) * 2 - 1, torch.rand(1, 3, 100, 400) * 2 - 1
    sheet = grids.draw_grid(
        [[small, None], [wide, PIL.Image.new("RGB", (4, 4), "red")]],
        ["input", "a long title that wraps"],
        ["one", "two"],
        captions=[["20.1 dB", ""], ["", "x"]],
        cell=96,
    )
    pixels = np.asarray(sheet).astype(int)
    enlarged = np.repeat(np.repeat(io.to_uint8(small), 6, 0), 6, 1).astype(int)
    found = [
        (y, x)
        for y in range(pixels.shape[0] - 96)
        for x in range(pixels.shape[1] - 96)
        if (pixels[y, x] == enlarged[0, 0]).all() and (pixels[y : y + 96, x : x + 96] == enlarged).all()
    ]
    assert len(found) == 1  # nearest neighbour, whole factor, exactly once
    y, x = found[0]
    assert (pixels[y : y + 96, x + 102 : x + 198] == 255).all()  # the empty cell
    assert (pixels[:y, x : x + 96] < 128).any() and (pixels[y : y + 96, :x] < 128).any()  # titles are there
    red = (pixels == [255, 0, 0]).all(-1)
    assert red.sum() == 96 * 96
    with pytest.raises(RestoreError, match="2 images"):
        grids.draw_grid([[small]], ["a", "b"])
    wide_rows = grids.draw_grid([[wide], [wide]], ["photos"], cell=96)
    assert 2 * 24 < wide_rows.height < 2 * 24 + 60  # as high as their pictures, not as their cells
    assert grids.draw_grid([[small] * 3], ["t = 9", "t = 5", "t = 0"], cell=64).width > 3 * 64
