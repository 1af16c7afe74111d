"""Benchmark runs from a configuration: resumable to the batch, on one machine or a cluster."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from operators import RestoreError
from restore import disk
from restore.bench import cluster, datasets, results
from restore.bench.baselines import BASELINES
from restore.bench.batches import Batch, expand, image_ids, load_images, read_row
from restore.bench.config import load_config, pairs, result_part, settings
from restore.bench.protocol import differences, format_differences
from restore.restoration import choose_device
from restore.versions import collect_versions

FORMAT = 2
LEFTOVER = ".*.tmp"  # what a killed process was writing


@dataclass
class Bench:
    """What bench() did. folder: of the run. done: batches computed now; kept: found finished. table: metrics.json.
    damaged: rows that were there and could not be read; their images were computed again."""

    folder: Path
    done: int
    kept: int
    table: dict[str, Any] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Planned:
    """One line of a dry run: what a (task, method) takes. seconds, peak_memory_mb: None where nothing was measured."""

    task: str
    method: str
    batches: int
    images: int
    nfe: int | None
    seconds: float | None
    peak_memory_mb: float | None


def bench(
    config: str | os.PathLike | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    progress: Callable[[dict[str, Any]], None] | None = None,
    only: Callable[[Batch], bool] | None = None,
) -> Bench:
    """Run a benchmark, or what is left of it.

    config: a YAML file or a mapping, see configs/benchmark; overrides: `key=value`. Results go to config.out,
    runs/<name> by default. Images whose row is there are not computed again; an interrupted batch is.
    progress: called with {done, total, batch, seconds} after each batch and {measuring} before network metrics.
    only: which batches to compute now; the images of the others stay missing.
    Raises RestoreError before anything runs for bad configurations, missing images or weights, and for a folder
    that holds results of another configuration, with the difference.
    """
    checked = load_config(config, overrides)
    images = load_images(checked)
    batches = expand(checked, images)
    counts = [len(image_ids(checked, task, images)) for task in checked["tasks"]]
    metrics_entry = results.check_metrics(checked, min(counts))
    folder = Path(checked["out"] or Path("runs") / checked["name"])
    _claim(folder, checked, images, metrics_entry)
    for leftover in folder.rglob(LEFTOVER):  # one run has one driver at a time
        leftover.unlink(missing_ok=True)
    batches = [batch for batch in batches if only is None or only(batch)]
    waiting = [batch for batch in batches if not batch.done(folder)]
    damaged = [path for batch in waiting for path in batch.rows(folder) if path.exists() and read_row(path) is None]
    kept, total, done = len(batches) - len(waiting), len(batches), 0

    def finished(batch: Batch, cost: Mapping[str, Any]) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress({"done": kept + done, "total": total, "batch": batch.key, "seconds": cost["seconds"]})

    if waiting and checked["engine"] == "ray":
        cluster.run_batches(waiting, checked, folder, images, finished)
    elif waiting:
        from restore.bench.worker import Worker

        worker = Worker(checked, folder, images)
        for batch in waiting:
            finished(batch, worker.run(batch))
    measuring = None if progress is None else lambda what: progress({"measuring": what})
    device = str(choose_device(checked["device"])).replace("mps", "cpu")
    table = results.summarise(folder, checked, images, device, measuring)
    return Bench(folder, done, kept, table, [str(path) for path in damaged])


def dry_run(
    config: str | os.PathLike | Mapping[str, Any], overrides: Sequence[str] = (), *, measure: bool = True
) -> list[Planned]:
    """What `bench` would do, without doing it.

    measure: time two steps of every (task, method) on this machine, in a folder that is thrown away, and
    extrapolate; the memory is the peak of those steps.
    """
    import tempfile

    from restore.bench.worker import Worker

    checked = load_config(config, overrides)
    images = load_images(checked)
    batches = expand(checked, images)
    results.check_metrics(checked, min(len(image_ids(checked, task, images)) for task in checked["tasks"]))
    folder = Path(checked["out"] or Path("runs") / checked["name"])
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        workers: dict[int, Any] = {}
        for task, method in pairs(checked):
            mine = [batch for batch in batches if (batch.task, batch.method) == (task, method)]
            left = [batch for batch in mine if not batch.done(folder)]
            chosen = settings(checked, method, task)
            steps = results.count_steps(chosen["steps"])
            seconds = memory = nfe = None
            if measure and left and steps is not None:
                # The same batch with one step more: the difference is a step, the rest is fixed cost.
                costs = []
                for n in (1, 1, 2):
                    if n not in workers:
                        workers[n] = Worker(_with_steps(checked, n), Path(scratch) / str(n), images)
                        if n == 2 and 1 in workers:
                            workers[n].loaded = workers[1].loaded
                    costs.append(workers[n].run(left[0]))
                step = max(costs[2]["seconds"] - costs[1]["seconds"], 0.0)
                seconds = len(left) * (costs[1]["seconds"] + (steps - 1) * step)
                memory, nfe = costs[2]["peak_memory_mb"], (costs[2]["nfe"] - costs[1]["nfe"]) * steps
            lines.append(Planned(task, method, len(left), sum(len(batch.ids) for batch in left), nfe, seconds, memory))
    return lines


def _with_steps(config: Mapping[str, Any], n: int) -> dict[str, Any]:
    changed = json.loads(json.dumps(config))
    for method in changed["methods"].values():
        if method["sampler"] not in BASELINES:
            method["steps"] = n
            for entry in method["per_task"].values():
                entry.pop("steps", None)
    return changed


def _claim(folder: Path, config: Mapping[str, Any], images: datasets.ImageSet | None, metrics_entry: dict) -> None:
    """Make the run's folder, or make sure that it holds the same run. Raises RestoreError otherwise."""
    identity = {"config": result_part(config), "images": images.digest if images is not None else None}
    identity["backbone"] = backbone_identity(config)
    identity["prompts"] = {k: disk.hash_file(t["prompts"]) for k, t in config["tasks"].items() if t["prompts"]}
    # Through JSON, so that what is compared is what will be read back.
    identity = json.loads(json.dumps(identity, default=str))
    manifest = folder / "run.json"
    if manifest.exists():
        found = read_manifest(folder)
        changed = differences(found["identity"], identity, circumstances=True)
        if changed:
            raise RestoreError(
                f"{folder} holds results of another configuration ({format_differences(changed)}); give out=FOLDER for"
                " the new one, or undo the change to go on"
            )
        created = found["created"]
    elif folder.exists() and any(not path.match(LEFTOVER) for path in folder.iterdir()):
        raise RestoreError(f"{folder} is not empty and holds no benchmark; give another out=FOLDER")
    else:
        disk.make_folder(folder)
        created = time.strftime("%Y-%m-%d %H:%M:%S %z")
    protocol = {
        "images": images.describe() if images is not None else None,
        "backbone": identity["backbone"],
        "seed": config["seed"],
        "samples": config["samples"],
        "sigma_range": "[-1, 1]",
        "tasks": tasks_protocol(config),
        "methods": results.methods_protocol(config),
        "metrics": metrics_entry,
        "precision": config["precision"],
        "device": choose_device(config["device"]).type,
        "output": "8-bit PNG, clamped and rounded; nothing of the ground truth is pasted in; sample 0 is the result",
        "versions": collect_versions(),
    }
    content = {"format": FORMAT, "created": created, "identity": identity, "protocol": protocol, "config": config}
    disk.write_json(manifest, json.loads(json.dumps(content, default=str)))
    disk.write_bytes(folder / "config.yaml", yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """run.json of a run. Raises RestoreError for no run, a damaged one, or another format."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise RestoreError(f"{folder} holds no benchmark (run.json is missing); give the folder of a run")
    found = disk.read_json(path)
    if not isinstance(found, dict):
        raise RestoreError(f"{path} is damaged; start the run again in another folder")
    if found.get("format") != FORMAT:
        raise RestoreError(
            f"{folder} is of another version of restore (run format {found.get('format')}, this one reads {FORMAT});"
            " finish it with that version, or start again in another folder"
        )
    if (
        not all(isinstance(found.get(key), dict) for key in ("identity", "protocol", "config"))
        or "created" not in found
    ):
        raise RestoreError(f"{path} is damaged: it lacks what a run says of itself; start again in another folder")
    return found


def backbone_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Name and weights' sha256 of every backbone that the run loads; nothing for baselines alone."""
    if all(m["sampler"] in BASELINES for m in config["methods"].values()):
        return {}
    from restore import zoo

    names = {task["backbone"] or config["backbone"] for task in config["tasks"].values()}
    result = {}
    for name in sorted(names):
        path = zoo.locate(name).path
        if path is None:
            path = zoo.pull(name, offline=config["offline"])
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".bin"))
        result[name] = {
            file.name if path.is_file() else file.relative_to(path).as_posix(): disk.hash_file(file) for file in files
        }
    return result


def tasks_protocol(config: Mapping[str, Any]) -> dict[str, Any]:
    """Per task what is measured, with sigma_y named."""
    result = {}
    for name, task in config["tasks"].items():
        entry = {
            key: value for key, value in task.items() if key not in ("title", "note") and value not in (None, "", {})
        }
        sigma = (task["operator"].get("noise") or {}).get("sigma")
        if sigma is not None and math.isfinite(sigma):
            entry["sigma_y"] = sigma
        result[name] = entry
    return result
