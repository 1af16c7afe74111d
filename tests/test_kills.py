"""kill -9 at twenty random moments of one command: all its results, to the byte, as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import killed
import pytest
import yaml

pytestmark = pytest.mark.slow
KILLS = 20


def contents(folder):
    """Every file but what depends on the clock: pictures as they are, side-cars and rows without what they cost."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        if name.startswith("cost/") or name in ("run.json", "config.yaml", "metrics.json"):
            continue
        if path.suffix == ".json":
            content = {k: v for k, v in json.loads(content).items() if k not in ("seconds", "estimate")}
        found[name] = content
    return found


@pytest.fixture
def commands(tmp_path, tiny_run, smooth_images, write_images):
    write_images(tmp_path / "photos", smooth_images(12, 24, 0))
    run = [
        "run",
        tmp_path / "photos",
        "--task",
        "sr4",
        "--backbone",
        tiny_run["backbone"],
        "--sampler",
        "dps",
        "zeta=0.3",
    ]
    run += ["--steps", 12, "--samples", 2, "--degrade", "--pag-scale", 1, "--layers", "m1", "--device", "cpu"]
    config = tiny_run | {"data": {"folder": str(tmp_path / "photos"), "size": 16}, "samples": 2}
    config |= {"tasks": {"sr": "sr4", "box": "inpaint-box"}, "methods": {"base": {"sampler": "baseline"}}}
    config["methods"]["dps"] = {"sampler": "dps", "steps": 12, "parameters": {"zeta": 0.5}}
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(config))
    return {
        "run": lambda out: [*run, "-o", out],
        "bench": lambda out: ["bench", tmp_path / "b.yaml", f"out={out}"],
    }


@pytest.mark.parametrize("verb", ["run", "bench"])
def test_twenty_kills_change_nothing(commands, tmp_path, verb):
    context, chance = multiprocessing.get_context("forkserver"), random.Random(verb)
    context.set_forkserver_preload(["killed", "restore.restorer"])  # or every child would spend seconds on it

    def start(out):
        child = context.Process(target=killed.command, args=commands[verb](out))
        child.start()
        return child

    start(tmp_path / "first").join()  # where the libraries' own first call is paid
    started = time.monotonic()
    child = start(tmp_path / "undisturbed")
    child.join()
    whole = time.monotonic() - started
    assert child.exitcode == 0
    out, kills, finished, leftovers = tmp_path / "out", 0, 0, 0
    while kills < KILLS or child.exitcode != 0:
        child = start(out)
        child.join(chance.uniform(0, whole / 3) if kills < KILLS else None)
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
            leftovers += len(list(out.rglob(".*.tmp")))
        else:
            assert child.exitcode == 0
            finished += kills < KILLS
            if kills < KILLS:  # too early: once more from the beginning
                shutil.rmtree(out)
    print(f"{verb}: {whole:.1f} s undisturbed, {kills} kills, finished {finished} times before, {leftovers} half files")
    assert not list(out.rglob("*.tmp"))
    assert contents(out) == contents(tmp_path / "undisturbed") and len(contents(out)) > 20
