"""`restore demo`: a photo and shipped faces, degraded and restored without and with PAG, in pixels and in latents."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from operators import RestoreError
from restore import disk
from restore.app import files
from restore.bench.baselines import baseline
from restore.guidance import PAG
from restore.images import grids, io
from restore.method import Method
from restore.metrics.single import LPIPS, psnr, ssim
from restore.paths import data_dir
from restore.restorer import Restorer, load
from restore.samplers.noise import measurement_generator
from restore.task import load_task
from restore.versions import get_version


@dataclass(frozen=True)
class Part:
    """What one picture of the demo shows: shipped photos of one size, tasks and the prior.

    quick: how many of the tasks a demo shows that is not of everything; 0 leaves the part out.
    sampler: the first one shown; None for only the default one, without PAG. cell: width of a photo in the picture, in
    pixels. label: the prior's class.
    """

    picture: str
    backbone: str
    sampler: str | None
    photos: tuple[str, ...]
    tasks: tuple[str, ...]
    quick: int
    cell: int
    label: str | None = None


# Title and settings of each task. At 64 pixels the usual 61-pixel kernels would cover the image; these reach as far
# relative to the face.
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "inpaint-box": ("box inpainting", {}),
    "sr4": ("SR x4", {}),
    "gaussian-blur": ("Gaussian blur", {"kernel_size": 15, "std": 1.5}),
    "motion-blur": ("motion blur", {"kernel_size": 15}),
    "denoise": ("noise", {"sigma": 0.2}),
    "sr2": ("SR x2", {}),
}
FACES_64 = ("astronaut-face-64.png", "generated-face-64-1.png", "generated-face-64-2.png")
FACES_128 = ("astronaut-face-128.png", "generated-face-128-1.png", "generated-face-128-2.png")
FACE_TASKS, PHOTO_TASKS = ("inpaint-box", "sr4", "gaussian-blur", "motion-blur"), ("denoise", "gaussian-blur", "sr2")
PARTS = (
    Part("comparison-photo.png", "embedded-photo", None, ("coffee.jpg",), PHOTO_TASKS, 3, 320),
    Part("comparison.png", "embedded", "dps", FACES_64, FACE_TASKS, 1, 192, "face"),
    Part("comparison-latent.png", "embedded-latent", "psld", FACES_128, ("inpaint-box",), 0, 256),
)
LPIPS_SIDE = 128  # AlexNet was trained on images of 224 pixels
BASELINE = "bicubic / Wiener"
NAMES = {"dps": "DPS", "psld": "PSLD", "diffpir": "DiffPIR", "resample": "ReSample", "daps": "DAPS", "dpir": "DPIR"}


def run_demo(
    out: str | Path,
    *,
    steps: int | None = None,
    device: str = "auto",
    seed: int = 0,
    weights: Mapping[str, str | Path] | None = None,
    overwrite: bool = False,
    everything: bool = False,
    callback: Callable | None = None,
    show: Callable[[Path], None] | None = None,
) -> str:
    """Restore the photos of PARTS and return a summary to print.

    Writes a picture for each part (input, baseline, the methods, truth), demo.json with all numbers, and table.md.
    steps: of every sampler, instead of the presets'. everything: all parts and tasks; otherwise what takes two minutes
    of two CPU cores. callback: as a Restorer's; show: called with each picture's path when it is written. weights: as
    restore.metrics.weights.find_weights takes them; without AlexNet's, given or in PyTorch's cache, the table has no
    LPIPS. Raises RestoreError if a file that no demo wrote would be replaced, unless `overwrite`.
    """
    started, out = time.perf_counter(), Path(out)
    parts = PARTS if everything else [replace(part, tasks=part.tasks[: part.quick]) for part in PARTS if part.quick]
    outputs = [out / name for name in (*(part.picture for part in PARTS), "table.md", "demo.json")]
    files.check_owned(outputs, outputs[-1], outputs[-1], overwrite)
    files.make_writable_folder(out)
    lpips, table, records, notes = _load_lpips(weights), [], [], []
    header = {"version": get_version(), "files": [path.name for path in outputs]}
    disk.write_json(outputs[-1], header)  # first: an interrupted demo may be repeated
    total = sum((4 if part.sampler else 1) * len(part.tasks) for part in parts)
    for part in parts:
        restorer = load(part.backbone, device=device)
        photos = [io.read_image(data_dir() / "photos" / name) for name in part.photos]
        x, ids = torch.cat([photo.pixels for photo in photos]), [Path(name).stem for name in part.photos]
        size = "x".join(dict.fromkeys(str(side) for side in (x.shape[-1], x.shape[-2])))  # "64" for a square
        rows, titles, evaluations = [], [], {}
        for task in part.tasks:
            progress = partial(_scale_progress, callback, total, len(records))
            restored = _restore_task(restorer, part, task, x, ids, seed, steps, progress)
            records += restored.records
            title = TASKS[task][0]
            table += restored.score(x, {"px": size, "task": title}, lpips)
            for record in restored.records:
                evaluations.setdefault(record["method"], {})[str(record["nfe"])] = None
            y = F.interpolate(restored.y, x.shape[-2:])
            rows += [[y[i], *(each[i] for each in restored.estimates.values()), x[i]] for i in range(len(x))]
            names = (name.replace(f"-face-{x.shape[-1]}", "").replace("-", " ") for name in ids)
            titles += [f"{title}\n{name}" for name in names]
        grid = grids.draw_grid(rows, ["input", *restored.estimates, "truth"], titles, cell=part.cell)
        io.write_image(out / part.picture, io.to_tensor(grid)[0])
        if show is not None:
            show(out / part.picture)
        counts = ", ".join(f"{method} {' or '.join(each)} evaluations" for method, each in evaluations.items())
        notes.append(f"{size} px, {part.backbone}: means over {len(ids)}, {counts}.")
    digits = {"PSNR dB": 2, "SSIM": 3, "LPIPS": 3, "residual / noise": 2, "s / photo": 1}
    lines = [" | ".join(table[0]), "|".join("---" for _ in table[0])]
    lines += [" | ".join(f"{v:.{digits[key]}f}" if key in digits else v for key, v in row.items()) for row in table]
    note = f"sigma_y = 0.05 on [-1, 1] (0.2 for the task noise), seed {seed}; "
    note += "residual / noise is near 1 when a result explains its measurement."
    note += f" LPIPS (alex) of faces enlarged to {LPIPS_SIDE}." if lpips is not None else ""
    lines += ["", *notes, note]
    disk.write_bytes(out / "table.md", ("\n".join(lines) + "\n").encode())
    disk.write_json(outputs[-1], header | {"runs": records, "table": table})
    where = [f"{out / part.picture}  the pictures" for part in parts] + [f"{out / 'table.md'}  the numbers"]
    return "\n".join([*lines, "", f"Done in {time.perf_counter() - started:.0f} s:", *where])


@dataclass
class Restored:
    """One task of a part. estimates: images by column title; seconds: of all of them; records: for demo.json."""

    y: torch.Tensor
    operator: Any
    estimates: dict[str, torch.Tensor]
    seconds: dict[str, float]
    records: list[dict[str, Any]]

    def score(self, x: torch.Tensor, first: dict[str, str], lpips: LPIPS | None) -> list[dict[str, Any]]:
        """Return a row of the table for each estimate; x: the truth. first: the cells before the method's."""
        rows, noise = [], self.operator.noise.sigma * self.y[0].numel() ** 0.5
        for title, estimate in self.estimates.items():
            row = {**first, "method": title}
            row |= {"PSNR dB": float(psnr(estimate, x).mean()), "SSIM": float(ssim(estimate, x).mean())}
            if lpips is not None:
                pair = (estimate, x)
                if max(x.shape[-2:]) <= LPIPS_SIDE:
                    pair = (F.interpolate(image, (LPIPS_SIDE, LPIPS_SIDE), mode="nearest") for image in pair)
                row["LPIPS"] = float(lpips(*pair).mean())
            residual = torch.linalg.vector_norm((self.y - self.operator.A(estimate)).flatten(1), dim=1).mean()
            rows.append(row | {"residual / noise": float(residual) / noise, "s / photo": self.seconds[title] / len(x)})
        return rows


def _restore_task(restorer, part: Part, task: str, x, ids, seed: int, steps, progress) -> Restored:
    """Measure x once and restore it by the baseline and every method. progress: makes the callback of the i-th."""
    operator = load_task(task, dict(TASKS[task][1])).build(*x.shape[-2:])
    y = operator(x, [measurement_generator(seed, name) for name in ids])
    started = time.perf_counter()
    estimates = {BASELINE: baseline(y, operator)}
    seconds, records = {BASELINE: time.perf_counter() - started}, []
    for i, (title, method) in enumerate(select_methods(restorer, operator, task, part.sampler, steps).items()):
        options = {"seed": seed, "image_ids": ids, "batch_size": len(ids), "callback": progress(i)}
        result = restorer(y, operator, method, **options, label=part.label)
        estimates[title], seconds[title] = result.samples[:, 0].cpu(), result.seconds
        record = {"backbone": part.backbone, "task": task, "method": title, "protocol": result.protocol}
        record |= {"seconds": result.seconds, "nfe": result.nfe}
        records.append(record | {"residual_ratio": result.residual_ratio[:, 0].tolist()})
    return Restored(y, operator, estimates, seconds, records)


def select_methods(restorer: Restorer, operator: Any, task: str, sampler: str | None, steps=None) -> dict[str, Method]:
    """Return methods by column title: `sampler` and the one of quality "best", each without and with PAG.

    If they are the same, DiffPIR takes the place of the second. sampler: None for only the default one.
    """
    resolve = partial(restorer.method, operator, task=task, steps=steps)
    methods, name = {}, lambda method: NAMES.get(method.sampler, str(method.sampler))
    if sampler is None:
        method = resolve(guidance=None)
        return {name(method): method}
    for choice in ({"sampler": sampler}, {"quality": "best"}):
        if methods and resolve(**choice).sampler == sampler:
            choice = {"sampler": "diffpir"}
        preset = resolve(**choice)
        methods[name(preset)] = resolve(**choice, guidance=None)
        pag = preset.guidance or PAG(1.0, layers=restorer.default_layers())
        methods[f"{name(preset)}+PAG"] = resolve(**choice, guidance=pag)
    return methods


def _load_lpips(weights: Mapping[str, str | Path] | None) -> LPIPS | None:
    """Return LPIPS with AlexNet, or None if its weights are neither given nor in PyTorch's cache."""
    try:
        return LPIPS("alex", weights)
    except RestoreError:
        if weights:
            raise
        return None


def _scale_progress(callback: Callable | None, total: int, first: int, i: int) -> Callable | None:
    """A callback that shows run first + i of `total`, of any number of steps and images, as one image of `total`."""
    if callback is None:
        return None

    def scaled(step: dict) -> None:
        done = step["first"] * step["steps"] + step["count"] * (step["step"] + 1)
        whole = {"steps": step["total"] * step["steps"], "step": done - 1, "count": 1}
        callback({**step, **whole, "first": first + i, "total": total})

    return scaled
