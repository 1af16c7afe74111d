"""Weak passes by a weaker model: another network (autoguidance), or the same one that sees less (small windows)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from operators import RestoreError
from restore.backbones.base import Backbone, Prediction, Renormalised
from restore.backbones.sizes import Sized
from restore.guidance.base import Guidance, Term, require_prior


@dataclass(frozen=True)
class WeakerModel:
    """The weak pass is another model's: smaller, or an earlier checkpoint (autoguidance, Karras et al. 2024).

    model: a name of `restore models list`, a folder, a file, or a backbone. It is loaded once per guidance, to the
        strong model's device and in its precision. It must predict the same x; where its noise levels lie at other
        times, it is asked at the time of the same ratio sigma / alpha.
    """

    model: Any
    loaded: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        if isinstance(self.model, Path):
            object.__setattr__(self, "model", str(self.model))

    def bind(self, backbone: Backbone) -> WeakerPass:
        """Raises RestoreError for a model that does not load, or is of other images or another kind of noise."""
        require_prior(backbone, "autoguidance")
        strong, weak = _bare(backbone), self._load(_bare(backbone))
        name = self.model if isinstance(self.model, str) else type(self.model).__name__
        if (weak.channels, weak.downscale) != (strong.channels, strong.downscale):
            raise RestoreError(
                f"the weaker model {name} predicts {weak.channels} channels at 1/{weak.downscale} of an image's side, "
                f"the prior {strong.channels} at 1/{strong.downscale}: autoguidance needs two models of the same x"
            )
        weak = _seen_as(backbone, weak)
        if weak.schedule.kind != backbone.schedule.kind:
            raise RestoreError(
                f"the weaker model {name} has noise of the kind {weak.schedule.kind}, the prior of the kind "
                f"{backbone.schedule.kind}"
            )
        return WeakerPass(backbone, weak)

    def _load(self, strong: Backbone) -> Backbone:
        if not isinstance(self.model, str):
            return self.model
        device = next(strong.network.parameters()).device
        dtype = getattr(strong, "dtype", None) or strong.network.dtype
        if (device, dtype) not in self.loaded:
            from restore import zoo

            self.loaded[device, dtype] = zoo.load_backbone(self.model, device=device, precision=dtype)[1]
        return self.loaded[device, dtype]


@dataclass(frozen=True)
class SmallWindows:
    """The weak pass sees the image in windows alone (sliding-window guidance, Kaiser et al. 2024).

    window: their side in pixels, less than the prior's resolution; overlap: the fraction shared with a neighbour.
    They are blended as those of large photos are.
    """

    window: int
    overlap: float = 0.5

    def bind(self, backbone: Backbone) -> WeakerPass:
        """Raises RestoreError for a window that the network cannot take, or that is not smaller than its images."""
        require_prior(backbone, "swg")
        inner = _bare(backbone)
        step, limit = inner.downscale * inner.multiple, inner.downscale * inner.resolution
        if self.window % step or not 0 < self.window < limit or not 0 <= self.overlap < 1:
            raise RestoreError(
                f"swg needs a window that is a multiple of {step} and less than {limit} pixels, and an overlap in "
                f"[0, 1), not {self.window} and {self.overlap}"
            )
        return WeakerPass(backbone, _seen_as(backbone, inner, self.window // inner.downscale, self.overlap))


def Autoguidance(
    scale: float, model: Any, interval: tuple[float, float] | None = None, schedule: Any = "constant"
) -> Guidance:
    """Autoguidance: see WeakerModel for how, Term for scale, interval and schedule."""
    return Guidance((Term(WeakerModel(model), scale, interval, schedule),))


def SWG(
    scale: float,
    window: int,
    overlap: float = 0.5,
    interval: tuple[float, float] | None = None,
    schedule: Any = "constant",
) -> Guidance:
    """Sliding-window guidance: see SmallWindows for how, Term for scale, interval and schedule."""
    return Guidance((Term(SmallWindows(window, overlap), scale, interval, schedule),))


class WeakerPass:
    """The same x_t, predicted by `weak`."""

    modules: tuple = ()

    def __init__(self, backbone: Backbone, weak: Backbone):
        self.backbone, self.weak = backbone, weak
        here, there = backbone.schedule, weak.schedule
        self.same_times = np.array_equal(here.ts, there.ts) and np.array_equal(here.ratios, there.ratios)

    def eps(self, x_t: torch.Tensor, t: float, condition: Any, strong: Prediction) -> torch.Tensor:
        if not self.same_times:
            t = self.weak.schedule.t(self.backbone.schedule.ratio(min(t, self.backbone.schedule.ts[-1])))
        eps = self.weak.predict(x_t, t, condition).eps
        sized = self.backbone.inner if isinstance(self.backbone, Renormalised) else self.backbone
        if isinstance(sized, Sized):  # where a run's evaluations are counted
            sized.evaluations += 1
        return eps


def _bare(backbone: Backbone) -> Backbone:
    while isinstance(backbone, (Renormalised, Sized)):
        backbone = backbone.inner
    return backbone


def _seen_as(backbone: Backbone, weak: Backbone, window: int | None = None, overlap: float | None = None) -> Backbone:
    """`weak` with the image size and the normalisation of noise that `backbone` has; on windows of that side in x."""
    sized = backbone.inner if isinstance(backbone, Renormalised) else backbone
    if isinstance(sized, Sized):
        options = {"overlap": sized.overlap if overlap is None else overlap, "max_windows": sized.max_windows}
        weak = Sized(weak, sized.height, sized.width, **options)
    elif window is not None:
        weak = Sized(weak, weak.resolution, weak.resolution, overlap=overlap)
    if window is not None:
        weak.resolution = window
    return Renormalised(weak, backbone.schedule.kind) if isinstance(backbone, Renormalised) else weak
