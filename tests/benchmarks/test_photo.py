"""The table of damaged photos: damages as the world does them, other programs as one installs them."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.alternatives import ALTERNATIVES, mirror
from benchmarks.damages import DAMAGES, MARGIN, cut_pieces
from benchmarks.photo import OURS, REFERENCE, Table, compare
from operators import RestoreError
from restore.paths import data_dir

CHELSEA = data_dir() / "photos" / "chelsea.jpg"


@pytest.fixture(scope="module")
def piece():
    return cut_pieces([CHELSEA], 1, 64)[0]


def psnr(image, truth):
    return -10 * np.log10(np.square((np.clip(image, 0, 255) - truth.astype(float)) / 255).mean())


def test_pieces_are_the_photos_own_pixels(piece):
    photo = np.array(Image.open(CHELSEA).convert("RGB"))
    windows = np.lib.stride_tricks.sliding_window_view(photo, (64, 64, 3))[:, :, 0]
    corner = np.argwhere((windows[..., :2, :2, :] == piece.truth[:2, :2]).all(axis=(2, 3, 4)))
    assert any((windows[top, left] == piece.truth).all() for top, left in corner)
    assert piece.canvas.shape == (64 + 2 * MARGIN, 64 + 2 * MARGIN, 3)
    assert cut_pieces([CHELSEA], 2, 64)[0].name == piece.name and not cut_pieces([CHELSEA], 1, 400)


def test_damages_are_determined_by_piece_and_seed(piece):
    for name, damage in DAMAGES.items():
        first, second, other = (damage.of(piece, seed) for seed in (3, 3, 4))
        assert first.content == second.content
        is_random = damage.kind == "missing" or first.sigma > 0
        assert (other.content != first.content) == is_random, name


def test_noise_has_its_level(piece):
    for sigma in (15, 25, 50):
        error = DAMAGES[f"noise {sigma}"].of(piece, 0).pixels - piece.truth.astype(float)
        assert error.std() == pytest.approx(sigma, rel=0.1)  # clipped


def test_blurs_and_reductions_see_beyond_the_border(piece):
    """The outermost row of the file depends on what lies outside of it, which a reflected border would not know."""
    for name in ("blur 1.5, noise 2", "motion blur, noise 2", "half size", "quarter size"):
        changed = piece.canvas.copy()
        changed[:MARGIN] = 255 - changed[:MARGIN]
        other = type(piece)(piece.name, piece.photo, changed)
        a, b = (DAMAGES[name].of(one, 0).pixels.astype(float) for one in (piece, other))
        assert (np.array_equal(piece.truth, other.truth)) and np.abs(a - b)[0].max() > 5, name
        assert np.array_equal(a[-8:], b[-8:]), name


def test_reductions_keep_their_place(piece):
    """Enlarged, the small picture lies on the large one: moved by a pixel either way it fits less."""
    small = DAMAGES["quarter size"].of(piece, 0)
    assert small.pixels.shape == (16, 16, 3)
    large = ALTERNATIVES["Lanczos"].run(small).astype(float)
    shifted = {d: psnr(np.roll(large, d, axis=(0, 1))[8:-8, 8:-8], piece.truth[8:-8, 8:-8]) for d in (-1, 0, 1)}
    assert max(shifted, key=shifted.get) == 0


def test_known_pixels_are_the_photos(piece):
    for name, low, high in (("scratches", 0.01, 0.3), ("hole of 40", 0.05, 0.2), ("half of the pixels", 0.45, 0.55)):
        damaged = DAMAGES[name].of(piece, 0)
        assert low < 1 - damaged.known.mean() < high, name
        assert np.array_equal(damaged.pixels[damaged.known], piece.truth[damaged.known])
        assert (damaged.pixels[~damaged.known] == 255).all()


def test_a_mirrored_picture_repeats():
    image = np.arange(24.0).reshape(2, 4, 3)
    double = mirror(image)
    assert np.array_equal(double[:2, :4], image) and double.shape == (4, 8, 3)
    assert np.array_equal(double[-1], double[0]) and np.array_equal(double[:, -1], double[:, 0])


@pytest.mark.parametrize("method, damage, gain", [
    ("BM3D", "noise 25", 3.0),
    ("total variation", "noise 25", 2.0),
    pytest.param("BM3DDEB", "blur 1.5, noise 2", 0.5, marks=pytest.mark.slow),
    ("Wiener", "blur 1.5, noise 2", 0.5),
    ("biharmonic", "half of the pixels", 10.0),
    ("Telea", "scratches", 5.0),
])  # fmt: skip
def test_other_programs_help(method, damage, gain):
    (piece,) = cut_pieces([CHELSEA.with_name("astronaut.jpg")], 1, 64)
    alternative, damaged = ALTERNATIVES[method], DAMAGES[damage].of(piece, 0)
    if alternative.explain_absence():
        pytest.skip(alternative.explain_absence())
    assert alternative.suits(DAMAGES[damage].kind, damaged)
    inside = np.s_[8:-8, 8:-8]  # what lies beyond the border no one of them knows
    before, after = (psnr(image[inside], piece.truth[inside]) for image in (damaged.pixels, alternative.run(damaged)))
    assert after > before + gain


def test_the_table_is_measured_once(tmp_path, monkeypatch):
    """Restored as a file is; a second call reads what the first has measured; what is missing is said."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    settings = {"photos": str(CHELSEA), "pieces": 1, "size": 64, "out": str(tmp_path), "damages": "noise 50,scratches"}
    settings["methods"] = "restore; fast,as it is,Telea"
    text = compare(**settings)
    rows = {path.name: json.loads(path.read_text()) for path in (tmp_path / "rows").iterdir()}
    assert {(row["damage"], row["method"]) for row in rows.values()} == {
        ("noise 50", "restore, fast"), ("noise 50", "as it is"), ("scratches", "restore, fast")
    }  # fmt: skip
    ours, kept = (rows[f"chelsea-0_noise-50_{name}.json"] for name in ("restore-fast", "as-it-is"))
    assert ours["psnr"] > kept["psnr"] + 5 and ours["seconds_per_megapixel"] > kept["seconds_per_megapixel"]
    assert "Telea: left out; cv2 cannot be imported" in text and f"{ours['psnr']:.2f}" in text
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert compare(**settings) == text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == times


def test_differences_are_paired_by_photo():
    values = {"a": (30.0, 31.0), "b": (20.0, 21.0), "c": (25.0, 26.0)}
    rows = [
        {"damage": "noise 15", "method": method, "photo": photo, "psnr": pair[k] + shift}
        for photo, pair in values.items()
        for k, method in enumerate((REFERENCE, "BM3D"))
        for shift in (-0.5, 0.5)
    ]
    table = Table(rows)
    assert table.difference("noise 15", "BM3D", "psnr", 2) == "+1.00 (+1.00 to +1.00)"
    assert table.mean("noise 15", "BM3D", "psnr") == 26.0
    assert "BM3D 26.00, –" in table.format_briefly() and len(OURS) == 3


def test_mistakes_are_named(tmp_path):
    for settings, named in (
        ({"damages": "rain"}, "rain"),
        ({"methods": "magic"}, "magic"),
        ({"size": 30}, "size"),
        ({"photos": str(tmp_path)}, "pixels a side"),
        ({"photos": str(tmp_path / "none")}, "does not exist"),
    ):
        with pytest.raises(RestoreError, match=named):
            compare(**settings)
