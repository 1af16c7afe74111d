"""Metrics of any folder of images against a reference folder, also of images this package did not make."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import torch

from operators import RestoreError
from restore import disk
from restore.images import io
from restore.images.folder import list_images, read_image_size, read_rgb, read_sidecar
from restore.metrics import sets, table
from restore.metrics.references import ReferenceSet, load_reference
from restore.metrics.statistics import BootstrapMean, bootstrap_mean
from restore.versions import collect_versions


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a folder, what they were computed on, and what was missing.

    per_image: one row per compared image: `image` and a value per paired metric.
    means: per paired metric the mean over images with its interval; empty if the set is incomplete and that was not
        allowed, as an average over the images that happen to exist is not the number asked for.
    set_values: the set metrics, some with a `_std`; `full_` marks the second reference.
    missing, mismatched, extra: reference images without a result, results of another size, results without a
        reference. failed: id to the reason of images that a paired metric cannot measure, such as too small ones.
        `complete` is true if all but `extra` are empty.
    """

    per_image: list[dict[str, Any]]
    means: dict[str, BootstrapMean]
    set_values: dict[str, float]
    expected: int
    missing: list[str]
    mismatched: list[str]
    extra: list[str]
    failed: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not (self.missing or self.mismatched or self.failed)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON: infinite values (the PSNR of an exact result) and NaN become None."""
        content = {"complete": self.complete, "compared": len(self.per_image), **dataclasses.asdict(self)}
        return json.loads(json.dumps(content), parse_constant=lambda name: None)


def evaluate(
    results: str | os.PathLike,
    reference: str | os.PathLike,
    *,
    metrics: Sequence[str] = ("psnr", "ssim", "lpips"),
    options: table.MetricOptions | None = None,
    full_reference: str | os.PathLike | None = None,
    allow_incomplete: bool = False,
    device: str = "cpu",
    batch_size: int = 16,
    cache: str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare a folder of results with a folder of reference images.

    metrics: names of the table that need no benchmark run, or "module:function". Paired ones compare image by image
        (a result belongs to the reference image of the same name, folders included, suffix aside, or of the name of
        its input, which a side-car of `restore run` tells), the others set against set (names do not matter). Of the
        files that `restore run` and `restore bench` write, only results count: no means, spreads or other samples.
    options: see table.MetricOptions. full_reference: a second, larger set for fid, kid and pr, reported apart with
        the prefix `full_`. allow_incomplete: permit means over fewer images than the reference has. cache: folder of
        reference features, the user's cache if None. progress: called with (done, total) as images are compared.

    Raises RestoreError for folders without images, unknown metrics, missing weights, two results of one reference image
    and sets that are too small or of several sizes, before anything is computed.
    """
    options = options or table.MetricOptions()
    rows = table.select_metrics(metrics)
    for name, row in rows.items():
        if row.kind not in ("paired", "set"):
            raise RestoreError(f"{name} is measured by `restore bench` while it runs, not on folders; leave it out")
    set_metrics = table.select_metrics(metrics, "set")
    found, ignored = list_images(results)
    compared = load_reference(reference, options.reference_size) if len(set_metrics) == len(rows) else None
    truth, ignored_truth = list_images(reference) if compared is None or compared.archive is None else ({}, [])
    if len(set_metrics) < len(rows):
        found = _rename_by_sidecars(found, truth)
    if full_reference is not None and all(row.no_reference for row in set_metrics.values()):
        raise RestoreError(f"metrics must include fid, kid or pr for full_reference, got {', '.join(rows)}; add one")
    protocol: dict[str, Any] = {"versions": collect_versions(), "metrics": table.check_metrics(rows, options)}
    functions = table.load_paired_metrics(rows, options, device)

    notes = [
        f"{len(names)} files are not images and were ignored: {', '.join(names[:5])}"
        for names in (ignored, ignored_truth)
        if names
    ]
    missing, mismatched, extra, common = [], [], [], []
    if functions:
        missing = [key for key in truth if key not in found]
        extra = [key for key in found if key not in truth]
        for key in (key for key in truth if key in found):
            (common if read_image_size(found[key]) == read_image_size(truth[key]) else mismatched).append(key)
        if len(missing) == len(truth):
            raise RestoreError(
                f"{results} and {reference} must share names of images to be compared one by one, got none; rename"
                " them, or give metrics of sets only"
            )
    compared = compared or ReferenceSet(tuple(truth.values()), size=options.reference_size)
    full = None if full_reference is None else load_reference(full_reference, options.reference_size)
    if set_metrics and (allow_incomplete or not (missing or mismatched)):
        files = [found[key] for key in common] if functions else list(found.values())
        sets.check_results(files, options)  # now, as comparing image by image may take hours
        for part, of_part in {"reference": compared, "full_reference": full}.items():
            if of_part is not None:
                sets.check_reference(of_part, set_metrics, options, part)
    triples = [(key, found[key], truth[key]) for key in common]
    per_image, failed = compare_images(triples, functions, batch_size, progress)
    protocol["reference"] = compared.describe()

    usable = allow_incomplete or not (missing or mismatched or failed)
    averaged = functions if per_image and usable else {}
    means = {name: bootstrap_mean([row[name] for row in per_image]) for name in averaged}
    set_values: dict[str, float] = {}
    if set_metrics and not usable:
        notes.append("set metrics were not computed, as the results are incomplete")
    elif set_metrics:
        files = [found[row["image"]] for row in per_image] if functions else list(found.values())
        if full is not None:
            protocol["full_reference"] = full.describe()
        cache = Path(cache) if cache else sets.default_cache_dir()
        shared = {"full_reference": full, "device": device, "batch_size": batch_size, "cache": cache}
        set_values = sets.compute_set_metrics(files, compared, set_metrics, options, **shared)
        if min(len(files), len(compared)) < sets.MINIMUM_IMAGES and compared.statistics is None:
            notes.append(f"set metrics of {len(files)} against {len(compared)} images: too few to compare with papers")
    expected = len(truth) if functions else len(found)
    return Evaluation(per_image, means, set_values, expected, missing, mismatched, extra, failed, protocol, notes)


def check_output(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Raise RestoreError if `write_evaluation` would replace a file that it did not write, unless `overwrite`."""
    path = Path(path)
    if path.exists() and not overwrite and (read_sidecar(path) or {}).get("files") != [path.name]:
        raise RestoreError(
            f"{path} exists and is no evaluation of this program; give overwrite=True to replace it, or another out="
        )


def write_evaluation(evaluation: Evaluation, path: str | os.PathLike, overwrite: bool = False) -> None:
    """Write an evaluation as JSON, with its own name under `files`. Raises RestoreError as `check_output` does."""
    check_output(path, overwrite)
    disk.write_json(path, {"files": [Path(path).name], **evaluation.to_dict()})


def _rename_by_sidecars(found: Mapping[str, Path], truth: Mapping[str, Path]) -> dict[str, Path]:
    """Results by id; one without a reference takes the id of its input, if a side-car names that and it has one.

    A result of the reference's own name comes first. Raises RestoreError if two others are of one input."""
    renamed = dict(found)
    for key in sorted(found.keys() - truth.keys()):
        sidecar = read_sidecar(found[key].with_suffix(".json")) or {}
        other = PurePosixPath(key).with_name(PurePath(str(sidecar.get("input") or key)).stem).as_posix()
        if other in truth and other not in found:
            if other in renamed:
                raise RestoreError(
                    f"{other} must have one result, got {renamed[other]} and {found[key]}, by their side-cars; try"
                    " moving one to another folder"
                )
            renamed[other] = renamed.pop(key)
    return renamed


def score_images(
    triples: Sequence[tuple[str, Path, str]], functions: Mapping[str, Callable], batch_size: int = 16
) -> list[dict[str, Any]]:
    """Return a row of scores for each (image id, file, prompt).

    functions: name to f(results, prompts), see table.load_scores. Raises RestoreError if one does not return one finite
    number per image.
    """
    rows: list[dict[str, Any]] = []
    while len(rows) < len(triples):
        batch, images = [], []
        for key, path, prompt in triples[len(rows) : len(rows) + batch_size]:
            image = io.to_tensor(read_rgb(path))
            if images and image.shape != images[0].shape:
                break
            batch.append((key, prompt))
            images.append(image)
        values = {}
        for name, function in functions.items():
            values[name] = torch.as_tensor(function(torch.cat(images), [prompt for _, prompt in batch]))
            if values[name].shape != (len(batch),) or not torch.isfinite(values[name]).all():
                raise RestoreError(
                    f"the metric {name} must return (B,) finite numbers, got {tuple(values[name].shape)} for"
                    f" {len(batch)} images"
                )
        rows += [
            {"image": key} | {name: float(of[i]) for name, of in values.items()} for i, (key, _) in enumerate(batch)
        ]
    return rows


def compare_images(
    triples: Sequence[tuple[str, Path, Path]],
    functions: Mapping[str, Callable],
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return a row of paired metrics for each (image id, result file, reference file), and {image id: reason} of those
    for which a metric raised RestoreError, such as images that are too small for it.

    functions: name to f(result, truth), see table.load_paired_metrics. Raises RestoreError if one does not return
    one number per image.
    """
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    done = 0
    while done < len(triples):
        batch, pairs = [], []
        for key, *paths in triples[done : done + batch_size]:
            pair = [torch.from_numpy(read_rgb(path).copy()).permute(2, 0, 1) for path in paths]
            if pairs and pair[0].shape != pairs[0][0].shape:
                break
            batch.append({"image": key})
            pairs.append(pair)
        image, truth = (torch.stack(side).float() / 127.5 - 1 for side in zip(*pairs, strict=True))
        done += len(batch)
        try:
            measured = {name: torch.as_tensor(function(image, truth)) for name, function in functions.items()}
        except RestoreError as error:  # images of one size fail together
            failed |= {row["image"]: str(error) for row in batch}
            continue
        for name, values in measured.items():
            if values.shape != (len(batch),):
                raise RestoreError(
                    f"the metric {name} must return (B,) values, got {tuple(values.shape)} for {len(batch)} images"
                )
            for row, value in zip(batch, values.tolist(), strict=True):
                row[name] = value
        rows += batch
        if progress is not None:
            progress(done, len(triples))
    return rows, failed
