"""What a photo gets if nothing is said, beside the best: damages as they are described, gaps as they are counted."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import operators
from benchmarks import look
from benchmarks.damages import MARGIN, cut_pieces
from benchmarks.look import AS_IT_IS, CASES, FIRST, NEAR, damage, find_gap, format_table, judge, list_rivals
from operators import RestoreError
from restore.images import io
from restore.paths import data_dir

CHELSEA = data_dir() / "photos" / "chelsea.jpg"


@pytest.fixture(scope="module")
def piece():
    return cut_pieces([CHELSEA], 1, 64)[0]


def read(damaged, tmp_path):
    return io.read_image(damaged.write(tmp_path / "damaged")).pixels


@pytest.mark.parametrize("name", ["blur 1.5", "motion 9", "half size", "hole", "blur 1, half size, JPEG 60"])
def test_the_chain_is_what_happened(piece, name, tmp_path):
    """The described operator makes the file from what the camera saw, up to noise, rounding and JPEG."""
    damaged = damage(piece, name)
    seen = piece.truth if damaged.is_masked else piece.canvas
    canvas = torch.from_numpy(seen.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    config = {"name": "compose", "operators": damaged.chain}
    expected = operators.build_operator(config, image_size=tuple(canvas.shape[-2:])).A(canvas)
    if not damaged.is_masked:
        margin = MARGIN // CASES[name].get("reduced", 1)
        expected = expected[..., margin:-margin, margin:-margin]
    y = read(damaged, tmp_path)
    y = y * damaged.chain[0]["mask"] if damaged.is_masked else y
    limit = 8 if damaged.suffix == ".jpg" else 1.5
    assert float((y - expected).square().mean().sqrt()) * 127.5 < limit


def test_every_case_is_determined_by_piece_and_seed(piece):
    for name, case in CASES.items():
        first, second, other = (damage(piece, name, seed) for seed in (1, 1, 2))
        assert first.content == second.content, name
        assert (first.content != other.content) == bool(case.get("noise") or case.get("missing")), name


def test_rivals_are_the_whole_and_its_parts(piece, tmp_path):
    def names(case):
        damaged = damage(piece, case)
        return set(list_rivals(damaged, damaged.write(tmp_path / "damaged")))

    assert names("undamaged") == set()
    assert names("noise 25") == {"denoise"}
    assert names("hole") == {"what happened"}
    assert names("blur 2, noise 15") == {"what happened", "denoise"}
    chain = {"gaussian_blur", "super_resolution", "jpeg"}
    assert names("blur 1, half size, JPEG 60") == {"what happened", "denoise", *chain}


def test_gaps_and_the_table():
    def row(piece, psnr):
        return {"case": "noise 25", "piece": piece, "note": "seen: noise; done: all", "scores": psnr}

    scores = {FIRST: {"psnr": 30.0}, AS_IT_IS: {"psnr": 20.0}, "denoise": {"psnr": 30.4}}
    far = {**scores, FIRST: {"psnr": 29.0}}
    assert find_gap(row("a-0", far)) == (pytest.approx(1.4), "denoise")
    text = format_table([row("a-0", scores), row("b-0", far)])
    assert "| noise 25 | 2 | 20.00 | 29.50 | 30.40 | 0.90 | 1.40 | noise |" in text
    assert f"Within {NEAR} dB of the best: 1 of 2." in text and "- b-0, noise 25: 1.40 dB behind denoise" in text


def test_measured_once(tmp_path, monkeypatch):
    settings = {"data": str(CHELSEA), "pieces": 1, "size": 64, "files": 2, "cases": "undamaged,noise 25"}
    text = judge(**settings, out=str(tmp_path))
    assert "2 files, pieces of 64 × 64 pixels of 1 photos; embedded-photo, fast" in text
    rows = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "rows").iterdir()}
    noisy = rows["chelsea-0_noise-25"]
    assert noisy["scores"][FIRST]["psnr"] > noisy["scores"][AS_IT_IS]["psnr"] + 4 and "noise of 2" in noisy["note"]
    assert rows["chelsea-0_undamaged"]["scores"][AS_IT_IS]["psnr"] == look.INVISIBLE
    assert Image.open(tmp_path / "files" / "chelsea-0_undamaged.png").size == (64, 64)
    monkeypatch.setattr(look.Judge, "_restore", None)  # would fail
    assert judge(**settings, out=str(tmp_path)) == text


def test_mistakes_are_named(tmp_path):
    for settings, named in (
        ({"cases": "rain"}, "rain"),
        ({"size": 30}, "size"),
        ({"data": str(tmp_path)}, "pixels a side"),
        ({"data": str(tmp_path / "none")}, "does not exist"),
    ):
        with pytest.raises(RestoreError, match=named):
            judge(**settings, out=str(tmp_path))


@pytest.mark.slow
def test_nothing_said_is_near_the_best(tmp_path):
    """Two shipped photos, ten damages. Measured: 14 of 16 within NEAR of the best; the others are small photos with
    noise or JPEG, which are not enlarged."""
    cases = "undamaged,noise 10,noise 25,half size,JPEG 20,scratches,hole,random pixels"
    data = ",".join(str(CHELSEA.with_name(f"{name}.jpg")) for name in ("astronaut", "coffee"))
    text = judge(data=data, pieces=1, files=16, cases=cases, out=str(tmp_path))
    near = int(text.split(f"Within {NEAR} dB of the best: ")[1].split(" of 16.")[0])
    assert near >= 14 and "| undamaged | 2 | 45.00 | 45.00 | 45.00 | 0.00 |" in text, text
