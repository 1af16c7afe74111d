"""Hostile files and settings: each is refused with one sentence and exit code 2."""

import json
import shutil
import struct
import sys
import zipfile

import pytest
from PIL import Image

from restore.app import cli
from restore.paths import data_dir

FACE = data_dir() / "photos" / "astronaut-face-64.png"


@pytest.fixture
def refused(command):
    """refused(*arguments) -> the sentence."""

    def run(*arguments):
        code, _, err = command(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("restore: ")]
        assert code == 2 and len(lines) == 1, (code, lines)
        return lines[0]

    return run


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder of hostile files."""
    folder = tmp_path_factory.mktemp("hostile")
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    header += b" " * (117 - len(header)) + b"\n"
    (folder / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with zipfile.ZipFile(folder / "archive.npy", "w") as archive:
        archive.writestr("a.npy", b"x")
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    (folder / "bytes.yaml").write_bytes(bytes(range(256)))
    for name, content in (("list", [1, 2]), ("empty", {"format": 2}), ("other", {"format": 2, "config": []})):
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(json.dumps(content))
    (folder / "metrics").mkdir()
    parts = {"format": 2, "created": "", "identity": {}, "protocol": {}, "config": {}}
    (folder / "metrics" / "run.json").write_text(json.dumps(parts))
    (folder / "metrics" / "metrics.json").write_text('{"table": {}}')
    return folder


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--task", "blur", "--kernel", "{}/huge.npy"], "huge.npy is not a readable kernel"),
        (["--task", "blur", "--kernel", "{}/archive.npy"], "archive.npy is not a readable kernel"),
        (["--task", "gaussian-blur", "std=1e9"], "std must lie in"),
        (["--task", "gaussian-blur", "kernel_size=1000000"], "kernel_size must be an integer of at least 1"),
        (["--task", "motion-blur", "kernel_size=1000000"], "kernel_size must be an integer of at least 1"),
        (["--task", "denoise", "--device", "meta"], "device 'meta' is not available"),
        (["--task", "denoise", "--data", "foo"], "no settings were published for 'foo'"),
        (["--task", "denoise", "--seed", "-5"], "--seed"),
        (["--task", "denoise", "--max-windows", "0"], "--max-windows"),
        (["--task", "denoise", "--pag-scale", "1", "--layers", ""], "names no attention layer"),
        (["--task", "denoise", "zeta=nan"], "zeta must be a number"),
    ],
)
def test_run(refused, hostile, tmp_path, arguments, sentence):
    arguments = [argument.format(hostile) if argument.startswith("{}") else argument for argument in arguments]
    assert sentence in refused("run", FACE, *arguments, "-o", tmp_path / "out", "--steps", "1")


@pytest.mark.parametrize("name", ["list.yaml", "bytes.yaml"])
@pytest.mark.parametrize("verb", ["bench", "train"])
def test_configurations(refused, hostile, verb, name):
    assert name in refused(verb, hostile / name)


def test_options_of_a_card_need_one(refused, tmp_path):
    for option in (["--weights", tmp_path], ["--overwrite"]):
        assert "--card" in refused("train", "configs/train/embedded.yaml", *option, f"out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, what",
    [("list", "damaged"), ("empty", "damaged"), ("other", "damaged"), ("metrics", "has no name, backbone")],
)
def test_reports_of_strange_runs(refused, hostile, name, what):
    sentence = refused("report", hostile / name)
    assert what in sentence and name in sentence


def test_a_name_that_means_a_picture_makes_no_folder(refused, tmp_path):
    assert "out.heic" in refused("run", FACE, "--task", "denoise", "-o", tmp_path / "out.heic")
    assert not (tmp_path / "out.heic").exists()


def test_a_damaged_row_is_named_and_its_image_computed_again(tmp_path, monkeypatch, capsys):
    Image.open(FACE).crop((0, 0, 16, 16)).save(tmp_path / "a.png")
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.open(tmp_path / "a.png").save(tmp_path / "images" / f"{name}.png")
    config = {"name": "x", "backbone": "embedded", "data": {"folder": str(tmp_path / "images")}, "tasks": {"t": "sr4"}}
    config |= {"methods": {"m": {"sampler": "bicubic"}}, "out": str(tmp_path / "run")}
    (tmp_path / "c.yaml").write_text(json.dumps(config))

    def bench():
        monkeypatch.setattr(sys, "argv", ["restore", "bench", str(tmp_path / "c.yaml")])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        return capsys.readouterr().out

    assert "2 batches done" in bench()
    row = tmp_path / "run" / "results" / "t" / "m" / "rows" / "b.json"
    whole = row.read_bytes()
    row.write_bytes(whole[:20])
    out = bench()
    assert f"{row} was damaged" in out and "1 batches done, 1 found finished" in out and row.read_bytes() == whole
    row.with_name("a.json").write_text("[]")
    (row.parent.parent / "b.png").unlink()
    assert "2 batches done" in bench()
    for name in (tmp_path / "run" / "cost" / "t" / "m").glob("*.json"):
        name.write_text("{")
    assert "2 found finished" in bench()


@pytest.mark.parametrize("change", [{"block_out_channels": [8]}, {"down_block_types": []}, {"layers_per_block": [1]}])
def test_a_model_whose_lists_do_not_match(refused, tiny_adm, tmp_path, change):
    shutil.copytree(tiny_adm, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    sentence = refused("run", FACE, "--task", "sr4", "--backbone", tmp_path / "model", "-o", tmp_path / "out")
    assert "config.json" in sentence and "model" in sentence
