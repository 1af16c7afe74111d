"""From the rows of a run to its table: means, set metrics and cost of every task and method."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from operators import RestoreError
from restore import disk
from restore.bench import datasets
from restore.bench.baselines import BASELINES
from restore.bench.batches import image_ids, read_row
from restore.bench.config import method_of, pairs, settings
from restore.images import io
from restore.images.folder import list_images, read_rgb, to_file_name
from restore.metrics import evaluate, sets, table
from restore.metrics.statistics import bootstrap_mean


def check_metrics(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Everything that could fail after the run, before it: weights, references, too few images.

    count: images per task. Returns the protocol's entry.
    """
    wanted, options = config["metrics"], metric_options(config)
    rows = table.select_metrics(wanted["names"])
    of_sets = table.select_metrics(wanted["names"], "set")
    restoration = config["kind"] == "restoration"
    for name in () if restoration else table.select_metrics(wanted["names"], "paired"):
        raise RestoreError(f"{name} compares with a true image, which {config['kind']} has not; leave it out")
    entry = table.check_metrics(table.BASE_METRICS | rows if restoration else rows, options)
    table.load_paired_metrics(rows, options)
    if "coverage" in rows:
        k = config["samples"]
        entry["coverage"] += f"; {(k - 1) / (k + 1):.3f} for exact posterior samples"
    if of_sets:
        sets.check_set_size(count, "results", options.allow_small)
        binary = [name for name, row in of_sets.items() if not row.no_reference]
        if binary and not restoration and not wanted["reference"]:
            raise RestoreError(f"{binary[0]} needs a set to compare with; give metrics.reference=FOLDER")
        if binary and restoration:
            entry["reference"] = f"the {count} true images"
        for key in ("reference", "full_reference"):
            if wanted[key] and binary:
                files = _files(wanted[key])
                sets.check_set_size(len(files), key, options.allow_small)
                entry[key] = {"count": len(files), "sha256": disk.hash_files(files)}
    return entry


def metric_options(config: Mapping[str, Any]) -> table.MetricOptions:
    return table.MetricOptions(**{f.name: config["metrics"][f.name] for f in dataclasses.fields(table.MetricOptions)})


def _files(folder: str) -> list[Path]:
    return list(list_images(folder)[0].values())


def read_rows(run: Path, task: str, method: str, ids: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the finished images in order, and the ids of the others."""
    folder = run / "results" / task / method
    rows, missing = [], []
    for image_id in ids:
        row = read_row(folder / "rows" / f"{to_file_name(image_id)}.json")
        if row is None:
            missing.append(image_id)
        else:
            rows.append(row)
    return rows, missing


def kept_metrics(run: Path, task: str, method: str) -> dict[str, Any]:
    """What `summarise` kept of a cell, `paired` and `set_values` of the images with hash `key`; empty where nothing."""
    found = disk.read_json(run / "metrics" / task / f"{method}.json")
    return found if isinstance(found, dict) else {}


def measured_rows(run: Path, task: str, method: str, ids: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the finished images in order, with the paired metrics that `summarise` kept of them."""
    rows, _ = read_rows(run, task, method, ids)
    paired = kept_metrics(run, task, method).get("paired", {})
    return [row | paired.get(row["image"], {}) for row in rows]


def read_cost(run: Path, task: str, method: str) -> dict[str, Any]:
    """Totals over the batches: seconds per image, network evaluations per sample and second, peak memory."""
    files = sorted((run / "cost" / task / method).glob("*.json"))
    costs = [cost for path in files if isinstance(cost := disk.read_json(path), dict)]
    if not costs:
        return {}
    images, seconds = sum(c["images"] for c in costs), sum(c["seconds"] for c in costs)
    writing = sum(c["seconds_writing"] for c in costs)
    cpu = [c["cpu_seconds"] for c in costs if "cpu_seconds" in c]  # runs of earlier versions have none
    peaks = [c["peak_memory_mb"] for c in costs if c["peak_memory_mb"] is not None]
    steps = count_steps(costs[0]["steps"])
    return {
        "images": images,
        "seconds_per_image": seconds / images,
        "cpu_seconds_per_image": sum(cpu) / images if len(cpu) == len(costs) else None,
        "overhead": writing / (seconds + writing),
        "nfe": costs[0]["nfe"],
        # One batch advances all its images by one step, so iterations are counted per batch (PAG, Table 6).
        "iterations_per_second": steps * len(costs) / seconds if steps else None,
        "peak_memory_mb": max(peaks) if peaks else None,
        "memory_of": costs[0]["memory_of"],
        "devices": sorted({c["device"] for c in costs}),
        "protocols": [json.loads(text) for text in sorted({json.dumps(c["protocol"], sort_keys=True) for c in costs})],
    }


def count_steps(spec: Any) -> int | None:
    """How many steps "25", "ddim25" or "10,10,5" are; None where the sampler alone knows."""
    parts = [part.removeprefix("ddim") for part in str(spec).rpartition(":")[2].split(",")]
    return sum(map(int, parts)) if all(part.isdigit() for part in parts) else None


def summarise(
    run: Path, config: Mapping[str, Any], images: datasets.ImageSet | None, device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Metrics of every (task, method) of a run, written to metrics.json and returned.

    What needs networks or files is computed where it is not kept already. Incomplete cells carry `missing`; their
    means say over how many images they are, set metrics are left out.
    """
    cells: dict[str, Any] = {}
    rows_of = table.select_metrics(config["metrics"]["names"], "paired", "set", "pairs")
    later = {name: row for name, row in rows_of.items() if name not in table.BASE_METRICS}
    functions: dict[str, Callable] | None = None
    for task, method in pairs(config):
        ids = image_ids(config, task, images)
        rows, missing = read_rows(run, task, method, ids)
        cell: dict[str, Any] = {"expected": len(ids), "done": len(rows), "missing": len(missing)}
        cell["cost"] = read_cost(run, task, method)
        key, found = _key(config, later, rows), kept_metrics(run, task, method)
        if found.get("key") != key:
            found = {}
            if rows and later:
                if progress is not None:
                    progress(f"{task}, {method}")
                if functions is None:
                    functions = table.load_paired_metrics(later, metric_options(config), device)
                found = _from_files(run, config, task, method, rows, not missing, functions, device) | {"key": key}
                disk.write_json(disk.make_folder(run / "metrics" / task) / f"{method}.json", found)
        for row in rows:
            row.update(found.get("paired", {}).get(row["image"], {}))
        cell["means"] = _means(rows, rows_of)
        cell["set_values"] = found.get("set_values", {})
        cells.setdefault(task, {})[method] = cell
    own = {name: [r.label, r.better, r.digits, r.meaning] for name, r in rows_of.items() if ":" in name}
    result = {"table": cells, "metrics": config["metrics"]["names"], "shown": own}
    disk.write_json(run / "metrics.json", result)
    return result


def _means(rows: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]) -> dict[str, Any]:
    means = {}
    for name in {**table.BASE_METRICS, **{n: r for n, r in table.METRICS.items() if r.kind == "samples"}, **asked}:
        values = [math.inf if row[name] is None else row[name] for row in rows if name in row]
        if values:
            estimate = dataclasses.asdict(bootstrap_mean(values))
            means[name] = {k: v if isinstance(v, int) or math.isfinite(v) else None for k, v in estimate.items()}
    return means


def _key(config: Mapping[str, Any], metrics: Mapping[str, table.Metric], rows: Sequence[Mapping[str, Any]]) -> str:
    """Changes when a result or the way it is measured does: what was computed before is then computed again."""
    own = [source(row.function) for name, row in metrics.items() if ":" in name]
    text = json.dumps([config["metrics"], own, [row["sha256"] for row in rows]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def source(function: Callable) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return repr(function)


def _from_files(run, config, task, method, rows, complete, functions, device) -> dict[str, Any]:
    """Paired metrics per image and the set metrics of one cell, from its PNG files."""
    wanted, options = config["metrics"], metric_options(config)
    folder = run / "results" / task / method
    files = {row["image"]: folder / f"{to_file_name(row['image'])}.png" for row in rows}
    truth = {key: run / "truth" / path.name for key, path in files.items()}
    result: dict[str, Any] = {"paired": {}, "set_values": {}}
    if functions:
        compared = evaluate.compare_images([(key, files[key], truth[key]) for key in files], functions)
        for row in compared:  # JSON has no infinity
            values = {name: row[name] if math.isfinite(row[name]) else None for name in functions}
            result["paired"][row["image"]] = values
    of_sets = table.select_metrics(wanted["names"], "set")
    if complete and wanted["group_by_prompt"]:
        result["set_values"] = _per_prompt(files, wanted, of_sets, options, device)
    elif complete and of_sets:
        reference = list(truth.values()) if config["kind"] == "restoration" else None
        reference = _files(wanted["reference"]) if wanted["reference"] else reference
        full = _files(wanted["full_reference"]) if wanted["full_reference"] else None
        shared = {"full_reference": full, "device": device, "cache": sets.default_cache_dir()}
        result["set_values"] = sets.compute_set_metrics(list(files.values()), reference, of_sets, options, **shared)
    return result


def _per_prompt(files, wanted, of_sets, options, device) -> dict[str, float]:
    """Diversity as in PAG's Table 3: IS and LPIPS between pairs within each prompt, averaged over the prompts."""
    groups: dict[str, list[Path]] = {}
    for key, path in files.items():
        groups.setdefault(key.split("-")[0], []).append(path)
    alone = {name: row for name, row in of_sets.items() if row.no_reference}
    of_pairs = {n: r.function(options, device) for n, r in table.select_metrics(wanted["names"], "pairs").items()}
    sums: dict[str, float] = {}
    for paths in groups.values():
        values = sets.compute_set_metrics(paths, None, alone, options, device=device) if alone else {}
        chosen = torch.stack([io.to_tensor(read_rgb(path))[0] for path in paths[: wanted["pairs"]]])
        values |= {name: function.mean_pairwise(chosen) for name, function in of_pairs.items()}
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value / len(groups)
    return sums


def methods_protocol(config: Mapping[str, Any]) -> dict[str, Any]:
    """Per method and task what it is, for the protocol block: sampler, steps, guidance, parameters."""
    result: dict[str, Any] = {}
    for task, method in pairs(config):
        chosen = settings(config, method, task)
        if chosen["sampler"] in BASELINES:
            said = {"sampler": chosen["sampler"], "parameters": chosen["parameters"]}
        else:
            said = method_of(chosen).describe()
        result.setdefault(method, {})[task] = {key: value for key, value in said.items() if key != "source"}
    # Said once where it is the same for every task.
    return {m: next(iter(v.values())) if len({json.dumps(x, sort_keys=True) for x in v.values()}) == 1 else v
            for m, v in result.items()}  # fmt: skip
