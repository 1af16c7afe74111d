"""The short tour: shipped faces, four degradations, DPS and the best sampler with and without PAG, one picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from operators import RestoreError
from restore import atomic
from restore.app import files, run, tasks
from restore.bench.baselines import baseline
from restore.guidance import PAG, Guidance
from restore.images import grids, io
from restore.metrics.single import LPIPS, psnr, ssim
from restore.paths import data_dir
from restore.restorer import Restorer, load
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
PHOTOS = ("astronaut-face-64.png", "generated-face-64-1.png", "generated-face-64-2.png")


def run_demo(
    out: str | Path,
    *,
    steps: int | None = None,
    device: str = "auto",
    seed: int = 0,
    weights: Mapping[str, str | Path] | None = None,
    callback: Callable | None = None,
) -> str:
    """Restore the shipped 64x64 faces under four tasks; returns the summary that the command prints.

    Writes comparison.png (input, baseline, DPS, DPS+PAG, the sampler of quality="best", that with PAG, truth),
    demo.json with all numbers, and table.md. steps: of every sampler, instead of the presets'. weights: as
    restore.metrics.weights.find_weights takes them; without AlexNet's, given or at hand, the table has no LPIPS.
    """
    started = time.perf_counter()
    out = Path(out)
    files.writable_folder(out)
    lpips = _lpips(weights)
    restorer = load("embedded", device=device)
    photos = [io.read_image(data_dir() / "photos" / name) for name in PHOTOS]
    x = torch.cat([photo.pixels for photo in photos])
    ids = [Path(name).stem for name in PHOTOS]
    rows, row_titles, table, records = [], [], [], []
    for n, (task, title) in enumerate(TASKS.items()):
        operator = tasks.find_task(task, dict(OVERRIDES.get(task, {}))).build(*photos[0].size)
        y = operator(x, [measurement_generator(seed, name) for name in ids])
        begun = time.perf_counter()
        estimates, seconds = {"bicubic / Wiener": baseline(y, operator)}, {}
        seconds["bicubic / Wiener"] = time.perf_counter() - begun
        runs = methods(restorer, operator, task)
        for m, (label, options) in enumerate(runs.items()):
            result = restorer(
                y,
                operator,
                task=task,
                steps=steps,
                seed=seed,
                image_ids=ids,
                batch_size=len(ids),
                callback=_scaled(callback, len(runs) * n + m, len(runs) * len(TASKS)),
                **options,
            )
            estimates[label], seconds[label] = result.samples[:, 0].cpu(), result.seconds
            record = {"task": task, "method": label, "protocol": result.protocol, "seconds": result.seconds}
            records.append(record | {"residual_ratio": result.residual_ratio[:, 0].tolist(), "nfe": result.nfe})
        for label, estimate in estimates.items():
            residual = torch.linalg.vector_norm((y - operator.A(estimate)).flatten(1), dim=1).mean()
            scores = {"PSNR dB": float(psnr(estimate, x).mean()), "SSIM": float(ssim(estimate, x).mean())}
            if lpips is not None:
                scores["LPIPS"] = float(lpips(*(_doubled(v) for v in (estimate, x))).mean())
            scores["residual / noise"] = float(residual) / (operator.noise.sigma * y[0].numel() ** 0.5)
            table.append({"task": title, "method": label, **scores, "s / face": seconds[label] / len(ids)})
        shown = y if y.shape[-2:] == x.shape[-2:] else torch.nn.functional.interpolate(y, x.shape[-2:])
        for i, name in enumerate(ids):
            rows.append([shown[i], *(estimate[i] for estimate in estimates.values()), x[i]])
            row_titles.append(f"{title}\n{name.replace('-face-64', '').replace('-', ' ')}")
    grid = grids.comparison_grid(rows, ["input", *estimates, "truth"], row_titles)
    io.write_image(out / "comparison.png", io.to_tensor(grid)[0])
    digits = {"PSNR dB": 2, "SSIM": 3, "LPIPS": 3, "residual / noise": 2, "s / face": 1}
    lines = [" | ".join(table[0]), "|".join("---" for _ in table[0])]
    lines += [" | ".join(f"{v:.{digits[key]}f}" if key in digits else v for key, v in row.items()) for row in table]
    used = {r["method"]: f"{r['nfe']} evaluations" for r in records}
    note = f"Means over {len(ids)} faces, sigma_y = 0.05 on [-1, 1], seed {seed}; "
    note += ", ".join(f"{label} {evaluations}" for label, evaluations in used.items())
    note += "; residual / noise is near 1 when a result explains its measurement."
    note += " LPIPS (alex) of the faces doubled in size." if lpips is not None else ""
    lines += ["", note]
    atomic.write_bytes(out / "table.md", ("\n".join(lines) + "\n").encode())
    atomic.write_json(out / "demo.json", {"version": run.version(), "runs": records, "table": table})
    where = f"{out / 'comparison.png'}  the pictures\n{out / 'table.md'}  the numbers"
    return "\n".join([*lines, "", f"Done in {time.perf_counter() - started:.0f} s:", where])


def methods(restorer: Restorer, operator: Any, task: str) -> dict[str, dict[str, Any]]:
    """Column title -> what a Restorer is called with. Where the best quality is DPS itself, DiffPIR is shown."""
    shown = {}
    for choice in ({"sampler": "dps"}, {"quality": "best"}):
        preset = restorer.method(operator, task=task, **choice)
        if shown and preset.sampler == "dps":
            choice = {"sampler": "diffpir"}
            preset = restorer.method(operator, task=task, **choice)
        label = {"dps": "DPS", "diffpir": "DiffPIR"}.get(preset.sampler, str(preset.sampler))
        shown[label] = {**choice, "guidance": None}
        shown[f"{label}+PAG"] = {**choice, "guidance": preset.guidance or _pag(restorer)}
    return shown


def _pag(restorer: Restorer) -> Guidance:
    return PAG(1.0, layers=restorer.default_layers())


def _lpips(weights: Mapping[str, str | Path] | None) -> LPIPS | None:
    """LPIPS with AlexNet, or None where its weights are neither given nor where PyTorch keeps them."""
    try:
        return LPIPS("alex", weights)
    except RestoreError:
        if weights:
            raise
        return None


def _doubled(image: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(image, scale_factor=2, mode="nearest")


def _scaled(callback, index: int, total: int):
    """Report a run of many as one progress bar over all of them."""
    if callback is None:
        return None
    return lambda step: callback({**step, "total": step["total"] * total, "first": index * step["total"]})
