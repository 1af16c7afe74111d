"""Estimates from a photo on the command line: look, mask=auto, sigma=auto; photos of one hue keep it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from restore.app.choice import MethodChoice
from restore.app.run import RestoreJob
from restore.images import io
from restore.images.tint import estimate_tint
from restore.paths import data_dir
from restore.task import load_task

PHOTOS = data_dir() / "photos"
FACE = PHOTOS / "astronaut-face-64.png"


@pytest.fixture
def damaged(tmp_path):
    """96 pixels of the cat, with noise of 0.1 and a white scratch of 2 pixels."""
    pixels = io.read_image(PHOTOS / "chelsea.jpg").pixels[..., 60:156, 60:156]
    pixels = pixels + 0.1 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    pixels[..., 5:90, 20:22] = 1
    io.write_image(tmp_path / "old.png", pixels)
    return tmp_path / "old.png"


def test_look_prints_commands_and_writes_the_mask(command, damaged, tmp_path):
    mask = tmp_path / "mask.png"
    code, out, err = command("look", damaged, "-o", mask)
    assert code == 0, err
    assert f"{damaged}  96 x 96" in out and "colour  yes" in out and "blur    none" in out
    assert 0.08 < float(out.split("sigma ")[1].split()[0]) < 0.12
    assert f"restore run {damaged} -o restored/" in out  # all of it at once
    assert f"--task inpaint --mask {mask} -o" in out and "--task denoise -o" in out and "one thing alone" in out
    missing = np.asarray(Image.open(mask)) == 0
    assert missing[10:85, 20:22].mean() > 0.9 and missing.mean() < 0.15
    code, _, err = command("look", damaged, "-o", mask)
    assert code == 2 and "--overwrite" in err
    assert command("look", damaged, "-o", mask, "--overwrite")[0] == 0
    code, out, _ = command("look", FACE)
    assert code == 0 and "damage  none found" in out
    for arguments, sentence in (
        (["sensitivity=2"], "sensitivity"),
        (["colour=1"], "no setting"),
        (["--overwrite"], "--out"),
    ):
        code, _, err = command("look", damaged, *arguments)
        assert code == 2 and sentence in err and err.count("\n") == 1


def test_commands_proposed_by_look_run(command, damaged, tmp_path):
    _, out, _ = command("look", damaged)
    commands = [line.split()[1:] for line in out.splitlines() if line.lstrip().startswith("restore run")]
    assert len(commands) == 3 and "--task" not in commands[0]
    for k, words in enumerate(commands):
        words[words.index("-o") + 1] = str(tmp_path / str(k))
        code, _, err = command(*words, "--steps", "2")
        assert code == 0, err
    auto, inpainted, denoised = (json.loads((tmp_path / str(k) / "old.json").read_text()) for k in range(3))
    assert "seen: noise of 1" in auto["note"] and "painted over" in auto["note"]
    assert "embedded-photo" in auto["note"] and auto["protocol"]["backbone"] == "embedded-photo"
    assert Image.open(tmp_path / "0" / "old.png").size == (96, 96)
    assert inpainted["settings"]["task"]["mask"]["sensitivity"] == 0.5
    assert inpainted["settings"]["task"]["mask"]["sha256"] == inpainted["sha256"]
    for sidecar in (auto, inpainted, denoised):
        assert sidecar["settings"]["task"]["noise"]["sigma"] == pytest.approx(0.1, rel=0.2)
    known = np.asarray(Image.open(tmp_path / "1" / "old.png")).astype(float)
    assert known[30:60, 20:22].mean() < 235  # the scratch is gone


def test_a_name_with_a_leading_dash_is_no_option_of_a_proposed_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-a.png").write_bytes(FACE.read_bytes())
    _, out, _ = command("look", ".")
    commands = [line.split() for line in out.splitlines() if line.lstrip().startswith("restore run")]
    assert commands and all(words[2] == "./-a.png" for words in commands)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--task", "inpaint", "--mask", "auto"], "no scratches or dust found in astronaut-face-64.png"),
        (["--task", "inpaint", "--mask", "auto", "--degrade"], "degraded first"),
        (["--task", "denoise", "sigma=auto", "--degrade"], "degraded first"),
        (["--task", "inpaint", "--mask", "auto", "--invert-mask"], "not for --mask auto"),
        (["--task", "inpaint", "--mask", "auto", "sensitivity=3"], "sensitivity"),
        (["--task", "sr4", "--mask", "auto"], "does not apply"),
        (["--task", "denoise", "sensitivity=0.5"], "sensitivity"),
        (["--task", "denoise", "sigma=automatic"], "sigma"),
    ],
)
def test_one_sentence(command, tmp_path, arguments, sentence):
    code, out, err = command("run", FACE, *arguments, "--steps", 2, "-o", tmp_path)
    assert code == 2 and sentence in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_degrade_estimates_nothing(command, tmp_path):
    code, _, err = command("degrade", FACE, "--task", "denoise", "sigma=auto", "-o", tmp_path)
    assert code == 2 and "degraded first" in err


@pytest.mark.parametrize("tint", [(0.0, 0.0, 0.0), (0.06, 0.0, -0.08)], ids=["grey", "sepia"])
def test_a_photo_of_one_hue_gains_no_colour(tmp_path, tint):
    """A grey scan stored as RGB, and a tinted one, by a prior of coloured faces; a colour photo keeps its own."""
    import restore
    from restore.app.files import find_photos

    grey = io.to_tensor(FACE, channels=1).expand(-1, 3, -1, -1)
    scan = 0.8 * grey + torch.tensor(tint)[:, None, None]
    io.write_image(tmp_path / "scan.png", scan)
    restorer, method = restore.load("embedded"), MethodChoice("diffpir", steps=4, guidance=None)

    def result(name):
        photos = find_photos([str(tmp_path / name)], tmp_path / "out")
        task = load_task("denoise", {"sigma": 0.3})
        assert all(outcome.error is None for outcome in RestoreJob(restorer, task, method, samples=2).run(photos))
        assert ("one_hue" in json.loads(photos[0].sidecar.read_text())) == (name == "scan.png")
        return [io.read_image(photos[0].companion(end)).pixels for end in ("", "-sample1", "-mean")]

    for pixels in result("scan.png"):
        offsets = pixels - pixels.mean(1, True)
        expected = torch.tensor(tint) - torch.tensor(tint).mean()
        assert (offsets - expected[:, None, None]).abs().max() < 0.02
    # Degraded here, the photo's colours are those of the truth, which a result must not see.
    photos = find_photos([str(tmp_path / "scan.png")], tmp_path / "degraded")
    job = RestoreJob(restorer, load_task("denoise", {"sigma": 0.3}), method, degrade=True)
    assert all(outcome.error is None for outcome in job.run(photos))
    assert "one_hue" not in json.loads(photos[0].sidecar.read_text())
    if not any(tint):
        io.write_image(tmp_path / "colour.png", io.read_image(FACE).pixels)
        assert estimate_tint(result("colour.png")[0]) is None
