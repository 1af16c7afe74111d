"""What one more thing costs: each is added from tests/own.py, a module outside of the package, without editing it,
and used from Python, from YAML and from the command line."""

import json
import sys

import own
import pytest
import torch

import operators
import restore
from restore.app import cli
from restore.bench.run import run_benchmark
from restore.images import io
from restore.paths import data_dir
from restore.report.write import write_report

FACE = data_dir() / "photos" / "astronaut-face-64.png"
NOISE = {"name": "gaussian", "sigma": 0.05}
GUIDANCE = [
    {"pag": {"scale": 1.5, "layers": "m1", "target": "own:reversed_values", "schedule": "own:late"}},
    {"name": "own:Attended", "scale": 2.0, "by": 0.25},
    {"combine": "own:furthest"},
]
TASK = {"name": "own:Mirrored", "share": 0.4, "noise": NOISE}


@pytest.fixture(scope="module")
def expected():
    """The same restoration in Python: sampler, operator, target, schedule, guidance term and combination of our own."""
    face = io.read_image(FACE).pixels
    operator = own.Mirrored(0.4, noise=operators.GaussianNoise(0.05))
    y = operator(face, torch.Generator().manual_seed(0))
    guidance = restore.guidance.build_guidance(GUIDANCE)
    result = restore.load("embedded")(y, operator, sampler=own.one_step, steps=1, guidance=guidance, gain=0.9)
    assert result.nfe == 3 and result.protocol["method"]["sampler"] == "own:one_step"
    plain = restore.load("embedded")(y, operator, sampler=own.one_step, steps=1, guidance=None, gain=0.9)
    assert not torch.equal(plain.samples, result.samples)
    return result


def test_python(expected):
    described = expected.protocol["method"]
    assert restore.guidance.describe_guidance(restore.guidance.build_guidance(GUIDANCE)) == described["guidance"]
    assert restore.method.Method.from_config(described).guidance == restore.guidance.build_guidance(GUIDANCE)
    y = torch.zeros(1, 3, 8, 8)
    assert operators.check_operator(own.Mirrored(0.4), (1, 3, 8, 9)) < 1e-12  # the transpose is derived
    assert operators.prox_l2(own.Mirrored(0.4), y + 1, y, 1.0).shape == y.shape


def test_command_line(expected, tmp_path, monkeypatch, capsys):
    task = tmp_path / "mirrored.yaml"  # a task is one YAML file, wherever it lies
    task.write_text(json.dumps(TASK))
    arguments = ["run", FACE, "--task", task, "--degrade", "--sampler", "own:one_step", "--steps", 1, "gain=0.9"]
    arguments += ["--guidance", json.dumps(GUIDANCE), "-o", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["restore", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code, capsys.readouterr().err
    (written,) = (path for path in (tmp_path / "out").glob("*.json"))
    sidecar = json.loads(written.read_text())
    ours = expected.protocol["method"]
    assert sidecar["protocol"]["method"] == {**ours, "source": sidecar["protocol"]["method"]["source"]}
    assert "share=0.4)" in sidecar["protocol"]["operator"] and sidecar["psnr"] > 5

    arguments = ["evaluate", tmp_path / "out", "--reference", FACE.parent, "--metrics", "psnr,own:brightness_error"]
    monkeypatch.setattr(sys, "argv", ["restore", *map(str, arguments), "--allow-incomplete"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr().out
    assert not stop.value.code and "own:brightness_error" in printed


def test_yaml(expected, tmp_path):
    config = {
        "name": "own",
        "backbone": "embedded",
        "out": str(tmp_path / "run"),
        "device": "cpu",
        "data": {"folder": str(tmp_path / "photos")},
        "tasks": {"mirrored": {"operator": TASK}},
        "methods": {
            "mine": {"sampler": "own:one_step", "steps": 1, "parameters": {"gain": 0.9}, "guidance": GUIDANCE},
            "plain": {"sampler": "own:one_step", "steps": 1},
        },
        "metrics": {"names": ["psnr", "own:brightness_error"]},
    }
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / FACE.name).write_bytes(FACE.read_bytes())
    (tmp_path / "own.yaml").write_text(json.dumps(config))
    table = run_benchmark(tmp_path / "own.yaml").table["table"]["mirrored"]
    assert table["mine"]["cost"]["nfe"] == 3 and table["plain"]["cost"]["nfe"] == 1
    assert table["mine"]["means"]["own:brightness_error"]["n"] == 1 and table["mine"]["means"]["psnr"]["mean"] > 5
    text = write_report([tmp_path / "run"]).markdown.read_text()
    assert "Difference of the mean brightness" in text and "own:one_step" in text
