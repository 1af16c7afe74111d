"""What a sampler asks of its network, found by running it: all its steps on a small picture, without the network.

In place of the network stands the exact denoiser of white noise, which costs nothing and which every sampler is
stable with. What is left is the sampler itself and the operator: the calls they make, their memory and their time.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from restore import samplers
from restore.backbones.base import Prediction
from restore.backbones.sizes import Sized
from restore.bench.cost import LiveBytes
from restore.images.masks import Mask
from restore.method import Method
from restore.samplers.noise import ImageNoise, measurement_generator
from restore.task import Task

SIDE, STEPS = 96, 100  # of the small picture, in pixels; the most steps that are run


@dataclass(frozen=True)
class Demand:
    """What restoring one sample takes besides the network.

    calls: by (what, with gradient) how often: "predict", "weak" (guidance's passes), "decode", "encode".
    busiest: the time with the most weak passes. state: bytes, seconds: per pixel of the restored image.
    """

    calls: dict[tuple[str, bool], float]
    busiest: float
    state: float
    seconds: float

    @property
    def gradient(self) -> bool:
        """Whether the sampler differentiates through the network."""
        return ("predict", True) in self.calls

    @property
    def evaluations(self) -> int:
        """Of the network, weak passes included."""
        return round(sum(n for (what, _), n in self.calls.items() if what in ("predict", "weak")))


class Rehearsed(Sized):
    """A prior of Sized's form for x_0 ~ N(0, I), that counts what it is asked. guidance: whose passes are counted."""

    def __init__(self, backbone: Any, height: int, width: int, guidance: Any = None) -> None:
        super().__init__(backbone, height, width)
        self.terms = guidance.terms if guidance is not None else ()
        self.calls: Counter = Counter()
        self.active: dict[float, int] = {}

    def predict(self, x_t: torch.Tensor, t: float, condition: Any = None) -> Prediction:
        self._count("predict", x_t)
        t = min(float(t), float(self.schedule.ts[-1]))  # the PSLD code asks for a time beyond its table
        self.active[t] = sum(term.scale_at(t, self) != 0 for term in self.terms)
        self.calls["weak", False] += self.active[t]
        alpha, sigma = self.schedule.levels(t, x_t)
        variance = torch.zeros_like(x_t) if getattr(self.inner, "learned_variance", False) else None
        x0 = x_t * (alpha / (alpha**2 + sigma**2))
        return Prediction((x_t - alpha * x0) / max(sigma, 1e-6), variance, x0)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        if self.downscale == 1:
            return z
        self._count("decode", z)
        image = F.interpolate(z[:, :3].expand(-1, 3, -1, -1), scale_factor=self.downscale)
        return image[..., : self.height, : self.width]

    def encode(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        if self.downscale == 1:
            return image
        self._count("encode", image)
        z = F.interpolate(image.mean(1, True), self.shape[1:], mode="bilinear")
        return z.expand(-1, self.channels, -1, -1)

    def _count(self, what: str, x: torch.Tensor) -> None:
        self.calls[what, torch.is_grad_enabled() and x.requires_grad] += 1


def rehearse(restorer: Any, task: Task, size: tuple[int, int], method: Method) -> Demand:
    """The demand of `method` for a restored image of this size (H, W). RestoreError: as the sampler raises it."""
    unit = task.factor * 8
    height, width = (min(side, max(unit, SIDE // unit * unit)) for side in size)
    if isinstance(task.config.get("mask"), Mask):
        small = F.interpolate(task.config["mask"].read(), (height, width))
        small[..., 0, 0], small[..., -1, -1] = 0, 1  # what is thin may be lost, and then nothing is missing
        task = Task(task.name, task.config | {"mask": small})
    operator, device = task.build(height, width), restorer.device
    steps, whole = method.steps, 1.0
    if isinstance(steps, int) and steps > STEPS:
        steps, whole = STEPS, steps / STEPS
    method = replace(method, steps=steps)
    prior = Rehearsed(restorer.backbone, height, width, method.guidance)
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
        y = operator(x, measurement_generator(0, "rehearsal")).to(device)
        started = time.perf_counter()
        with LiveBytes() as live:
            samplers.find_sampler(method.sampler)(
                prior, operator, y, noise=ImageNoise([(0, "", 0)], device), steps=steps, **method.parameters
            )
    seconds = time.perf_counter() - started
    return Demand(
        {key: n * whole for key, n in prior.calls.items() if n},
        max(prior.active, key=prior.active.get, default=0.0),
        live.peak / (height * width),
        seconds * whole / (height * width),
    )
