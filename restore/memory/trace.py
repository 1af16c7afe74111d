"""A dry run of a sampler: all its steps on a small image, with a stand-in for the network.

The stand-in is the exact denoiser of white noise, which costs nothing and with which every sampler is stable. What
remains are the sampler and the operator: the calls they make, their memory and their time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from restore import samplers
from restore.backbones.base import Prediction, count_image_channels
from restore.backbones.sizes import Sized
from restore.images.masks import Mask
from restore.memory.count import LiveBytes
from restore.method import Method
from restore.samplers.noise import ImageNoise, measurement_generator
from restore.task import Task

SIDE, MAX_STEPS = 96, 100  # of the dry run: side of its image in pixels, steps


@dataclass(frozen=True)
class SamplerTrace:
    """What one sample takes apart from the network.

    calls: number of calls by (name, with gradient); the names are "predict", "weak" (the weak passes of guidance),
        "decode" and "encode".
    busiest: the time t with the most weak passes.
    bytes_per_pixel, seconds_per_pixel: of the sampler and the operator, per pixel of the restored image.
    """

    calls: dict[tuple[str, bool], float]
    busiest: float
    bytes_per_pixel: float
    seconds_per_pixel: float

    @property
    def gradient(self) -> bool:
        """Whether the sampler differentiates through the network."""
        return ("predict", True) in self.calls

    def count(self, name: str) -> float:
        """Return the number of calls of this name, with and without gradient."""
        return self.calls.get((name, False), 0) + self.calls.get((name, True), 0)

    @property
    def evaluations(self) -> int:
        """Number of network evaluations, weak passes included."""
        return round(self.count("predict") + self.count("weak"))


class TracedPrior(Sized):
    """The prior x_0 ~ N(0, I) with a backbone's shapes and noise levels; counts its calls and those of guidance."""

    def __init__(self, backbone: Any, height: int, width: int, guidance: Any = None) -> None:
        super().__init__(backbone, height, width)
        self.terms = guidance.terms if guidance is not None else ()
        self.calls: Counter = Counter()
        self.kept = [0] * len(self.terms)  # evaluations that each term's last weak pass still serves
        self.active: dict[float, int] = {}

    def predict(self, x_t: torch.Tensor, t: float, condition: Any = None) -> Prediction:
        self._count("predict", x_t)
        t = min(float(t), float(self.schedule.ts[-1]))  # the PSLD code asks for a time beyond its table
        self.active[t] = sum(self._runs(k, t) for k in range(len(self.terms)))
        self.calls["weak", False] += self.active[t]
        alpha, sigma = self.schedule.levels(t, x_t)
        variance = torch.zeros_like(x_t) if getattr(self.inner, "learned_variance", False) else None
        x0 = x_t * (alpha / (alpha**2 + sigma**2))
        return Prediction((x_t - alpha * x0) / max(sigma, 1e-6), variance, x0)

    def _runs(self, k: int, t: float) -> bool:
        """Whether the weak pass of a term runs, as Estimate decides it."""
        term = self.terms[k]
        if not term.has_weak_pass or term.scale_at(t, self) == 0:
            return False
        is_kept = self.kept[k] > 0
        self.kept[k] = self.kept[k] - 1 if is_kept else term.every - 1
        return not is_kept

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        if self.downscale == 1:
            return z
        self._count("decode", z)
        channels = count_image_channels(self.inner)
        z = z[:, :channels] if z.shape[1] >= channels else z[:, :1].expand(-1, channels, -1, -1)
        image = F.interpolate(z, scale_factor=self.downscale)
        return image[..., : self.height, : self.width]

    def encode(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        if self.downscale == 1:
            return image
        self._count("encode", image)
        z = F.interpolate(image.mean(1, True), self.shape[1:], mode="bilinear")
        return z.expand(-1, self.channels, -1, -1)

    def _count(self, name: str, x: torch.Tensor) -> None:
        self.calls[name, torch.is_grad_enabled() and x.requires_grad] += 1


def trace_sampler(restorer: Any, task: Task, size: tuple[int, int], method: Method) -> SamplerTrace:
    """Run the sampler of `method` for a restored image of this size (H, W). Raises RestoreError if the sampler does."""
    unit = task.factor * 8
    least = (max(unit, SIDE // unit * unit) + 2 * margin for margin in task.margin)
    height, width = (min(pair) for pair in zip(size, least, strict=True))
    seen = tuple((side - 2 * margin) // task.factor for side, margin in zip((height, width), task.margin, strict=True))
    task = replace(task, config=_shrink_masks(task.config, seen))
    operator = task.build(height, width)
    with torch.inference_mode(False):
        shape = (1, count_image_channels(restorer.backbone), height, width)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).clamp(-1, 1)
        y = operator(x, measurement_generator(0, "rehearsal")).to(restorer.device)
    return run_dry(restorer, operator, y, (height, width), method)


def run_dry(
    restorer: Any, operator: Any, y: torch.Tensor, size: tuple[int, int], method: Method, most: int = MAX_STEPS
) -> SamplerTrace:
    """Run the sampler of `method` for the image of this size (H, W) that gave y (1, ...), in at most so many steps.
    Raises RestoreError if the sampler does."""
    (height, width), device = size, restorer.device
    steps, scale = method.steps, 1.0
    if isinstance(steps, int) and steps > most:
        steps, scale = most, steps / most
    prior = TracedPrior(restorer.backbone, height, width, method.guidance)
    with torch.inference_mode(False), torch.enable_grad():
        started = time.perf_counter()
        with LiveBytes() as live:
            samplers.find_sampler(method.sampler)(
                prior, operator, y, noise=ImageNoise([(0, "", 0)], device), steps=steps, **method.parameters
            )
    seconds = time.perf_counter() - started
    return SamplerTrace(
        {key: n * scale for key, n in prior.calls.items() if n},
        max(prior.active, key=prior.active.get, default=0.0),
        live.peak / (height * width),
        seconds * scale / (height * width),
    )


def _shrink_masks(config: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return an operator's mapping with masks of this size in place of its own, in a chain too."""
    if "operators" in config:
        return {**config, "operators": [_shrink_masks(part, size) for part in config["operators"]]}
    mask = config.get("mask")
    if not isinstance(mask, (Mask, torch.Tensor)):
        return dict(config)
    small = F.interpolate(mask.read() if isinstance(mask, Mask) else mask, size)
    small[..., 0, 0], small[..., -1, -1] = 0, 1  # thin holes may be lost, and a mask without any is an error
    return {**config, "mask": small}
