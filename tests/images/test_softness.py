"""Blur by the fall of the spectrum, of small pieces of photos: of those that are blurred, and none of sharp ones."""

import pytest
import torch

import operators
from restore.images import io
from restore.images.findings import inspect_photo
from restore.images.softness import measure_softness
from restore.paths import data_dir
from restore.repair import choose_repair

PIECES = {"astronaut": (40, 60), "chelsea": (100, 150), "coffee": (160, 100)}


@pytest.fixture(scope="module")
def pieces():
    photos = {name: io.read_image(data_dir() / "photos" / f"{name}.jpg").pixels for name in PIECES}
    return {name: photos[name][..., top : top + 176, left : left + 176] for name, (top, left) in PIECES.items()}


def soften(piece, std, levels=0.0, radius=12):
    """The inner 128 pixels, blurred by what is beyond them too, with noise, rounded to 8 bits."""
    x = (operators.GaussianBlur(2 * radius + 1, std).A(piece) if std else piece)[..., 24:-24, 24:-24]
    x = x + levels / 127.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return (127.5 * (x + 1)).round().clamp(0, 255) / 127.5 - 1


@pytest.mark.parametrize("std, levels, off", [(1.5, 0, 0.15), (2.5, 0, 0.15), (2.0, 5, 0.25)])
def test_a_small_piece_tells_how_blurred_it_is(pieces, tmp_path, std, levels, off):
    """A kernel that is a fifth too large costs 4 dB: the edges of one piece are 1.2 to 2.5 pixels soft for 1.5."""
    for name, piece in pieces.items():
        io.write_image(tmp_path / f"{name}.png", soften(piece, std, levels))
        found = inspect_photo(tmp_path / f"{name}.png")
        assert found.blur == pytest.approx(std, rel=off), name
        assert choose_repair(found).config["name"] == "gaussian_blur"


def test_a_large_blur_is_not_made_smaller_by_the_window(pieces):
    """The spectrum of a blur of 5 pixels is hardly wider than the window's: it was told to be 4.3."""
    found = [measure_softness(soften(piece, 5.0, radius=20), 0.0).std for piece in pieces.values()]
    assert sum(found) / len(found) == pytest.approx(5, rel=0.07)


def test_sharp_pieces_with_and_without_noise(pieces):
    for name, piece in pieces.items():
        for levels in (0, 15, 40):
            found = measure_softness(soften(piece, 0, levels), levels / 127.5)
            assert found.std < 1 or found.evidence < 2, (name, levels)


def test_a_flat_photo_has_no_evidence():
    assert measure_softness(torch.zeros(1, 3, 64, 96), 0.0).evidence < 1
