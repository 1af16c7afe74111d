"""The command line with a Stable Diffusion folder: nothing but --backbone changes for the user."""

import json
import sys

import pytest
import tiny_sd
from PIL import Image

from restore import cli
from restore.paths import data_dir


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--pag-scale", "2", "--layers", "m1"], {"eta": 1.0, "gamma": 0.1}),
        (["--reference"], {"measurement_noise": True, "encoding": "sample", "index_shift": True}),
        (["gamma=0", "eta=0.5"], {"eta": 0.5, "gamma": 0}),
    ],
)
def test_psld_on_a_photo_of_any_size(tmp_path, monkeypatch, capsys, options, expected):
    folder = tiny_sd.save_folder(tmp_path / "model")
    Image.open(data_dir() / "photos" / "coffee-64.png").resize((40, 27)).save(tmp_path / "photo.png")
    command = ["restore", "run", tmp_path / "photo.png", "--task", "denoise", "--backbone", folder, "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in [*command, *options, "-o", tmp_path / "out"]])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0, capsys.readouterr().err
    assert Image.open(tmp_path / "out" / "photo.png").size == (40, 27)
    protocol = json.loads((tmp_path / "out" / "photo.json").read_text())["protocol"]
    assert protocol["sampler"] == "psld" and expected.items() <= protocol["parameters"].items()
