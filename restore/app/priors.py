"""The embedded prior that suits a photo, where nobody names one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from restore.memory import Planner
from restore.restoration import encode_condition

FACES, PHOTOS = "embedded", "embedded-photo"
SIDE = 64  # pixels a side of the prior of faces
LEVELS, DRAWS = (0.5, 1.0), 2  # noise levels sigma / alpha at which classes are compared, and draws at each
# By how much less noise must be left if a face is told; less is no evidence, and the prior of photos knows faces too.
# In data/photos, with noise and without: faces 0.003 to 0.018, a cat, a cup and other pieces -0.015 to 0.000.
MARGIN = 0.0015


@dataclass(frozen=True)
class ChosenPrior:
    """A prior for one photo. label: its class, None for none. reason: in words."""

    restorer: Any
    planner: Planner
    label: str | None
    reason: str


class PriorChooser:
    """Chooses a prior for each photo; loads one when it is needed first, and keeps it and its planner.

    load: a Restorer by its name. only: the name of the prior to choose a class of, None to choose the prior too.
    memory: see Planner. observe: receives the backbone of each.
    """

    def __init__(
        self,
        load: Callable[[str], Any],
        only: str | None = None,
        memory: float | None = None,
        observe: Callable[[Any], None] = lambda backbone: None,
    ) -> None:
        self.load, self.only, self.memory, self.observe = load, only, memory, observe
        self.planners: dict[str, Planner] = {}
        if only is not None:  # so that wrong options end the run before the first photo
            self._plan(only)

    def choose(self, pixels: torch.Tensor, size: tuple[int, int], blind: bool = True) -> ChosenPrior:
        """Return the prior of a photo (1, 3, H, W) whose restoration has this size (H, W).

        Up to the resolution of the prior of faces a face gets that prior and its class, anything else the prior of
        photos. blind: False if the photo is the truth, which must not tell what it shows: then there is no class.
        """
        small = max(size) <= SIDE
        extent = f"{'up to' if small else 'larger than'} {SIDE} pixels"
        if self.only is None and not small:
            return self._choose(PHOTOS, None, extent)
        faces = self._plan(FACES).restorer
        if not blind:
            return self._choose(FACES, None, extent)
        if small and shows_face(faces, pixels, size):
            return self._choose(FACES, "face", "a face")
        if self.only is None:
            return self._choose(PHOTOS, None, "no face")
        return self._choose(FACES, "photo", "no face" if small else extent)

    def _choose(self, name: str, label: str | None, reason: str) -> ChosenPrior:
        planner = self._plan(name)
        self.observe(planner.restorer.backbone)
        words = name + f" ({label})" * (label is not None)
        return ChosenPrior(planner.restorer, planner, label, f"prior: {words}, {reason}")

    def _plan(self, name: str) -> Planner:
        if name not in self.planners:
            self.planners[name] = Planner(self.load(name), self.memory)
        return self.planners[name]


def shows_face(restorer: Any, pixels: torch.Tensor, size: tuple[int, int]) -> bool:
    """Return whether the prior removes noise from a picture clearly better if it is told that there is a face.

    pixels: (1, 1 or 3, H, W), seen at the size (H, W).
    """
    return measure_face(restorer, pixels, size) > MARGIN


@torch.no_grad()
def measure_face(restorer: Any, pixels: torch.Tensor, size: tuple[int, int]) -> float:
    """Return by which share of the error of eps the prior does better if it is told that a picture shows a face.

    The mean squared error at middle noise levels, over the same draws for each class (a diffusion classifier: Li et al.
    2023).
    """
    device, generator = restorer.device, torch.Generator().manual_seed(0)
    x = F.interpolate(pixels.float().to(device), size, mode="bicubic", antialias=True).clamp(-1, 1)
    prior, errors = restorer.prior(*size), 0.0
    condition = encode_condition(prior, labels=["face", "photo"]).repeat_interleave(DRAWS)
    for level in LEVELS:
        t = prior.schedule.t(level)
        noise = torch.randn(DRAWS, 3, *size, generator=generator).repeat(2, 1, 1, 1).to(device)
        eps = prior.predict(prior.schedule.alpha(t) * x + prior.schedule.sigma(t) * noise, t, condition).eps
        errors = errors + (eps - noise).square().unflatten(0, (2, DRAWS)).mean((1, 2, 3, 4))
    return 1 - float(errors[0] / errors[1])
