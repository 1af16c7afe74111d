"""The short tour: shipped faces of two sizes, degraded and restored in pixels and in latents, without and with PAG,
and a whole photo."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from operators import RestoreError
from restore import disk
from restore.app import files
from restore.bench.baselines import baseline
from restore.guidance import PAG, Guidance
from restore.images import grids, io
from restore.metrics.single import LPIPS, psnr, ssim
from restore.paths import data_dir
from restore.restorer import Restorer, load
from restore.samplers.noise import measurement_generator
from restore.task import load_task
from restore.versions import get_version


@dataclass(frozen=True)
class Part:
    """What one picture of the demo shows: shipped photos of one size, tasks with their settings, and the prior.

    sampler: the one that comes first; None: the default alone, without PAG. label: the prior's class. cell: pixels of
    a photo in the picture.
    """

    backbone: str
    sampler: str | None
    photos: tuple[str, ...]
    tasks: Mapping[str, Mapping[str, Any]]
    picture: str
    label: str | None = None
    cell: int = 192


TITLES = {
    "inpaint-box": "box inpainting",
    "sr4": "SR x4",
    "gaussian-blur": "Gaussian blur",
    "motion-blur": "motion blur",
    "denoise": "noise",
    "sr2": "SR x2",
}
# At 64 pixels the field's 61-pixel kernels would cover the image: these have the same reach per face.
PARTS = (
    Part(
        "embedded",
        "dps",
        ("astronaut-face-64.png", "generated-face-64-1.png", "generated-face-64-2.png"),
        {
            "inpaint-box": {},
            "sr4": {},
            "gaussian-blur": {"kernel_size": 15, "std": 1.5},
            "motion-blur": {"kernel_size": 15},
        },
        "comparison.png",
        label="face",
    ),
    Part(
        "embedded-latent",
        "psld",
        ("astronaut-face-128.png", "generated-face-128-1.png", "generated-face-128-2.png"),
        {"inpaint-box": {}},
        "comparison-latent.png",
        cell=256,
    ),
    Part(
        "embedded",
        None,
        ("coffee.jpg",),
        {
            "denoise": {"sigma": 0.2},
            "gaussian-blur": {"kernel_size": 15, "std": 1.5},
            "sr2": {},
        },
        "comparison-photo.png",
        label="photo",
        cell=320,
    ),
)
LPIPS_SIDE = 128  # AlexNet was trained on images of 224 pixels
BASELINE = "bicubic / Wiener"
NAMES = {"dps": "DPS", "psld": "PSLD", "diffpir": "DiffPIR", "resample": "ReSample", "daps": "DAPS", "dpir": "DPIR"}


@dataclass
class Restored:
    """One task of a part: estimates by column title, their evaluations and seconds, and what is recorded of each."""

    y: torch.Tensor
    operator: Any
    estimates: dict[str, torch.Tensor]
    seconds: dict[str, float]
    records: list[dict[str, Any]]


def run_demo(
    out: str | Path,
    *,
    steps: int | None = None,
    device: str = "auto",
    seed: int = 0,
    weights: Mapping[str, str | Path] | None = None,
    callback: Callable | None = None,
) -> str:
    """Restore the shipped photos as PARTS says; returns the summary that the command prints.

    Writes a picture for each part (input, baseline, the methods, truth), demo.json with all numbers, and table.md.
    steps: of every sampler, instead of the presets'. weights: as restore.metrics.weights.find_weights takes them;
    without AlexNet's, given or at hand, the table has no LPIPS.
    """
    started = time.perf_counter()
    out = Path(out)
    files.make_writable_folder(out)
    lpips = _lpips(weights)
    table, records, notes = [], [], []
    total = sum((4 if part.sampler else 1) * len(part.tasks) for part in PARTS)
    for part in PARTS:
        restorer = load(part.backbone, device=device)
        photos = [io.read_image(data_dir() / "photos" / name) for name in part.photos]
        x, ids = torch.cat([photo.pixels for photo in photos]), [Path(name).stem for name in part.photos]
        rows, titles, used = [], [], {}
        for task in part.tasks:
            progress = partial(_scaled, callback, total, len(records))
            done = _restored(restorer, part, task, x, ids, seed, steps, progress)
            records += done.records
            table += _table(part, task, x, done, lpips)
            for record in done.records:
                used.setdefault(record["method"], {})[str(record["nfe"])] = None
            rows += _rows(x, done)
            titles += [f"{TITLES[task]}\n{_called(name, x)}" for name in ids]
        heads = ["input", *done.estimates, "truth"]
        grid = grids.draw_grid(rows, heads, titles, cell=part.cell)
        io.write_image(out / part.picture, io.to_tensor(grid)[0])
        counts = ", ".join(f"{method} {' or '.join(each)} evaluations" for method, each in used.items())
        notes.append(f"{_size(x)} px, {part.backbone}: means over {len(ids)}, {counts}.")
    digits = {"PSNR dB": 2, "SSIM": 3, "LPIPS": 3, "residual / noise": 2, "s / photo": 1}
    lines = [" | ".join(table[0]), "|".join("---" for _ in table[0])]
    lines += [" | ".join(f"{v:.{digits[key]}f}" if key in digits else v for key, v in row.items()) for row in table]
    note = f"sigma_y = 0.05 on [-1, 1] (0.2 where noise is all), seed {seed}; "
    note += "residual / noise is near 1 when a result explains its measurement."
    note += f" LPIPS (alex) of faces enlarged to {LPIPS_SIDE}." if lpips is not None else ""
    lines += ["", *notes, note]
    disk.write_bytes(out / "table.md", ("\n".join(lines) + "\n").encode())
    disk.write_json(out / "demo.json", {"version": get_version(), "runs": records, "table": table})
    where = [f"{out / part.picture}  the pictures" for part in PARTS] + [f"{out / 'table.md'}  the numbers"]
    return "\n".join([*lines, "", f"Done in {time.perf_counter() - started:.0f} s:", *where])


def _restored(restorer, part: Part, task: str, x, ids, seed: int, steps, progress) -> Restored:
    """x measured once and restored by the baseline and every method. progress: callback of the i-th method."""
    operator = load_task(task, dict(part.tasks[task])).build(*x.shape[-2:])
    y = operator(x, [measurement_generator(seed, name) for name in ids])
    begun = time.perf_counter()
    estimates = {BASELINE: baseline(y, operator)}
    seconds, records = {BASELINE: time.perf_counter() - begun}, []
    for i, (title, options) in enumerate(methods(restorer, operator, task, part.sampler).items()):
        result = restorer(
            y,
            operator,
            task=task,
            steps=steps,
            seed=seed,
            image_ids=ids,
            batch_size=len(ids),
            label=part.label,
            callback=progress(i),
            **options,
        )
        estimates[title], seconds[title] = result.samples[:, 0].cpu(), result.seconds
        record = {"backbone": part.backbone, "task": task, "method": title, "protocol": result.protocol}
        record |= {"seconds": result.seconds, "nfe": result.nfe}
        records.append(record | {"residual_ratio": result.residual_ratio[:, 0].tolist()})
    return Restored(y, operator, estimates, seconds, records)


def _table(part: Part, task: str, x: torch.Tensor, done: Restored, lpips: LPIPS | None) -> list[dict[str, Any]]:
    rows = []
    for title, estimate in done.estimates.items():
        scores = _scores(estimate, x, done.y, done.operator, lpips) | {"s / photo": done.seconds[title] / len(x)}
        rows.append({"px": _size(x), "task": TITLES[task], "method": title, **scores})
    return rows


def _rows(x: torch.Tensor, done: Restored) -> list[list[torch.Tensor]]:
    """A row of pictures for every photo."""
    y = done.y
    shown = y if y.shape[-2:] == x.shape[-2:] else torch.nn.functional.interpolate(y, x.shape[-2:])
    return [[shown[i], *(estimate[i] for estimate in done.estimates.values()), x[i]] for i in range(len(x))]


def _size(x: torch.Tensor) -> str:
    height, width = x.shape[-2:]
    return str(width) if height == width else f"{width}x{height}"


def _called(name: str, x: torch.Tensor) -> str:
    return name.replace(f"-face-{x.shape[-1]}", "").replace("-", " ")


def _scores(estimate: torch.Tensor, x: torch.Tensor, y: torch.Tensor, operator: Any, lpips: LPIPS | None) -> dict:
    residual = torch.linalg.vector_norm((y - operator.A(estimate)).flatten(1), dim=1).mean()
    scores = {"PSNR dB": float(psnr(estimate, x).mean()), "SSIM": float(ssim(estimate, x).mean())}
    if lpips is not None:
        scores["LPIPS"] = float(lpips(*(_enlarged(image) for image in (estimate, x))).mean())
    return scores | {"residual / noise": float(residual) / (operator.noise.sigma * y[0].numel() ** 0.5)}


def methods(restorer: Restorer, operator: Any, task: str, first: str | None) -> dict[str, dict[str, Any]]:
    """Column title -> what a Restorer is called with: the sampler `first` and the best, each without and with PAG.

    Where the best quality is the first sampler itself, DiffPIR is shown. first: None: the default alone.
    """
    if first is None:
        sampler = restorer.method(operator, task=task).sampler
        return {NAMES.get(sampler, str(sampler)): {"guidance": None}}
    shown = {}
    for choice in ({"sampler": first}, {"quality": "best"}):
        preset = restorer.method(operator, task=task, **choice)
        if shown and preset.sampler == first:
            choice = {"sampler": "diffpir"}
            preset = restorer.method(operator, task=task, **choice)
        label = NAMES.get(preset.sampler, str(preset.sampler))
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


def _enlarged(image: torch.Tensor) -> torch.Tensor:
    if max(image.shape[-2:]) > LPIPS_SIDE:
        return image
    return torch.nn.functional.interpolate(image, (LPIPS_SIDE, LPIPS_SIDE), mode="nearest")


def _scaled(callback, total: int, first: int, i: int):
    """The i-th run after `first` others of `total` as 100 steps of one progress bar, however many its own are."""
    if callback is None:
        return None

    def scaled(step: dict) -> None:
        done, all_of_it = step["first"] * step["steps"] + step["step"] * step["count"], step["total"] * step["steps"]
        before, after = (100 * n // all_of_it for n in (done, done + step["count"]))
        callback({**step, "steps": 100, "total": total, "first": first + i, "step": before, "count": after - before})

    return scaled
