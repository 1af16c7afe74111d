"""Batches written while the next one is computed, as where a GPU computes."""

from __future__ import annotations

import pytest

from operators import RestoreError
from restore.bench.batches import load_images, make_batches
from restore.bench.config import load_config
from restore.bench.worker import Worker


@pytest.fixture
def start(tiny_run, tmp_path, smooth_images, write_images):
    """Return the run's folder, a Worker and three batches."""
    write_images(tmp_path / "photos", smooth_images(3, 16, 0))
    noise = {"name": "gaussian", "sigma": 0.05}
    config = tiny_run | {
        "batch": 1,
        "data": {"folder": str(tmp_path / "photos")},
        "tasks": {"sr": {"operator": {"name": "super_resolution", "factor": 4, "noise": noise}}},
        "methods": {"diffpir": {"sampler": "diffpir", "steps": 2, "parameters": {"lam": 1.0, "zeta": 1.0}}},
    }

    def make(name):
        loaded = load_config(config | {"out": str(tmp_path / name)})
        images = load_images(loaded)
        return tmp_path / name, Worker(loaded, tmp_path / name, images), make_batches(loaded, images)

    return make


def read(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix == ".png"}


def test_overlapped_batches_are_those_of_others(start):
    plain, worker, batches = start("plain")
    assert [batch for batch, _ in worker.run_all(batches)] == batches
    folder, worker, batches = start("overlapped")
    done = []
    for batch, cost in worker.run_all(batches, overlap=True):
        assert batch.is_done(folder) and cost["seconds_writing"] > 0
        done.append(batch)
    assert done == batches and read(folder) == read(plain)


def test_an_error_of_writing_reaches_the_caller_and_loses_nothing_else(start):
    folder, worker, batches = start("blocked")
    (path,) = batches[1].row_paths(folder)
    path.mkdir(parents=True)  # where the second batch's row belongs
    with pytest.raises(RestoreError, match="00001.json"):
        list(worker.run_all(batches, overlap=True))
    assert [batch.is_done(folder) for batch in batches] == [True, False, True]


def test_an_error_of_computing_waits_for_the_writer(start, monkeypatch):
    folder, worker, batches = start("stopped")
    compute = worker._compute

    def fail(batch, *rest):
        if batch is batches[1]:
            raise RestoreError("the sample is not finite")
        return compute(batch, *rest)

    monkeypatch.setattr(worker, "_compute", fail)
    with pytest.raises(RestoreError, match="not finite"):
        list(worker.run_all(batches, overlap=True))
    assert [batch.is_done(folder) for batch in batches] == [True, False, False]
    path = batches[0].row_paths(folder)[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(RestoreError, match="not finite; nor was the batch before written: .*00000.json"):
        list(worker.run_all(batches, overlap=True))
