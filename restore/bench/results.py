"""From the rows of a run to its table: means, set metrics and cost of every task and method."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from operators import RestoreError
from restore import atomic
from restore.bench import datasets
from restore.bench.batches import image_ids
from restore.bench.config import BASELINES, RUN_METRICS, pairs, settings
from restore.metrics import evaluate, sets, single
from restore.metrics.statistics import bootstrap
from restore.metrics.weights import describe_weights

PER_IMAGE = ("psnr", "ssim", "lpips", "residual_ratio", "spread", "coverage")


def check_metrics(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Everything that could fail after the run, before it: weights, references, too few images.

    count: images per task. Returns the protocol's entry.
    """
    wanted = config["metrics"]
    paired, of_sets = evaluate.split_metrics([m for m in wanted["names"] if m not in RUN_METRICS])
    restoration = config["kind"] == "restoration"
    if paired and not restoration:
        raise RestoreError(f"{paired[0]} compares with a true image, which {config['kind']} has not; leave it out")
    entry: dict[str, Any] = single.definitions(wanted["lpips_net"] if "lpips" in paired else None)
    if not restoration:
        entry.pop("psnr"), entry.pop("ssim")
    if "lpips" in paired or "lpips_pairs" in wanted["names"]:
        lpips = single.LPIPS(wanted["lpips_net"], wanted["weights"])
        name = {"alex": "alexnet", "vgg": "vgg16"}[wanted["lpips_net"]]
        entry["lpips_weights"] = describe_weights(name, lpips.path)
    if "spread" in wanted["names"]:
        entry["spread"] = single.SPREAD_DEFINITION
    if "coverage" in wanted["names"]:
        k = config["samples"]
        entry["coverage"] = f"{single.COVERAGE_DEFINITION}; {(k - 1) / (k + 1):.3f} for exact posterior samples"
    if of_sets:
        entry["fidelity"] = sets.check(of_sets, weights=wanted["weights"], pr_network=wanted["pr_network"])
        sets.refuse_few(count, "results", wanted["allow_small"])
        binary = [m for m in of_sets if m != "is"]
        if binary and not restoration and not wanted["reference"]:
            raise RestoreError(f"{binary[0]} needs a set to compare with; give metrics.reference=FOLDER")
        if wanted["fid_layer"] != "2048":
            entry["fid_layer"] = wanted["fid_layer"]
        if binary and restoration:
            entry["reference"] = f"the {count} true images"
        for key in ("reference", "full_reference"):
            if wanted[key] and binary:
                files, _ = list_images(wanted[key])
                sets.refuse_few(len(files), key, wanted["allow_small"])
                entry[key] = {"count": len(files), "sha256": content_hash(list(files.values()))}
    return entry


def read_rows(run: Path, task: str, method: str, ids: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the finished images in order, and the ids of the others."""
    folder = run / "results" / task / method
    rows, missing = [], []
    for image_id in ids:
        path = folder / "rows" / f"{file_name(image_id)}.json"
        if path.exists() and (folder / f"{file_name(image_id)}.png").exists():
            rows.append(json.loads(path.read_text(encoding="utf-8")))
        else:
            missing.append(image_id)
    return rows, missing


def read_cost(run: Path, task: str, method: str) -> dict[str, Any]:
    """Totals over the batches: seconds per image, network evaluations per sample and second, peak memory."""
    files = sorted((run / "cost" / task / method).glob("*.json"))
    costs = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    if not costs:
        return {}
    images, seconds = sum(c["images"] for c in costs), sum(c["seconds"] for c in costs)
    writing = sum(c["seconds_writing"] for c in costs)
    peaks = [c["peak_memory_mb"] for c in costs if c["peak_memory_mb"] is not None]
    steps = (
        int(str(costs[0]["steps"]).removeprefix("ddim"))
        if str(costs[0]["steps"] or "").removeprefix("ddim").isdigit()
        else 0
    )
    return {
        "images": images,
        "seconds_per_image": seconds / images,
        "overhead": writing / (seconds + writing),
        "nfe": costs[0]["nfe"],
        # One batch advances all its images by one step, so iterations are counted per batch (PAG, Table 6).
        "iterations_per_second": steps * len(costs) / seconds if steps else None,
        "peak_memory_mb": max(peaks) if peaks else None,
        "memory_of": costs[0]["memory_of"],
        "devices": sorted({c["device"] for c in costs}),
    }


def summarise(
    run: Path, config: Mapping[str, Any], images: datasets.ImageSet | None, device: str = "cpu",
    progress: Callable[[str], None] | None = None, with_networks: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Metrics of every (task, method) of a run, written to metrics.json and returned.

    with_networks: compute LPIPS and the set metrics where they are not kept already; False reads what there is.
    Incomplete cells carry `missing`; their means say over how many images they are, set metrics are left out.
    """
    table: dict[str, Any] = {}
    lpips: single.LPIPS | None = None
    for task, method in pairs(config):
        ids = image_ids(config, task, images)
        rows, missing = read_rows(run, task, method, ids)
        cell: dict[str, Any] = {"expected": len(ids), "done": len(rows), "missing": len(missing)}
        cell["cost"] = read_cost(run, task, method)
        kept = run / "metrics" / task / f"{method}.json"
        key = _key(config, rows)
        networks = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        if networks.get("key") != key:
            networks = {}
            if with_networks and rows and needs_networks(config, method, task):
                if progress is not None:
                    progress(f"{task}, {method}")
                if lpips is None and {"lpips", "lpips_pairs"} & set(config["metrics"]["names"]):
                    lpips = single.LPIPS(config["metrics"]["lpips_net"], config["metrics"]["weights"], device)
                networks = _networks(run, config, task, method, rows, not missing, lpips, device) | {"key": key}
                kept.parent.mkdir(parents=True, exist_ok=True)
                atomic.write_json(kept, networks)
        for row in rows:
            if row["image"] in networks.get("lpips", {}):
                row["lpips"] = networks["lpips"][row["image"]]
        cell["means"] = _means(rows)
        cell["set_values"] = networks.get("set_values", {})
        table.setdefault(task, {})[method] = cell
    result = {"table": table, "metrics": config["metrics"]["names"]}
    atomic.write_json(run / "metrics.json", result)
    return result


def needs_networks(config: Mapping[str, Any], method: str, task: str) -> bool:
    names = set(config["metrics"]["names"])
    return bool(names & {"lpips", "lpips_pairs", *sets.SET_METRICS})


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means = {}
    for name in PER_IMAGE:
        if not any(name in row for row in rows):
            continue
        values = [math.inf if row[name] is None else row[name] for row in rows if name in row]
        estimate = bootstrap(values).to_dict()
        means[name] = {k: v if isinstance(v, int) or math.isfinite(v) else None for k, v in estimate.items()}
    return means


def _key(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Changes when a result or the way it is measured does: what was computed before is then computed again."""
    text = json.dumps([config["metrics"], [row["sha256"] for row in rows]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _networks(run, config, task, method, rows, complete, lpips, device) -> dict[str, Any]:
    """LPIPS per image and the set metrics of one cell, from its PNG files."""
    wanted = config["metrics"]
    folder = run / "results" / task / method
    files = {row["image"]: folder / f"{file_name(row['image'])}.png" for row in rows}
    result: dict[str, Any] = {"lpips": {}, "set_values": {}}
    paired, of_sets = evaluate.split_metrics([m for m in wanted["names"] if m not in RUN_METRICS])
    truth = {key: run / "truth" / path.name for key, path in files.items()}
    if "lpips" in paired:
        triples = [(key, files[key], truth[key]) for key in files]
        result["lpips"] = {row["image"]: row["lpips"] for row in evaluate.compare(triples, ["lpips"], lpips)}
    if not complete:
        return result
    options = {"weights": wanted["weights"], "pr_network": wanted["pr_network"], "device": device}
    options |= {
        "fid_layer": wanted["fid_layer"],
        "allow_small": wanted["allow_small"],
        "cache": sets.default_cache(),
    }
    if wanted["group_by_prompt"]:
        result["set_values"] = _per_prompt(files, wanted, of_sets, lpips, options)
    elif of_sets:
        reference = list(truth.values()) if config["kind"] == "restoration" else None
        if wanted["reference"]:
            reference = list(list_images(wanted["reference"])[0].values())
        result["set_values"] = sets.set_metrics(list(files.values()), reference, of_sets, **options)
        binary = [m for m in of_sets if m != "is"]
        if wanted["full_reference"] and binary:
            full = list(list_images(wanted["full_reference"])[0].values())
            values = sets.set_metrics(list(files.values()), full, binary, **options)
            result["set_values"] |= {f"full_{name}": value for name, value in values.items()}
    return result


def _per_prompt(files, wanted, of_sets, lpips, options) -> dict[str, float]:
    """Diversity as in PAG's Table 3: IS and LPIPS between pairs within each prompt, averaged over the prompts."""
    groups: dict[str, list[Path]] = {}
    for key, path in files.items():
        groups.setdefault(key.split("-")[0], []).append(path)
    sums: dict[str, float] = {}
    for paths in groups.values():
        values = sets.set_metrics(paths, None, ["is"], **options) if "is" in of_sets else {}
        if lpips is not None and "lpips_pairs" in wanted["names"]:
            import numpy as np

            chosen = paths[: wanted["pairs"]]
            values["lpips_pairs"] = lpips.pairwise(np.stack([read_rgb(path) for path in chosen]))
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value / len(groups)
    return sums


def methods_protocol(config: Mapping[str, Any]) -> dict[str, Any]:
    """Per method and task what it is, for the protocol block: sampler, steps, guidance, parameters."""
    result: dict[str, Any] = {}
    for task, method in pairs(config):
        chosen = settings(config, method, task)
        if chosen["sampler"] in BASELINES:
            chosen = {"sampler": chosen["sampler"], "parameters": chosen["parameters"]}
        result.setdefault(method, {})[task] = chosen
    # Said once where it is the same for every task.
    return {m: next(iter(v.values())) if len({json.dumps(x, sort_keys=True) for x in v.values()}) == 1 else v
            for m, v in result.items()}  # fmt: skip
