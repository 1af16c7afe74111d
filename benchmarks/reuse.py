"""What a weak pass costs, and what is lost by running it in every k-th evaluation only: `python -m benchmarks.reuse`.

DPS without PAG, and with it and `every` of 1, 2, 4, on each face in turn, so that ratios hold on a crowded machine. A
ratio is the median over faces of the processor seconds beside those of DPS alone; differences are paired, beside the
weak pass of every evaluation.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import operators
import restore
from benchmarks.measure import run_command
from restore.bench.datasets import load_dataset
from restore.metrics.single import LPIPS, psnr
from restore.metrics.statistics import bootstrap_mean
from restore.paths import data_dir
from restore.samplers.noise import measurement_generator

LAYERS, SCALE, SIGMA = "i5", 1.0, 0.05  # those of configs/method/dps.yaml; SIGMA of y, on [-1, 1]
PLAIN = "no PAG"
Row = Mapping[str, float]  # psnr, lpips (NaN without a network), seconds, nfe


def measure_reuse(
    faces: str = str(data_dir() / "photos"),
    apart: int = 1,
    limit: int = 8,
    steps: int = 50,
    every: str = "1,2,4",
    lpips: str = "",
) -> str:
    """Return a table of one row for DPS and one for each `every` of its weak pass, super-resolution by 4.

    faces: a folder; of its images each apart-th is taken, at most `limit`, cropped and reduced to 64 pixels. every: a
    list that begins with 1. lpips: weights of AlexNet; without them LPIPS is left out. Raises RestoreError for another
    list.
    """
    ks = read_list(every)
    torch.set_num_threads(1)
    restorer, distance = restore.load("embedded", device="cpu"), LPIPS("alex", {"alexnet": lpips}) if lpips else None
    operator = operators.SuperResolution(4, noise=operators.GaussianNoise(SIGMA))
    guidances = {PLAIN: None} | {f"every={k}": restore.PAG(SCALE, LAYERS, every=k) for k in ks}
    methods = {
        name: restorer.method(operator, sampler="dps", steps=steps, guidance=guidance)
        for name, guidance in guidances.items()
    }
    found: dict[str, list[Row]] = {name: [] for name in methods}
    images = load_dataset(faces, size=restorer.backbone.resolution, every=apart, limit=limit)
    for number, image_id in enumerate(images.ids):
        x = images.tensor(number)[None]
        y = operator(x, measurement_generator(0, image_id))
        for name, method in methods.items():
            started = time.process_time()
            result = restorer(y, operator, method, image_ids=[image_id])
            seconds, image = time.process_time() - started, result.samples[:, 0]
            apart = float(distance(image, x)[0]) if distance else float("nan")
            row = {"psnr": float(psnr(image, x)[0]), "lpips": apart, "seconds": seconds, "nfe": result.nfe}
            found[name].append(row)
        print(f"{number + 1} of {len(images.ids)}", file=sys.stderr)
    return format_table(found)


def read_list(text: str) -> list[int]:
    """Return whole numbers separated by commas. Raises RestoreError unless they begin with 1."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts) or int(parts[0]) != 1:
        raise operators.RestoreError(f"every must be whole numbers such as 1,2,4 that begin with 1, got {text}")
    return [int(part) for part in parts]


def format_table(found: Mapping[str, Sequence[Row]]) -> str:
    """Return Markdown; found: for each name the rows of all faces, PLAIN and `every=1` among them."""
    heads = ["weak pass", "NFE", "time / DPS", "PSNR, dB", "LPIPS", "PSNR beside every=1", "LPIPS beside every=1"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for name, rows in found.items():
        times = [row["seconds"] / plain["seconds"] for row, plain in zip(rows, found[PLAIN], strict=True)]
        means = {key: statistics.mean(row[key] for row in rows) for key in ("psnr", "lpips")}
        cells = [name, f"{rows[0]['nfe']:.0f}", f"{statistics.median(times):.2f}"]
        cells += [f"{means['psnr']:.2f}", f"{means['lpips']:.4f}"]
        cells += [_compare(rows, found["every=1"], *column) for column in (("psnr", 3), ("lpips", 4))]
        lines.append(_line(cells))
    return "\n".join(lines)


def _compare(rows: Sequence[Row], others: Sequence[Row], key: str, digits: int) -> str:
    if rows is others:
        return "–"
    apart: Any = bootstrap_mean([row[key] - other[key] for row, other in zip(rows, others, strict=True)])
    return f"{apart.mean:+.{digits}f} ({apart.low:+.{digits}f} to {apart.high:+.{digits}f})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run_command(measure_reuse)
