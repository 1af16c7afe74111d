"""What a person wants, in plain words, and the task of restore.app.tasks that it is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from operators import RestoreError
from operators.naming import check_known
from restore.app import tasks
from restore.app.tasks import Task
from restore.images import estimate

# In plain words, and in the field's.
PLAIN = {
    "fill": ("Fill in what I paint over", "inpainting"),
    "enlarge": ("Enlarge ×2, ×4 or ×8", "super-resolution"),
    "sharpen": ("Sharpen a blurred photo", "deconvolution"),
    "denoise": ("Remove noise", "denoising"),
    "colour": ("Add colour", "colorization"),
}
FACTORS = (2, 4, 8)
BLURS = {"focus": ("It is out of focus", "Gaussian blur"), "motion": ("The camera moved", "motion blur")}
LEAST, MOST = 0.02, 1.0  # sigma_y that is taken from an estimate; rounding to 8 bits alone is 0.002


@dataclass(frozen=True)
class Wish:
    """What the page asks for.

    task: of PLAIN. factor: of FACTORS. blur: of BLURS; std: of the blur out of focus, in pixels; path: (N, 2) points
    x, y in pixels, the way of a camera that moved. sigma: the photo's noise on [-1, 1], None: estimated. sensitivity:
    of the search for damage where no mask is given. quality, samples, seed: see
    Restorer. steps, pag_scale: None leaves the preset's. pictures: of the guidance through time. label: a class of
    the prior, None for none.
    """

    task: str = "fill"
    factor: int = 4
    blur: str = "focus"
    std: float = 1.5
    path: Sequence[Sequence[float]] = ()
    sigma: float | None = None
    sensitivity: float = 0.5
    quality: str = "balanced"
    samples: int = 3
    steps: int | str | None = None
    seed: int = 0
    pag_scale: float | None = None
    pictures: bool = False
    label: str | None = None


def task_of(wish: Wish, pixels: torch.Tensor, folder: Path, mask: Path | None = None) -> Task:
    """The task of a photo with these pixels (1, 3, H, W); what it needs as a file is written into `folder`.

    Raises RestoreError for an unknown word, a missing mask or path and numbers that do not fit the photo.
    """
    check_known([wish.task], PLAIN, "there is no task called")
    sigma = wish.sigma
    if sigma is None:
        sigma = noise(pixels)
    settings = {"sigma": _number(sigma, "the noise", 0, 4)}
    if wish.task == "fill":
        if mask is None:
            raise RestoreError("paint over what is damaged first, or let scratches and dust be proposed")
        return tasks.find_task("inpaint", settings, mask=mask)
    if wish.task == "enlarge":
        if wish.factor not in FACTORS:
            raise RestoreError(f"a photo is enlarged by {', '.join(map(str, FACTORS))}, not by {wish.factor}")
        return tasks.find_task(f"sr{wish.factor}", settings)
    if wish.task == "sharpen":
        check_known([wish.blur], BLURS, "there is no blur called")
        if wish.blur == "motion":
            if len(wish.path) < 2:
                raise RestoreError("draw the way of the camera first")
            kernel = folder / "kernel.npy"
            np.save(kernel, estimate.motion_path_kernel(torch.tensor(wish.path)).double().numpy())
            return tasks.find_task("blur", settings, kernel=kernel)
        std = _number(wish.std, "the size of the blur", 0.1, 50)
        radius = min(math.ceil(3 * std), min(pixels.shape[-2:]) - 1)
        return tasks.find_task("gaussian-blur", settings | {"std": std, "kernel_size": 2 * radius + 1})
    return tasks.find_task("denoise" if wish.task == "denoise" else "colorize", settings)


def noise(pixels: torch.Tensor) -> float:
    """sigma_y of a photo (1, 3, H, W): estimated, within [LEAST, MOST]; that of the presets where it is too small."""
    if min(pixels.shape[-2:]) < 32:
        return 0.05
    return min(max(round(estimate.noise_level(pixels), 3), LEAST), MOST)


def drawn(text: str | None, extent: float) -> list[list[float]]:
    """The points of a path that was drawn on a square `extent` pixels wide. Raises RestoreError for what is none."""
    try:
        points = [[float(x) * extent, float(y) * extent] for x, y in json.loads(text or "[]")]
    except (ValueError, TypeError, RecursionError):
        raise RestoreError("the way of the camera is not readable: draw it again") from None
    if len(points) > 10_000 or not np.isfinite(points).all() or np.abs(points or [0]).max() > extent:
        raise RestoreError("the way of the camera leaves its square: draw it again")
    return points


def number(text: str | None, what: str) -> float | None:
    """What a person typed into a field; None where it was left empty. Raises RestoreError for what is no number."""
    if not text or not text.strip():
        return None
    try:
        return _number(float(text), what)
    except ValueError:
        raise RestoreError(f"{what} must be a number, not {text!r}; leave it empty for the preset's") from None


def _number(value: float, what: str, least: float = -math.inf, most: float = math.inf) -> float:
    if not (math.isfinite(value) and least <= value <= most):
        raise RestoreError(f"{what} must lie between {least:g} and {most:g}, not {value:g}")
    return float(value)
