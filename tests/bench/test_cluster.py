"""A real local Ray with two workers, one of which is killed; against the local engine."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from operators import RestoreError
from restore.bench.run import run_benchmark

NOISE = {"name": "gaussian", "sigma": 0.05}


def contents(run: Path) -> dict[str, bytes]:
    files = [p for part in ("results", "truth", "measurements") for p in sorted((run / part).rglob("*")) if p.is_file()]
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in files}


@pytest.fixture
def config(tmp_path, tiny_run, smooth_images, write_images):
    write_images(tmp_path / "photos", smooth_images(12, 16, 0))
    return {
        **tiny_run,
        "out": str(tmp_path / "ray"),
        "batch": 1,
        "data": {"folder": str(tmp_path / "photos")},
        "tasks": {"sr": {"operator": {"name": "super_resolution", "factor": 4, "noise": NOISE}}},
        "methods": {"dps": {"sampler": "dps", "steps": 40, "parameters": {"zeta": 0.5}}},
    }


@pytest.mark.slow
def test_ray_gives_the_bytes_of_the_local_engine_although_a_worker_is_killed(config, tmp_path):
    pytest.importorskip("ray")
    killed = []

    def kill_the_first(event):
        if "batch" in event and not killed:
            cost = json.loads((Path(config["out"]) / f"cost/{event['batch']}.json").read_text())
            killed.append(int(cost["worker"].rsplit(":", 1)[1]))
            os.kill(killed[0], signal.SIGKILL)

    done = run_benchmark(config, ["engine=ray", "workers=2"], progress=kill_the_first)
    assert killed and done.computed == 12 and done.table["table"]["sr"]["dps"]["missing"] == 0
    costs = [json.loads(p.read_text()) for p in (Path(config["out"]) / "cost/sr/dps").glob("*.json")]
    workers = {cost["worker"] for cost in costs}
    assert len(workers) == 3, "two workers and the one that replaced the dead"
    run_benchmark(dict(config, out=str(tmp_path / "local")))
    assert contents(Path(config["out"])) == contents(tmp_path / "local")


@pytest.mark.slow
def test_mistakes_in_a_worker_and_too_many_workers_are_said(config):
    pytest.importorskip("ray")
    with pytest.raises(RestoreError, match="no attention layer is called 'i77'"):
        run_benchmark(config, ["engine=ray", "workers=1", "methods.dps.guidance.pag={scale: 1.0, layers: [i77]}"])
    with pytest.raises(RestoreError, match="do not fit the cluster"):
        run_benchmark(config, [f"out={config['out']}-2", "engine=ray", "workers=12", "worker.cpus=1000"])


def test_ray_missing_is_said(config, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(RestoreError, match=r"restore-diffusion\[cluster\]"):
        run_benchmark(config, ["engine=ray"])
