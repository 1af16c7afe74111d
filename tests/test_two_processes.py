"""Several processes write into one folder: each deletes only what a killed one left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed
import pytest

from operators import RestoreError
from restore import disk
from restore.bench.run import run_benchmark

WRITER = """
import sys, time
from restore import disk
with disk.open_atomic(sys.argv[1]) as file:
    file.write(b"x" * 10)
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is writing tmp_path/a.bin, and its temporary file."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "a.bin")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert process.stdout.readline() == b"writing\n"
    (temporary,) = disk.find_leftovers(tmp_path / "a.bin")
    yield process, temporary
    process.kill()
    process.wait()


def test_only_files_of_killed_processes_are_removed(writer, tmp_path):
    process, temporary = writer
    disk.write_bytes(tmp_path / "a.bin", b"mine")  # at the same time, by this one
    disk.remove_leftovers(tmp_path.glob(disk.LEFTOVER))
    assert temporary.exists() and (tmp_path / "a.bin").read_bytes() == b"mine"
    process.send_signal(signal.SIGKILL)
    process.wait()
    disk.remove_leftovers(tmp_path.glob(disk.LEFTOVER))
    assert not temporary.exists() and [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_long_name_of_wide_characters_can_be_written(tmp_path):
    path = tmp_path / f"{'写' * 80}.png"  # 244 bytes
    disk.write_bytes(path, b"1")
    assert path.read_bytes() == b"1"
    with disk.open_atomic(path) as file:
        assert [str(found) for found in disk.find_leftovers(path)] == [file.name]


def test_a_deleted_temporary_file_is_not_taken_for_a_missing_folder(tmp_path):
    with pytest.raises(RestoreError, match="another program deleted its temporary file"):
        with disk.open_atomic(tmp_path / "a.bin") as file:
            Path(file.name).unlink()


def test_two_drivers_on_one_run_folder(tiny_run, tmp_path, smooth_images, write_images):
    write_images(tmp_path / "photos", smooth_images(6, 16, 0))
    noise = {"name": "gaussian", "sigma": 0.05}
    tasks = {"sr": {"operator": {"name": "super_resolution", "factor": 4, "noise": noise}}}
    methods = {f"base{i}": {"sampler": "baseline"} for i in range(12)}
    config = {**tiny_run, "data": {"folder": str(tmp_path / "photos")}, "tasks": tasks, "methods": methods, "batch": 1}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed", "restore.restorer"])
    children = [context.Process(target=killed.run, args=(config, tmp_path / f"log{i}")) for i in range(3)]
    for child in children:
        child.start()
        time.sleep(0.05)
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0, 0]
    run = Path(config["out"])
    assert not list(run.rglob("*.tmp")) and run_benchmark(config).computed == 0
