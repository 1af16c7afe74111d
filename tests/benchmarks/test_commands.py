"""Whole commands timed beside another checkout's."""

import pytest
import torch

from benchmarks import commands
from operators import RestoreError
from restore.images import io


def test_rows_are_paired_by_photo():
    found = {
        "default": [{"seconds": s, "psnr": p} for s, p in ((1.0, 30.0), (3.0, 32.0), (2.0, 31.0))],
        "before": [{"seconds": s, "psnr": p} for s, p in ((4.0, 29.5), (4.0, 32.5), (4.0, 30.4))],
    }
    now, before = (
        [cell.strip() for cell in row.split("|")[1:-1]] for row in commands.format_rows("x", found, "before")
    )
    assert now == ["x", "default", "2.00", "0.50", "31.00", "+0.20 (-0.50 to +0.60)"]
    assert before == ["x", "before", "4.00", "1.00", "30.80", "–"]


def test_pieces_are_the_centres_of_photos_that_are_large_enough(tmp_path):
    photo = torch.linspace(-1, 1, 3 * 16 * 20).view(3, 16, 20)
    io.write_image(tmp_path / "a.png", photo[:, :6])
    io.write_image(tmp_path / "b.png", photo)
    (piece,) = commands.cut_pieces(tmp_path, 1, 8, 10)
    assert piece.shape == (1, 3, 8, 10) and (piece[0] - photo[:, 4:12, 5:15]).abs().max() <= 1 / 255
    with pytest.raises(RestoreError, match="2 of 8 x 10 pixels and more, got 1"):
        commands.cut_pieces(tmp_path, 2, 8, 10)
    with pytest.raises(RestoreError, match="unknown case"):
        commands.measure_commands("noise,nose")


@pytest.mark.slow
def test_variants_restore_the_same_files():
    """This checkout is its own "before": the same pictures."""
    table = commands.measure_commands(
        "noise", pieces=1, height=64, width=64, against=str(commands.ROOT), before="", options=""
    )
    now, before = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:])
    assert now[4] == before[4] and now[5] == "+0.00 (+0.00 to +0.00)" and float(now[4]) > 25 and float(now[2]) > 0
