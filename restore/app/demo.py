"""The one-minute tour: shipped photos, four degradations, DPS with and without PAG, one picture."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from restore import atomic
from restore.app import files, run, tasks
from restore.bench.baselines import baseline
from restore.guidance import PAG
from restore.images import grids, io
from restore.metrics.single import psnr, ssim
from restore.paths import data_dir
from restore.restorer import load
from restore.samplers.noise import measurement_generator

TASKS = {
    "inpaint-box": "box inpainting",
    "sr4": "SR x4",
    "gaussian-blur": "Gaussian blur",
    "motion-blur": "motion blur",
}
# At 64 pixels the field's 61-pixel kernels would cover the image: these have the same reach per face.
OVERRIDES = {
    "gaussian-blur": {"kernel_size": 15, "std": 1.5},
    "motion-blur": {"kernel_size": 15},
}
PHOTOS = ("astronaut-face-64.png", "chelsea-face-64.png", "coffee-64.png")


def run_demo(
    out: str | Path, *, steps: int | None = None, device: str = "auto", seed: int = 0, callback: Callable | None = None
) -> str:
    """Restore the shipped 64x64 photos under four tasks; returns the summary that the command prints.

    Writes comparison.png (input, baseline, DPS, DPS+PAG, truth), demo.json with all numbers, and
    table.md. steps: sampling steps instead of the preset's.
    """
    started = time.perf_counter()
    out = Path(out)
    files.writable_folder(out)
    restorer = load("embedded", device=device)
    photos = [io.read_image(data_dir() / "photos" / name) for name in PHOTOS]
    x = torch.cat([photo.pixels for photo in photos])
    ids = [Path(name).stem for name in PHOTOS]
    rows, row_titles, table, records = [], [], [], []
    for n, (task, title) in enumerate(TASKS.items()):
        operator = tasks.find_task(task, dict(OVERRIDES.get(task, {}))).build(*photos[0].size)
        y = operator(x, [measurement_generator(seed, name) for name in ids])
        estimates = {"baseline": baseline(y, operator)}
        preset = restorer.method(operator, task=task, sampler="dps").guidance
        pag = PAG(1.0, layers=restorer.default_layers()) if preset is None else preset
        for m, (label, guidance) in enumerate({"DPS": None, "DPS+PAG": pag}.items()):
            result = restorer(
                y,
                operator,
                task=task,
                sampler="dps",
                guidance=guidance,
                steps=steps,
                seed=seed,
                image_ids=ids,
                batch_size=len(ids),
                callback=_scaled(callback, 2 * n + m, 2 * len(TASKS)),
            )
            estimates[label] = result.samples[:, 0]
            record = {"task": task, "method": label, "protocol": result.protocol, "seconds": result.seconds}
            records.append(record | {"residual_ratio": result.residual_ratio[:, 0].tolist(), "nfe": result.nfe})
        for label, estimate in estimates.items():
            scores = [float(psnr(estimate, x).mean()), float(ssim(estimate, x).mean())]
            ratio = torch.linalg.vector_norm((y - operator.A(estimate)).flatten(1), dim=1).mean()
            scores.append(float(ratio) / (operator.noise.sigma * y[0].numel() ** 0.5))
            table.append((title, label, *scores))
        shown = y if y.shape[-2:] == x.shape[-2:] else torch.nn.functional.interpolate(y, x.shape[-2:])
        for i, photo in enumerate(ids):
            rows.append([shown[i], *(estimate[i] for estimate in estimates.values()), x[i]])
            row_titles.append(f"{title}\n{photo.split('-')[0]}")
    grid = grids.comparison_grid(rows, ["input", "bicubic / Wiener", "DPS", "DPS+PAG", "truth"], row_titles)
    io.write_image(out / "comparison.png", io.to_tensor(grid)[0])
    lines = ["task | method | PSNR dB | SSIM | residual / noise", "---|---|---|---|---"]
    lines += [f"{task} | {label} | {p:.2f} | {s:.3f} | {r:.2f}" for task, label, p, s, r in table]
    note = (
        "Means over {} photos, sigma_y = 0.05 on [-1, 1], seed {}, {} steps; residual / noise is near 1 when a result"
    )
    note += " explains its measurement."
    lines += ["", note.format(len(ids), seed, records[0]["protocol"]["method"]["steps"])]
    atomic.write_bytes(out / "table.md", ("\n".join(lines) + "\n").encode())
    atomic.write_json(out / "demo.json", {"version": run.version(), "runs": records, "table": table})
    seconds = time.perf_counter() - started
    where = f"{out / 'comparison.png'}  the pictures\n{out / 'table.md'}  the numbers"
    return "\n".join([*lines, "", f"Done in {seconds:.0f} s:", where])


def _scaled(callback, index: int, total: int):
    """Report a run of many as one progress bar over all of them."""
    if callback is None:
        return None
    return lambda step: callback({**step, "total": step["total"] * total, "first": index * step["total"]})
