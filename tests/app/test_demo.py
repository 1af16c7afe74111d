"""The demo, with two steps of every sampler."""

import json

import pytest
import torch
import torchvision
from PIL import Image

from operators import RestoreError
from restore.app import demo, tasks
from restore.app.demo import PHOTOS, TASKS, methods, run_demo
from restore.metrics import weights
from restore.restorer import load


def test_columns_follow_the_best_quality():
    """DPS and what quality="best" names, each plain and with PAG; DiffPIR where the best is DPS itself."""
    restorer, operator = load("embedded"), tasks.find_task("sr4").build(64, 64)
    columns = methods(restorer, operator, "sr4")
    plain = [restorer.method(operator, task="sr4", **options) for options in columns.values()]
    best = restorer.method(operator, task="sr4", quality="best").sampler
    best = "diffpir" if best == "dps" else best
    assert [m.sampler for m in plain] == ["dps", "dps", best, best]
    assert [m.guidance is None for m in plain] == [True, False, True, False]
    assert [label.endswith("+PAG") for label in columns] == [False, True, False, True]


def test_demo_writes_picture_and_numbers(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(torchvision.models.alexnet(weights=None).state_dict(), tmp_path / "random.pth")
    steps, out = [], tmp_path / "out"
    assert "Done in" in run_demo(out, steps=2, weights={"alexnet": tmp_path / "random.pth"}, callback=steps.append)
    record = json.loads((out / "demo.json").read_text())
    assert len(record["table"]) == 5 * len(TASKS) and len(record["runs"]) == 4 * len(TASKS)
    assert all(row["LPIPS"] > 0 for row in record["table"])
    assert "LPIPS" in (out / "table.md").read_text().splitlines()[0]
    # One column of 198 pixels for input, baseline, four methods and truth; one row for a face and a task.
    width, height = Image.open(out / "comparison.png").size
    assert width > 7 * 198 and height > len(TASKS) * len(PHOTOS) * 198
    # The bar is full at the end, and never runs backwards.
    done = [step["first"] * step["steps"] + step["step"] for step in steps]
    assert done == sorted(done)
    assert steps[-1]["first"] + steps[-1]["count"] == steps[-1]["total"]


def test_no_lpips_without_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "default_folder", lambda: tmp_path / "nothing")
    assert demo._lpips(None) is None and demo._lpips({}) is None


def test_weights_that_were_given_must_be_there(tmp_path):
    with pytest.raises(RestoreError, match="which does not exist"):
        run_demo(tmp_path / "out", weights={"alexnet": str(tmp_path / "missing.pth")})
