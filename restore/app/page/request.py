"""What a person wants, in plain words, and the task that it is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from operators import RestoreError
from operators.naming import check_known
from operators.validate import require_number
from restore.app.options import parse_steps
from restore.images import estimate
from restore.method import QUALITIES
from restore.task import Task, load_task

# name -> (plain words, the field's term)
PLAIN = {
    "auto": ("What the photo needs", "automatic"),
    "denoise": ("Remove noise", "denoising"),
    "sharpen": ("Sharpen a blurred photo", "deconvolution"),
    "enlarge": ("Enlarge ×2, ×4 or ×8", "super-resolution"),
    "jpeg": ("Remove the blocks of JPEG", "artefacts"),
    "fill": ("Fill in what I paint over", "inpainting"),
    "colour": ("Add colour", "colorization"),
}
FACTORS = (2, 4, 8)
BLURS = {"focus": ("It is out of focus", "Gaussian blur"), "motion": ("The camera moved", "motion blur")}
SIGMA_RANGE = (0.02, 1.0)  # of an estimated sigma_y; rounding to 8 bits adds 0.002
LARGEST_PATH = 1e4  # pixels
MOST_SAMPLES = 16  # of one photo
PAINT_FIRST = "paint over what is damaged first, or let scratches and dust be proposed"


@dataclass(frozen=True)
class Request:
    """What the page asks for.

    task: a key of PLAIN. factor: one of FACTORS. blur: a key of BLURS. std: of the blur "focus", in pixels. path:
    (N, 2) points x, y in pixels, how the camera moved. sigma: the photo's noise on [-1, 1]. None: estimated.
    sensitivity: of the search for damage if no mask is given. quality, samples, seed: see Restorer. steps, pag_scale:
    None keeps the preset's. trajectory: draw the guidance through time. label: a class of the prior, None for none.
    """

    task: str = "auto"
    factor: int = 2
    blur: str = "focus"
    std: float | None = None
    path: Sequence[Sequence[float]] = ()
    sigma: float | None = None
    sensitivity: float = 0.5
    quality: str = "balanced"
    samples: int = 1
    steps: int | str | None = None
    seed: int = 0
    pag_scale: float | None = None
    trajectory: bool = False
    label: str | None = None


def make_task(request: Request, pixels: torch.Tensor, folder: Path, mask: Path | None = None) -> Task:
    """Return the task of a photo with these pixels (1, 3, H, W). A drawn path becomes a kernel file in `folder`.

    Raises RestoreError for an unknown word, a missing mask or path and numbers that do not fit the photo.
    """
    check_known([request.task], PLAIN, "there is no task called")
    settings = {} if request.sigma is None else {"sigma": require_number(request.sigma, "the noise", 0, 4)}
    if request.task == "auto":
        return load_task("auto", settings | {"sensitivity": request.sensitivity}, blind=True)
    if request.task == "fill":
        if mask is None:
            raise RestoreError(PAINT_FIRST)
        return load_task("inpaint", settings, mask=mask, blind=True)
    if request.task == "jpeg":
        return load_task("jpeg", settings)
    settings.setdefault("sigma", estimate_sigma(pixels))
    if request.task == "enlarge":
        if request.factor not in FACTORS:
            raise RestoreError(f"a photo is enlarged by {', '.join(map(str, FACTORS))}, not by {request.factor}")
        return load_task(f"sr{request.factor}", settings)
    if request.task == "sharpen":
        check_known([request.blur], BLURS, "there is no blur called")
        if request.blur == "motion":
            if len(request.path) < 2:
                raise RestoreError("draw how the camera moved first")
            kernel = folder / "kernel.npy"
            spread = estimate.rasterise_path(torch.tensor(request.path)).flip(0, 1)  # of a point, as files have it
            np.save(kernel, spread.numpy())
            return load_task("blur", settings, kernel=kernel)
        std = estimate_std(pixels) if request.std is None else request.std
        std = require_number(std, "the size of the blur", 0.1, 50)
        radius = min(math.ceil(3 * std), min(pixels.shape[-2:]) - 1)
        return load_task("gaussian-blur", settings | {"std": std, "kernel_size": 2 * radius + 1})
    return load_task("denoise" if request.task == "denoise" else "colorize", settings)


def estimate_sigma(pixels: torch.Tensor) -> float:
    """Return sigma_y of a photo (1, 3, H, W) within SIGMA_RANGE; 0.05 if the photo is too small for an estimate."""
    if min(pixels.shape[-2:]) < estimate.SMALLEST:
        return 0.05
    low, high = SIGMA_RANGE
    return min(max(round(estimate.estimate_noise(pixels), 3), low), high)


def estimate_std(pixels: torch.Tensor) -> float:
    """Return the standard deviation, in pixels, of the blur of a photo (1, 3, H, W), at least 0.3."""
    if min(pixels.shape[-2:]) < estimate.SMALLEST:
        return 1.5
    return max(0.3, round(estimate.estimate_blur(pixels), 1))


def parse_request(*, extent: float | None = None, **values: Any) -> Request:
    """Return a Request of what was typed, drawn and selected: its fields, path, numbers that may be left empty, steps
    and label as text. extent: see parse_path. Raises RestoreError."""
    check_known([values["quality"]], QUALITIES, "there is no quality called")
    values["path"] = parse_path(values["path"], extent)
    values["sigma"] = parse_number(values["sigma"], "sigma")
    values["std"] = parse_number(str(values["std"] or ""), "std")
    values["pag_scale"] = parse_number(values["pag_scale"], "PAG scale")
    values["steps"] = parse_steps((values["steps"] or "").strip() or None)
    values["label"] = (values["label"] or "").strip() or None
    values["samples"] = min(int(values["samples"]), MOST_SAMPLES)
    return Request(**values | {"factor": int(values["factor"]), "seed": int(values["seed"] or 0)})


def parse_path(text: str | None, extent: float | None = None) -> list[list[float]]:
    """Return points in pixels, given in pixels or, with an `extent`, as fractions of a square that many pixels wide.

    Raises RestoreError if they cannot be read or lie outside of the square.
    """
    scale, largest = (1.0, LARGEST_PATH) if extent is None else (extent, extent)
    try:
        points = [[float(x) * scale, float(y) * scale] for x, y in json.loads(text or "[]")]
    except (ValueError, TypeError, RecursionError):
        raise RestoreError("the path of the camera cannot be read: draw it again") from None
    if len(points) > 10_000 or not np.isfinite(points).all() or np.abs(points or [0]).max() > largest:
        raise RestoreError("the path of the camera is too long: draw it again")
    return points


def parse_number(text: str | None, name: str) -> float | None:
    """Return the number typed into a field, None for an empty one. Raises RestoreError if it is not a finite number."""
    if not text or not text.strip():
        return None
    try:
        number = float(text)
    except ValueError:
        raise RestoreError(f"{name} must be a number, got {text!r}; leave it empty for the preset's") from None
    return require_number(number, name)
