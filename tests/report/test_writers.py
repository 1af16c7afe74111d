"""No command replaces a file that this program did not write: `evaluate -o`, `report -o`."""

from __future__ import annotations

import json
import sys

import pytest

from restore.app import cli
from restore.bench.run import run_benchmark


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["restore", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr().err

    return run


def check_kept(command, arguments, path, content=b"my notes"):
    """The command refuses to replace a file of somebody else's, and does so with --overwrite, and its own then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    code, err = command(*arguments)
    assert code == 2 and path.name in err and "--overwrite" in err and len(err.splitlines()) == 1, err
    assert path.read_bytes() == content
    for options in (["--overwrite"], [], []):
        code, err = command(*arguments, *options)
        assert code == 0 and path.read_bytes() != content, err


def test_evaluate(command, tmp_path, smooth_images, write_images):
    for i, name in enumerate(("truth", "results")):
        write_images(tmp_path / name, smooth_images(2, 16, i))
    arguments = ["evaluate", tmp_path / "results", "--reference", tmp_path / "truth", "-o"]
    check_kept(command, [*arguments, tmp_path / "thesis.json"], tmp_path / "thesis.json")
    sidecar = tmp_path / "results" / "00000.json"  # of a result, which names others
    check_kept(command, [*arguments, sidecar], sidecar, json.dumps({"files": ["00000.png", "00000.json"]}).encode())
    assert json.loads((tmp_path / "thesis.json").read_text())["means"]["psnr"]["n"] == 2


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_report(command, name, tmp_path, tiny_run, smooth_images, write_images):
    write_images(tmp_path / "photos", smooth_images(2, 16, 0))
    tasks = {"sr": {"operator": {"name": "super_resolution", "factor": 4}}}
    data = {"folder": str(tmp_path / "photos")}
    run = run_benchmark({**tiny_run, "data": data, "tasks": tasks, "methods": {"base": {"sampler": "baseline"}}}).folder
    check_kept(command, ["report", run, "-o", tmp_path / "mine"], tmp_path / "mine" / name)
    check_kept(command, ["report", run], run / name)
