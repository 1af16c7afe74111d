"""From the rows of a run to its table: means, set metrics and cost of every (task, method)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import operators
from operators import RestoreError
from restore import disk
from restore.bench.batches import find_truth, list_image_ids, list_prompts, read_row
from restore.bench.config import list_cells
from restore.bench.datasets import ImageSet
from restore.images import io
from restore.images.folder import read_rgb, to_file_name
from restore.metrics import evaluate, sets, table
from restore.metrics.references import load_reference
from restore.metrics.statistics import bootstrap_mean
from restore.versions import hash_own_code

REFERENCES = ("reference", "full_reference")  # keys of the configuration that name folders to compare sets with
SMALL = 64  # pixels; below this side some metrics cannot measure an image


def check_metrics(config: Mapping[str, Any], count: int, images: ImageSet | None = None) -> dict[str, Any]:
    """Return the metrics' entry of the protocol. count: images per task. images: to be compared with, if any.

    Raises RestoreError for everything that would fail after the run: weights, references, too few images, sets of
    several sizes, and images that are too small for a metric, all of them named.
    """
    wanted, options = config["metrics"], metric_options(config)
    rows = table.select_metrics(wanted["names"])
    of_sets = table.select_metrics(wanted["names"], "set")
    is_restoration = config["kind"] == "restoration"
    _check_groups(config, of_sets)
    for name, row in table.select_metrics(wanted["names"], "prompt").items():
        if not row.no_reference and not all(task["prompts"] for task in config["tasks"].values()):
            raise RestoreError(f"{name} compares images with prompts; give kind=text_to_image and a file of prompts")
        table.load_scores({name: row}, options)  # fetched before anything runs, one at a time
    for name in () if is_restoration else table.select_metrics(wanted["names"], "paired"):
        raise RestoreError(f"{name} compares with a true image, which {config['kind']} does not have; leave it out")
    entry = table.check_metrics(table.BASE_METRICS | rows if is_restoration else rows, options)
    functions = table.load_paired_metrics(table.BASE_METRICS | rows if is_restoration else rows, options)
    if images is not None:
        margins = {operators.read_extent(task["operator"])[1] for task in config["tasks"].values()}
        _check_sizes(images, margins, {name: function for name, function in functions.items() if name in table.METRICS})
    if "coverage" in rows:
        k = config["samples"]
        entry["coverage"] += f"; {(k - 1) / (k + 1):.3f} for exact posterior samples"
    if of_sets:
        sets.check_set_size(count, "results", options.allow_small)
        if images is not None and len(set(images.shapes)) > 1:
            shown = ", ".join(f"{width} x {height}" for height, width in sorted(set(images.shapes))[:5])
            raise RestoreError(
                f"images must have one size for {', '.join(of_sets)}, got {shown}; give data.size=PIXELS to bring them"
                " to one, or leave these metrics out"
            )
        relative = [name for name, row in of_sets.items() if not row.no_reference]
        if relative and not is_restoration and not wanted["reference"]:
            raise RestoreError(f"{relative[0]} needs a set to compare with; give metrics.reference=FOLDER")
        if relative and is_restoration:
            entry["reference"] = f"the {count} true images"
        for key in REFERENCES:
            if wanted[key] and relative:
                reference = load_reference(wanted[key], options.reference_size)
                sets.check_reference(reference, of_sets, options, key)
                entry[key] = reference.describe()
    return entry


def _check_groups(config: Mapping[str, Any], of_sets: Mapping[str, table.Metric]) -> None:
    """Raise RestoreError for metrics that are not computed within each prompt, and for those that are nowhere else."""
    wanted, grouped = config["metrics"], config["metrics"]["group_by_prompt"]
    for name, row in of_sets.items() if grouped else ():
        if not row.no_reference:
            raise RestoreError(
                f"{name} compares all images with a reference, which is not done within each prompt; leave it out, or"
                " give metrics.group_by_prompt=false"
            )
    for name in table.select_metrics(wanted["names"], "pairs"):
        if not (grouped and all(task["prompts"] for task in config["tasks"].values())):
            raise RestoreError(
                f"{name} compares the images of one prompt with each other; give metrics.group_by_prompt=true and a"
                " file of prompts"
            )


def _check_sizes(images: ImageSet, margins: set[tuple[int, int]], functions: Mapping[str, Callable]) -> None:
    failed: dict[str, str] = {}
    shapes = {(h, w): [(h - 2 * rows, w - 2 * columns) for rows, columns in margins] for h, w in images.shapes}
    compared = sorted({(shape, seen) for shape in shapes for seen in shapes[shape] if min(seen) < SMALL})
    for (height, width), seen in compared:
        blank = torch.zeros(1, 3, *(max(side, 1) for side in seen))
        try:
            for function in functions.values():
                function(blank, blank)
        except RestoreError as error:
            ids = (key for key, shape in zip(images.ids, images.shapes, strict=True) if shape == (height, width))
            failed |= dict.fromkeys(ids, str(error))
    if failed:
        raise RestoreError(
            f"{len(failed)} of {len(images)} images cannot be measured: {_shorten_reasons(failed)}; remove them, leave"
            " the metric out, or give data.size=PIXELS"
        )


def _shorten_reasons(failed: Mapping[str, str], limit: int = 10) -> str:
    parts = [f"{key} ({reason})" for key, reason in list(failed.items())[:limit]]
    return ", ".join(parts + ["..."] * (len(failed) > limit))


def metric_options(config: Mapping[str, Any]) -> table.MetricOptions:
    """Return the options of the metrics that a configuration sets."""
    options = {f.name: config["metrics"][f.name] for f in dataclasses.fields(table.MetricOptions)}
    return table.MetricOptions(**options | {"offline": options["offline"] or config["offline"]})


def read_metrics(run: Path, task: str, method: str) -> dict[str, Any]:
    """Return what `write_metrics` stored of a cell: `paired` and `set_values` of the images with hash `key`; {} if
    there is nothing."""
    stored = disk.read_json(run / "metrics" / task / f"{method}.json")
    return stored if isinstance(stored, dict) else {}


def read_rows(run: Path, task: str, method: str, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of the finished images in order, with the paired metrics that `write_metrics` stored."""
    paired = read_metrics(run, task, method).get("paired", {})
    return [row | paired.get(row["image"], {}) for row in _read_own_rows(run, task, method, ids)]


def _read_own_rows(run: Path, task: str, method: str, ids: Sequence[str]) -> list[dict[str, Any]]:
    folder = run / "results" / task / method / "rows"
    rows = (read_row(folder / f"{to_file_name(image_id)}.json") for image_id in ids)
    return [row for row in rows if row is not None]


def read_cost(run: Path, task: str, method: str) -> dict[str, Any]:
    """Return totals over the batches: seconds per image, network evaluations per sample and second, peak memory."""
    files = sorted((run / "cost" / task / method).glob("*.json"))
    costs = [cost for path in files if isinstance(cost := disk.read_json(path), dict)]
    if not costs:
        return {}
    images, seconds = sum(c["images"] for c in costs), sum(c["seconds"] for c in costs)
    writing = sum(c["seconds_writing"] for c in costs)
    cpu = [c["cpu_seconds"] for c in costs if "cpu_seconds" in c]  # runs of earlier versions have none
    peaks = [c["peak_memory_mb"] for c in costs if c["peak_memory_mb"] is not None]
    steps, loops = count_steps(costs[0]["steps"]), [c.get("seconds_loop") for c in costs]
    used = [c["process_memory_mb"] for c in costs if c.get("process_memory_mb") is not None]
    return {
        "images": images,
        "seconds_per_image": seconds / images,
        "cpu_seconds_per_image": sum(cpu) / images if len(cpu) == len(costs) else None,
        "overhead": writing / (seconds + writing),
        "nfe": costs[0]["nfe"],
        # One batch advances all its images by one step, so iterations are counted per batch (PAG, Table 6).
        "iterations_per_second": steps * len(costs) / seconds if steps else None,
        "loop_steps_per_second": steps * len(costs) / sum(loops) if steps and all(loops) else None,
        "process_memory_mb": max(used) if used else None,
        "peak_memory_mb": max(peaks) if peaks else None,
        "memory_of": costs[0]["memory_of"],
        "devices": sorted({c["device"] for c in costs}),
        "protocols": [json.loads(text) for text in sorted({json.dumps(c["protocol"], sort_keys=True) for c in costs})],
    }


def count_steps(steps: Any) -> int | None:
    """Return the number of steps of "25", "ddim25" or "10,10,5"; None if only the sampler knows it."""
    parts = [part.removeprefix("ddim") for part in str(steps).rpartition(":")[2].split(",")]
    return sum(map(int, parts)) if all(part.isdigit() for part in parts) else None


def write_metrics(
    run: Path, config: Mapping[str, Any], images: ImageSet | None, device: str = "cpu", progress: Callable | None = None
) -> dict[str, Any]:
    """Compute the metrics of every (task, method) of a run, write metrics.json and return its content.

    Metrics that need networks or files are computed unless they are stored; progress is called with the name of each
    cell that needs them. Incomplete cells have `missing` > 0: their means say over how many images they are, and set
    metrics are left out.
    """
    cells: dict[str, Any] = {}
    rows_of = table.select_metrics(config["metrics"]["names"], "paired", "prompt", "set", "pairs")
    to_compute = {name: row for name, row in rows_of.items() if name not in table.BASE_METRICS}
    functions: tuple[dict[str, Callable], dict[str, Callable]] | None = None  # of pairs, of images and prompts
    measuring = _describe_measuring(config, to_compute)
    for task, method in list_cells(config):
        ids = list_image_ids(config, task, images)
        rows = _read_own_rows(run, task, method, ids)
        missing = len(ids) - len(rows)
        key, stored = _hash_inputs(measuring, rows), read_metrics(run, task, method)
        if stored.get("key") != key:
            stored = {}
            if rows and to_compute:
                if progress is not None:
                    progress(f"{task}, {method}")
                if functions is None:
                    loaders, options = (table.load_paired_metrics, table.load_scores), metric_options(config)
                    functions = tuple(load(to_compute, options, device) for load in loaders)
                stored = _measure_files(run, config, task, method, rows, not missing, functions, device) | {"key": key}
                disk.write_json(disk.make_folder(run / "metrics" / task) / f"{method}.json", stored)
        for row in rows:
            row.update(stored.get("paired", {}).get(row["image"], {}))
        cells.setdefault(task, {})[method] = {
            "expected": len(ids),
            "done": len(rows),
            "missing": missing,
            "cost": read_cost(run, task, method),
            "means": _compute_means(rows, rows_of),
            "set_values": stored.get("set_values", {}),
        }
    own = {name: [r.label, r.better, r.digits, r.meaning] for name, r in rows_of.items() if ":" in name}
    result = {"table": cells, "metrics": config["metrics"]["names"], "shown": own}
    disk.write_json(run / "metrics.json", result)
    return result


def _compute_means(rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]) -> dict[str, Any]:
    means = {}
    for name in {**table.BASE_METRICS, **{n: r for n, r in table.METRICS.items() if r.kind == "samples"}, **wanted}:
        values = [math.inf if row[name] is None else row[name] for row in rows if name in row]
        if values:
            estimate = dataclasses.asdict(bootstrap_mean(values))
            means[name] = {k: v if isinstance(v, int) or math.isfinite(v) else None for k, v in estimate.items()}
    return means


def _describe_measuring(config: Mapping[str, Any], metrics: Mapping[str, table.Metric]) -> list[Any]:
    """Return how results are measured, ready for JSON: weights, references and code with their contents, as the files
    behind a path may have been replaced."""
    wanted = config["metrics"]
    references = {key: load_reference(wanted[key]).hash() for key in REFERENCES if wanted[key] and metrics}
    return [wanted, table.check_metrics(metrics, metric_options(config)), references, hash_own_code(dict(metrics))]


def _hash_inputs(measuring: Sequence[Any], rows: Sequence[Mapping]) -> str:
    """Return a hash of the results and of how they are measured: what is stored under another one is computed again."""
    text = json.dumps([measuring, [(row["sha256"], row.get("files")) for row in rows]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _measure_files(run, config, task, method, rows, complete: bool, functions, device) -> dict[str, Any]:
    """Paired metrics per image, and the set metrics of a complete cell, from its PNG files."""
    wanted, options = config["metrics"], metric_options(config)
    folder = run / "results" / task / method
    files = {row["image"]: folder / f"{to_file_name(row['image'])}.png" for row in rows}
    truth = {key: find_truth(run, task, path.stem) for key, path in files.items()}
    result: dict[str, Any] = {"paired": {}, "set_values": {}}
    functions, of_prompts = functions
    if functions:
        compared, failed = evaluate.compare_images([(key, files[key], truth[key]) for key in files], functions)
        if failed:
            raise RestoreError(f"{len(failed)} images cannot be measured: {_shorten_reasons(failed)}")
        for row in compared:
            values = {name: row[name] if math.isfinite(row[name]) else None for name in functions}
            result["paired"][row["image"]] = values  # JSON has no infinity
    if of_prompts:
        prompts = list_prompts(config, task, list(files))
        for row in evaluate.score_images(list(zip(files, files.values(), prompts, strict=True)), of_prompts):
            result["paired"].setdefault(row.pop("image"), {}).update(row)
    of_sets = table.select_metrics(wanted["names"], "set")
    if complete and wanted["group_by_prompt"]:
        result["set_values"] = _measure_prompts(files, wanted, of_sets, options, device)
    elif complete and of_sets:
        reference = list(truth.values()) if config["kind"] == "restoration" else None
        reference = load_reference(wanted["reference"], options.reference_size) if wanted["reference"] else reference
        full = load_reference(wanted["full_reference"], options.reference_size) if wanted["full_reference"] else None
        shared = {"full_reference": full, "device": device, "cache": sets.default_cache_dir()}
        result["set_values"] = sets.compute_set_metrics(list(files.values()), reference, of_sets, options, **shared)
    return result


def _measure_prompts(files, wanted, of_sets, options, device) -> dict[str, float]:
    """Diversity as in PAG's Table 3: IS and LPIPS between pairs within each prompt, averaged over the prompts."""
    groups: dict[str, list[Path]] = {}
    for key, path in files.items():
        groups.setdefault(key.split("-")[0], []).append(path)
    of_sets = {name: row for name, row in of_sets.items() if row.no_reference}
    of_pairs = {n: r.function(options, device) for n, r in table.select_metrics(wanted["names"], "pairs").items()}
    sums: dict[str, float] = {}
    for paths in groups.values():
        values = sets.compute_set_metrics(paths, None, of_sets, options, device=device) if of_sets else {}
        pictures = torch.stack([io.to_tensor(read_rgb(path))[0] for path in paths[: wanted["pairs"]]])
        values |= {name: function.mean_pairwise(pictures) for name, function in of_pairs.items()}
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value / len(groups)
    return sums
