"""Metrics of any folder of images against a reference folder, also of images this package did not make."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from operators import RestoreError
from restore.bench import datasets
from restore.bench.protocol import versions
from restore.metrics import sets
from restore.metrics import single as per_image
from restore.metrics.statistics import Estimate, bootstrap
from restore.metrics.weights import describe_weights

PAIRED_METRICS = ("psnr", "ssim", "lpips")


@dataclass(frozen=True)
class Evaluation:
    """What was measured, on what, and what was not there.

    per_image: one row per compared image: `image` and a value per paired metric.
    means: per paired metric the mean over images with its interval; empty when the set is incomplete and that was
        not allowed, as an average over whatever happens to exist is not the number asked for.
    set_values: fid, kid, kid_std, is, is_std, precision, recall as asked for; `full_` marks the second reference.
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
        return _finite(self._fields())

    def _fields(self) -> dict[str, Any]:
        return {
            "complete": self.complete,
            "expected": self.expected,
            "compared": len(self.per_image),
            "missing": self.missing,
            "mismatched": self.mismatched,
            "extra": self.extra,
            "means": {name: estimate.to_dict() for name, estimate in self.means.items()},
            "set_values": self.set_values,
            "notes": self.notes,
            "protocol": self.protocol,
            "per_image": self.per_image,
        }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def split_metrics(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Metric names into paired ones and set ones; raises RestoreError with the known names for any other."""
    unknown = [n for n in names if n not in PAIRED_METRICS + sets.SET_METRICS]
    if unknown:
        known = ", ".join(PAIRED_METRICS + sets.SET_METRICS)
        raise RestoreError(f"there is no metric {unknown[0]}; the metrics are {known}")
    return [n for n in names if n in PAIRED_METRICS], [n for n in names if n in sets.SET_METRICS]


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of a file as displayed, from its header."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except (OSError, SyntaxError, ValueError) as error:
        raise RestoreError(f"{path} cannot be read as an image; replace or remove it") from error
    return (width, height) if turned else (height, width)


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

    metrics: any of psnr, ssim, lpips (image by image; a result belongs to the reference image of the same name, folders
        included, suffix aside) and fid, kid, is, pr (set against set; names do not matter).
    full_reference: a second, larger set for fid, kid and pr, reported apart with the prefix `full_`.
    weights: own files for inception, vgg16, alexnet; see weights.find_weights.
    allow_small: permit set metrics below sets.MINIMUM_IMAGES. allow_incomplete: permit means over fewer images
        than the reference has. cache: folder of reference features, the user's cache when None.
    progress: called with (done, all) as images are compared.

    Raises RestoreError for folders without images, unknown metrics and missing weights, before anything is computed.
    """
    paired, of_sets = split_metrics(metrics)
    found, ignored = datasets.list_images(results)
    truth, ignored_truth = datasets.list_images(reference)
    cache = Path(cache) if cache else sets.default_cache()
    protocol: dict[str, Any] = {"versions": versions()}
    lpips = per_image.LPIPS(lpips_net, weights, device) if "lpips" in paired else None
    protocol["metrics"] = per_image.definitions(lpips_net if lpips else None)
    if lpips:
        protocol["lpips_weights"] = describe_weights({"alex": "alexnet", "vgg": "vgg16"}[lpips_net], lpips.path)
    if of_sets:
        protocol["fidelity"] = sets.check(of_sets, weights=weights, pr_network=pr_network)

    notes = [f"{len(names)} files are no images and were left out: {', '.join(names[:5])}"
             for names in (ignored, ignored_truth) if names]  # fmt: skip
    missing, mismatched, extra, common = [], [], [], []
    if paired:
        missing = [key for key in truth if key not in found]
        extra = [key for key in found if key not in truth]
        for key in (key for key in truth if key in found):
            (common if image_size(found[key]) == image_size(truth[key]) else mismatched).append(key)
        if not common and len(missing) == len(truth):
            raise RestoreError(
                f"no image in {results} has the name of one in {reference}, so they cannot be compared one by one;"
                " name them alike, or ask for fid, kid, is and pr only"
            )
    rows = compare([(key, found[key], truth[key]) for key in common], paired, lpips, batch_size, progress)
    protocol["reference"] = {"count": len(truth), "sha256": sets.content_hash(list(truth.values()))}

    complete = not missing and not mismatched
    means = {}
    if rows and (complete or allow_incomplete):
        means = {name: bootstrap([row[name] for row in rows]) for name in paired}
    set_values: dict[str, float] = {}
    if of_sets and not (complete or allow_incomplete):
        notes.append("set metrics were not computed, as the results are incomplete")
    elif of_sets:
        ours = [found[key] for key in common] if paired else list(found.values())
        options = {"weights": weights, "pr_network": pr_network, "device": device, "batch_size": batch_size}
        options |= {"allow_small": allow_small, "cache": cache}
        set_values = sets.set_metrics(ours, list(truth.values()), of_sets, **options)
        if full_reference is not None:
            full, _ = datasets.list_images(full_reference)
            protocol["full_reference"] = {"count": len(full), "sha256": sets.content_hash(list(full.values()))}
            against = [m for m in of_sets if m != "is"]
            values = sets.set_metrics(ours, list(full.values()), against, **options)
            set_values |= {f"full_{name}": value for name, value in values.items()}
        if min(len(ours), len(truth)) < sets.MINIMUM_IMAGES:
            notes.append(
                f"set metrics on {len(ours)} against {len(truth)} images: too few to compare with others' numbers"
            )
    return Evaluation(rows, means, set_values, len(truth) if paired else len(found), missing, mismatched, extra,
                      protocol, notes)  # fmt: skip


def compare(
    triples: Sequence[tuple[str, Path, Path]],
    metrics: Sequence[str],
    lpips: per_image.LPIPS | None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """One row per (image id, result file, reference file) with the values of the paired `metrics`."""
    rows: list[dict[str, Any]] = []
    waiting: list[tuple[dict[str, Any], np.ndarray, np.ndarray]] = []

    def flush() -> None:
        if lpips is not None and waiting:
            values = lpips(np.stack([w[1] for w in waiting]), np.stack([w[2] for w in waiting]))
            for (row, _, _), value in zip(waiting, values, strict=True):
                row["lpips"] = float(value)
        waiting.clear()

    for key, result_path, truth_path in triples:
        image, truth = datasets.read_rgb(result_path), datasets.read_rgb(truth_path)
        row: dict[str, Any] = {"image": key}
        if "psnr" in metrics:
            row["psnr"] = per_image.psnr_pixels(image, truth)
        if "ssim" in metrics:
            row["ssim"] = per_image.ssim_pixels(image, truth)
        rows.append(row)
        if "lpips" in metrics:
            if waiting and waiting[0][1].shape != image.shape:
                flush()
            waiting.append((row, image, truth))
            if len(waiting) == batch_size:
                flush()
        if progress is not None:
            progress(len(rows), len(triples))
    flush()
    return rows
