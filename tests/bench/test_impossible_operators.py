"""Operators that cannot be built are refused before a benchmark claims its folder or loads a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from operators import RestoreError
from restore.bench.batch_size import choose_batch
from restore.bench.batches import load_images
from restore.bench.config import load_config
from restore.bench.run import run_benchmark


@pytest.fixture
def config(tmp_path, tiny_run, smooth_images, write_images):
    write_images(tmp_path / "photos", smooth_images(5, 16, 0))
    methods = {"base": {"sampler": "baseline"}}
    return {**tiny_run, "data": {"folder": str(tmp_path / "photos")}, "methods": methods}


@pytest.mark.parametrize("batch", [2, "auto"])
@pytest.mark.parametrize(
    "operator, per_image, message",
    [
        ({"name": "super_resolution", "factr": 4}, False, "tasks.sr: .*did you mean 'factor'"),
        (
            {"name": "super_resolution", "factor": 4, "noise": {"name": "gaussian", "sgma": 1}},
            False,
            "tasks.sr: .*sgma",
        ),
        ({"name": "super_resolution", "factor": 4}, True, "tasks.sr: .*no option 'seed'"),
        ({"name": "inpainting_box", "size": 40}, False, "tasks.sr: .*size"),
        ({"name": "nonlinear_blur", "kernel_size": 5}, True, "tasks.sr: .*nonlinear_blur cannot share a batch"),
    ],
)
def test_an_impossible_operator_claims_no_folder(config, monkeypatch, operator, per_image, message, batch):
    """Nor is a network loaded for it: the corrected file runs in the same place."""
    monkeypatch.setattr("restore.bench.worker.Worker._load", lambda *_: pytest.fail("a network was loaded"))
    config |= {"batch": batch, "tasks": {"sr": {"operator": operator, "per_image": per_image}}}
    if batch == "auto" and "share" in message:
        assert choose_batch(load_config(config), load_images(load_config(config))) == 1
        return
    with pytest.raises(RestoreError, match=message):
        run_benchmark(config)
    assert not Path(config["out"]).exists()
