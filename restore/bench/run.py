"""Benchmark runs from a configuration: resumable to the batch, on one machine or a cluster."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import operators
from operators import RestoreError
from operators.naming import AUTO
from restore import disk
from restore.backbones.precision import choose_precision, name_precision
from restore.bench import cluster, results
from restore.bench.baselines import BASELINES
from restore.bench.batches import Batch, find_prompts, list_image_ids, load_images, make_batches, read_row
from restore.bench.config import build_method, list_cells, load_config, select_result_keys
from restore.bench.datasets import ImageSet
from restore.bench.growth import restrict_identity
from restore.bench.protocol import check_folder
from restore.restoration import choose_device
from restore.versions import collect_versions, hash_own_code

FORMAT = 2


@dataclass
class BenchmarkRun:
    """What run_benchmark did.

    folder: of the run. computed, reused: batches computed now, and found finished. table: the content of metrics.json.
    damaged: rows that could not be read; their images were computed again.
    """

    folder: Path
    computed: int
    reused: int
    table: dict[str, Any] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PlannedCell:
    """What a (task, method) takes. nfe, seconds, peak_memory_mb: None if nothing was measured."""

    task: str
    method: str
    batches: int
    images: int
    nfe: int | None
    seconds: float | None
    peak_memory_mb: float | None


def run_benchmark(
    config: str | os.PathLike | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    progress: Callable[[dict[str, Any]], None] | None = None,
    only: Callable[[Batch], bool] | None = None,
) -> BenchmarkRun:
    """Run a benchmark, or what is left of it.

    config: a YAML file or a mapping, see configs/benchmark; overrides: `key=value`. Results go to config.out,
    runs/<name> by default. Images whose row exists are not computed again; an interrupted batch is. A finished run
    grows by what its configuration has more: images, methods, tasks.
    progress: called with {done, total, batch, seconds} after each batch and {measuring} before network metrics.
    only: which batches to compute now; the images of the others stay missing.
    Raises RestoreError before anything runs for bad configurations, missing images or weights, and for a folder
    that holds another run, with the difference.
    """
    config, folder, images, batches, metrics = _prepare(config, overrides)
    _open_folder(folder, config, images, metrics)
    disk.remove_leftovers(folder.rglob(disk.LEFTOVER))
    batches = [batch for batch in batches if only is None or only(batch)]
    waiting = [batch for batch in batches if not batch.is_done(folder)]
    rows = [path for batch in waiting for path in batch.row_paths(folder)]
    damaged = [str(path) for path in rows if path.exists() and read_row(path) is None]
    reused = done = len(batches) - len(waiting)

    def finish(batch: Batch, cost: Mapping[str, Any]) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress({"done": done, "total": len(batches), "batch": batch.key, "seconds": cost["seconds"]})

    if waiting and config["engine"] == "ray":
        cluster.run_batches(waiting, config, folder, images, finish)
    elif waiting:
        from restore.bench.worker import Worker

        worker = Worker(config, folder, images)
        for batch, cost in worker.run_all(waiting):
            finish(batch, cost)
        worker.unload()
    measuring = None if progress is None else lambda cell: progress({"measuring": cell})
    device = str(choose_device(config["device"])).replace("mps", "cpu")
    table = results.write_metrics(folder, config, images, device, measuring)
    return BenchmarkRun(folder, done - reused, reused, table, damaged)


def plan_benchmark(
    config: str | os.PathLike | Mapping[str, Any], overrides: Sequence[str] = (), *, measure: bool = True
) -> list[PlannedCell]:
    """Return what `run_benchmark` would compute, for every (task, method).

    measure: time two steps of each on this machine, in a temporary folder, and extrapolate; the memory is the peak of
    those steps.
    """
    from restore.bench.worker import Worker

    (config, folder, images, batches, _), cells = _prepare(config, overrides), []
    with tempfile.TemporaryDirectory() as scratch:
        workers: dict[int, Worker] = {}

        def measure_steps(batch: Batch, n: int) -> dict[str, Any]:
            if n not in workers:
                workers[n] = Worker(_set_steps(config, n), Path(scratch) / str(n), images)
                workers[n].loaded = workers[1].loaded
            return workers[n].run(batch)

        for task, method in list_cells(config):
            left = [b for b in batches if (b.task, b.method) == (task, method) and not b.is_done(folder)]
            steps = results.count_steps(build_method(config, task, method).steps)
            seconds = memory = nfe = None
            if measure and left and steps is not None:
                # The same batch with one step more: the difference is a step, the rest is fixed cost.
                _, first, second = (measure_steps(left[0], n) for n in (1, 1, 2))
                step = max(second["seconds"] - first["seconds"], 0.0)
                seconds = len(left) * (first["seconds"] + (steps - 1) * step)
                memory, nfe = second["peak_memory_mb"], (second["nfe"] - first["nfe"]) * steps
            count = sum(len(batch.ids) for batch in left)
            cells.append(PlannedCell(task, method, len(left), count, nfe, seconds, memory))
    return cells


def _prepare(config: Any, overrides: Sequence[str]) -> tuple[dict, Path, ImageSet | None, list[Batch], dict]:
    """Return the complete configuration, the run's folder, its images, batches, and the protocol's entry of metrics.

    precision=auto becomes what this machine computes fast, batch=auto what its memory allows, or what the run in the
    folder has: all workers use it, and the protocol has it.
    """
    config = load_config(config, overrides)
    config["precision"] = name_precision(choose_precision(config["precision"], choose_device(config["device"])))
    folder, images = Path(config["out"] or Path("runs") / config["name"]), load_images(config)
    if config["batch"] == AUTO:
        config["batch"] = _find_batch(config, folder, images)
    batches = make_batches(config, images)
    count = min(len(list_image_ids(config, task, images)) for task in config["tasks"])
    return config, folder, images, batches, results.check_metrics(config, count, images)


def _find_batch(config: Mapping[str, Any], folder: Path, images: ImageSet) -> int:
    """Return the batch of the run in the folder, so that one that is continued keeps its batches, or what memory
    allows."""
    if (folder / "run.json").exists():
        return read_manifest(folder)["identity"]["config"]["batch"]
    from restore.bench.batch_size import choose_batch  # it loads the backbone

    return choose_batch(config, images)


def _set_steps(config: Mapping[str, Any], n: int) -> dict[str, Any]:
    config = copy.deepcopy(dict(config))
    for method in config["methods"].values():
        if method["sampler"] not in BASELINES:
            method["steps"] = n
            for entry in method["per_task"].values():
                entry.pop("steps", None)
    return config


def _open_folder(folder: Path, config: Mapping[str, Any], images: ImageSet | None, metrics: dict) -> None:
    """Make the run's folder, or check that it holds this run or a part of it. Raises RestoreError otherwise."""
    identity = {
        "config": select_result_keys(config),
        "images": images.digest if images is not None else None,
        "backbone": hash_backbones(config),
        "prompts": {
            name: disk.hash_file(find_prompts(task["prompts"]))
            for name, task in config["tasks"].items()
            if task["prompts"]
        },
    }
    if code := hash_code(config):
        identity["code"] = code
    identity = _to_json(identity)  # compare what will be read back
    manifest = folder / "run.json"
    existing = read_manifest(folder) if manifest.exists() else {}
    part = identity
    if existing:
        count = (existing["protocol"]["images"] or {}).get("count")
        part = restrict_identity(identity, images, existing["identity"], count, config["metrics"]["group_by_prompt"])
    check_folder(folder, existing.get("identity"), part, "benchmark")
    disk.make_folder(folder)
    created = existing.get("created") or time.strftime("%Y-%m-%d %H:%M:%S %z")
    protocol = {
        "images": images.describe() if images is not None else None,
        "backbone": identity["backbone"],
        "seed": config["seed"],
        "samples": config["samples"],
        "sigma_range": "[-1, 1]",
        "tasks": describe_tasks(config),
        "methods": describe_methods(config),
        "metrics": metrics,
        "precision": config["precision"],
        "device": choose_device(config["device"]).type,
        "output": "8-bit PNG, clamped and rounded; nothing of the ground truth is pasted in; sample 0 is the result",
        "versions": collect_versions(),
    }
    content = {"format": FORMAT, "created": created, "identity": identity, "protocol": protocol, "config": config}
    disk.write_json(manifest, _to_json(content))
    disk.write_bytes(folder / "config.yaml", yaml.safe_dump(_to_json(config), sort_keys=False).encode())


def _to_json(content: Any) -> Any:
    return json.loads(json.dumps(content, default=str))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return run.json of a run. Raises RestoreError if it is missing, damaged or of another format."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise RestoreError(f"{folder} holds no benchmark (run.json is missing); give the folder of a run")
    manifest = disk.read_json(path)
    if not isinstance(manifest, dict):
        raise RestoreError(f"{path} is damaged; start the run again in another folder")
    if manifest.get("format") != FORMAT:
        raise RestoreError(
            f"{folder} is of another version of restore (run format {manifest.get('format')}, this one reads {FORMAT});"
            " finish it with that version, or start again in another folder"
        )
    sections = ("identity", "protocol", "config")
    if "created" not in manifest or not all(isinstance(manifest.get(key), dict) for key in sections):
        raise RestoreError(f"{path} is damaged: created, {', '.join(sections)} are required; start in another folder")
    return manifest


def hash_backbones(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return {backbone: {file: sha256}} of every backbone that the run loads, weak models of guidance included; {} if
    there are only baselines."""
    if all(m["sampler"] in BASELINES for m in config["methods"].values()):
        return {}
    from restore import zoo

    names = {task["backbone"] or config["backbone"] for task in config["tasks"].values()}
    for cell in list_cells(config):  # the weak models of autoguidance
        guidance = build_method(config, *cell).guidance
        names |= {term.model for term in (guidance.terms if guidance else ()) if hasattr(term, "model")}
    options = {"offline": config["offline"] or None, "configuration": True, "variant": config["pipeline"]["variant"]}
    return {name: zoo.hash_weights(name, **options) for name in sorted(names)}


def hash_code(config: Mapping[str, Any]) -> dict[str, str]:
    """Return {module: sha256} of the code from outside the package that decides the results; {} without any."""
    operators = [task["operator"] for task in config["tasks"].values()]
    return hash_own_code(operators, [build_method(config, *cell) for cell in list_cells(config)])


def describe_tasks(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return per task, for the protocol, what is measured, with sigma_y named."""
    described = {}
    for name, task in config["tasks"].items():
        entry = {k: value for k, value in task.items() if k not in ("title", "note") and value not in (None, "", {})}
        sigma = (task["operator"].get("noise") or {}).get("sigma")
        described[name] = entry | ({} if sigma is None or not math.isfinite(sigma) else {"sigma_y": sigma})
        if code := hash_own_code(task["operator"]):
            described[name]["code"] = code
        margin = operators.read_extent(task["operator"])[1] if config["kind"] == "restoration" else (0, 0)
        if any(margin):  # at each side of the image, which the measurement does not show and nothing is compared with
            described[name]["margin"] = "of each kernel" if task["per_image"] else list(margin)
    return described


def describe_methods(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return per method, for the protocol, its sampler, steps, guidance and parameters; per task if they differ."""
    described: dict[str, Any] = {}
    for task, name in list_cells(config):
        method = build_method(config, task, name)
        if method.sampler in BASELINES:
            entry = {"sampler": method.sampler, "parameters": method.parameters}
        else:
            entry = {key: value for key, value in method.describe().items() if key != "source"}
            if code := hash_own_code(method):
                entry["code"] = code
        described.setdefault(name, {})[task] = entry
    for name, entries in described.items():
        first, *others = entries.values()
        if all(json.dumps(entry, sort_keys=True) == json.dumps(first, sort_keys=True) for entry in others):
            described[name] = first
    return described
