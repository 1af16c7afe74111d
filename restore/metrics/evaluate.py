"""Metrics of any folder of images against a reference folder, also of images this package did not make."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from operators import RestoreError
from restore import disk
from restore.images.folder import image_size, list_images, read_rgb
from restore.metrics import sets, table
from restore.metrics.statistics import Estimate, bootstrap
from restore.versions import collect_versions


@dataclass(frozen=True)
class Evaluation:
    """What was measured, on what, and what was not there.

    per_image: one row per compared image: `image` and a value per paired metric.
    means: per paired metric the mean over images with its interval; empty when the set is incomplete and that was
        not allowed, as an average over whatever happens to exist is not the number asked for.
    set_values: the set metrics asked for, some with a `_std`; `full_` marks the second reference.
    missing, mismatched, extra: reference images without a result, results of another size, results without a
        reference. `complete` is true when the first two are empty.
    """

    per_image: list[dict[str, Any]]
    means: dict[str, Estimate]
    set_values: dict[str, float]
    expected: int
    missing: list[str]
    mismatched: list[str]
    extra: list[str]
    protocol: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not self.missing and not self.mismatched

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON: infinite values (the PSNR of an exact result) and NaN become None."""
        return _finite({"complete": self.complete, "compared": len(self.per_image), **dataclasses.asdict(self)})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(
    results: str | os.PathLike,
    reference: str | os.PathLike,
    *,
    metrics: Sequence[str] = ("psnr", "ssim", "lpips"),
    full_reference: str | os.PathLike | None = None,
    lpips_net: str = "alex",
    weights: Mapping[str, str | os.PathLike] | None = None,
    pr_network: str = "vgg16",
    allow_small: bool = False,
    allow_incomplete: bool = False,
    device: str = "cpu",
    batch_size: int = 16,
    cache: str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare a folder of results with a folder of reference images.

    metrics: any of the table's that need no benchmark run, or "module:function" of one's own. Paired ones compare
        image by image (a result belongs to the reference image of the same name, folders included, suffix aside),
        the others set against set (names do not matter).
    full_reference: a second, larger set for fid, kid and pr, reported apart with the prefix `full_`.
    lpips_net, weights, pr_network, allow_small: see table.Options. allow_incomplete: permit means over fewer
        images than the reference has. cache: folder of reference features, the user's cache when None.
    progress: called with (done, all) as images are compared.

    Raises RestoreError for folders without images, unknown metrics and missing weights, before anything is computed.
    """
    options = table.Options(lpips_net, dict(weights or {}), pr_network, allow_small=allow_small)
    rows = table.rows(metrics)
    for name, row in rows.items():
        if row.kind not in ("paired", "set"):
            raise RestoreError(f"{name} is measured by `restore bench` while it runs, not on folders; leave it out")
    of_sets = table.rows(metrics, "set")
    found, ignored = list_images(results)
    truth, ignored_truth = list_images(reference)
    protocol: dict[str, Any] = {"versions": collect_versions(), "metrics": table.check(rows, options)}
    functions = table.paired_functions(rows, options, device)

    notes = [f"{len(names)} files are no images and were left out: {', '.join(names[:5])}"
             for names in (ignored, ignored_truth) if names]  # fmt: skip
    missing, mismatched, extra, common = [], [], [], []
    if functions:
        missing = [key for key in truth if key not in found]
        extra = [key for key in found if key not in truth]
        for key in (key for key in truth if key in found):
            (common if image_size(found[key]) == image_size(truth[key]) else mismatched).append(key)
        if not common and len(missing) == len(truth):
            raise RestoreError(
                f"no image in {results} has the name of one in {reference}, so they cannot be compared one by one;"
                " name them alike, or ask for metrics of sets only"
            )
    compared = compare([(key, found[key], truth[key]) for key in common], functions, batch_size, progress)
    protocol["reference"] = {"count": len(truth), "sha256": disk.hash_files(list(truth.values()))}

    complete = not missing and not mismatched
    means = {}
    if compared and (complete or allow_incomplete):
        means = {name: bootstrap([row[name] for row in compared]) for name in functions}
    set_values: dict[str, float] = {}
    if of_sets and not (complete or allow_incomplete):
        notes.append("set metrics were not computed, as the results are incomplete")
    elif of_sets:
        ours = [found[key] for key in common] if functions else list(found.values())
        full = None
        if full_reference is not None:
            full = list(list_images(full_reference)[0].values())
            protocol["full_reference"] = {"count": len(full), "sha256": disk.hash_files(full)}
        where = {"device": device, "batch_size": batch_size, "cache": Path(cache) if cache else sets.default_cache()}
        set_values = against_both(ours, list(truth.values()), full, of_sets, options, **where)
        if min(len(ours), len(truth)) < sets.MINIMUM_IMAGES:
            notes.append(
                f"set metrics on {len(ours)} against {len(truth)} images: too few to compare with others' numbers"
            )
    return Evaluation(compared, means, set_values, len(truth) if functions else len(found), missing, mismatched,
                      extra, protocol, notes)  # fmt: skip


def against_both(
    results: Sequence[Path], reference: Sequence[Path] | None, full: Sequence[Path] | None, metrics, options, **where
) -> dict[str, float]:
    """Set metrics against the reference, and with the prefix `full_` against the second one, if there is one."""
    values = sets.set_metrics(results, reference, metrics, options, **where)
    two = {name: row for name, row in metrics.items() if not row.alone}
    if full is not None and two:
        more = sets.set_metrics(results, full, two, options, **where)
        values |= {table.FULL + name: value for name, value in more.items()}
    return values


def compare(
    triples: Sequence[tuple[str, Path, Path]],
    functions: Mapping[str, Callable],
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """One row per (image id, result file, reference file): the values of paired metrics, see table.paired_functions.

    Raises RestoreError for a function that does not return one number per image.
    """
    rows: list[dict[str, Any]] = []
    first = 0
    while first < len(triples):
        batch, pairs = [], []
        for key, *paths in triples[first : first + batch_size]:
            pair = [torch.from_numpy(read_rgb(path).copy()).permute(2, 0, 1) for path in paths]
            if pairs and pair[0].shape != pairs[0][0].shape:
                break
            batch.append({"image": key})
            pairs.append(pair)
        image, truth = (torch.stack(side).float() / 127.5 - 1 for side in zip(*pairs, strict=True))
        for name, function in functions.items():
            values = torch.as_tensor(function(image, truth))
            if values.shape != (len(batch),):
                raise RestoreError(
                    f"the metric {name} returned {tuple(values.shape)} for {len(batch)} images; it must return (B,)"
                )
            for row, value in zip(batch, values.tolist(), strict=True):
                row[name] = value
        rows += batch
        first += len(batch)
        if progress is not None:
            progress(len(rows), len(triples))
    return rows
