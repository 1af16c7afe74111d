"""Autoguidance (Karras et al. 2024): the weak pass is made by a weaker model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from operators import RestoreError
from restore.backbones.base import Backbone, Prediction, Renormalised
from restore.backbones.sizes import Sized
from restore.guidance.base import Guidance, Term, WeakPass, require_prior


@dataclass(frozen=True)
class Autoguidance(Term):
    """Guidance by a smaller model or an earlier checkpoint. See Term for scale, interval and schedule.

    model: a name of `restore models list`, a folder, a file, or a backbone; loaded once, to the strong model's device
        and precision. It must predict the same x, and is evaluated at the time of the same ratio sigma / alpha. One
        without classes gets no label: CFG from two models (PAG, Fig. 41).
    """

    model: Any
    loaded: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.model, Path):
            object.__setattr__(self, "model", str(self.model))
        if not isinstance(self.model, str) and not hasattr(self.model, "predict"):
            raise RestoreError(f"model of autoguidance must be a name, a file or a backbone, got {self.model!r}")

    def bind(self, backbone: Backbone) -> WeakPass:
        """Raises RestoreError for a model that does not load, or has other images or another kind of noise."""
        require_prior(backbone, "autoguidance")
        strong = unwrap(backbone)
        weak = self.load(strong)
        name = self.model if isinstance(self.model, str) else type(self.model).__name__
        x, weak_x = (f"{m.channels} channels at 1/{m.downscale} of an image's side" for m in (strong, weak))
        if x != weak_x:
            raise RestoreError(f"model of autoguidance must predict the prior's x, {x}, got {name} with {weak_x}")
        weak = wrap_like(backbone, weak)
        kind, weak_kind = backbone.schedule.kind, weak.schedule.kind
        if weak_kind != kind:
            raise RestoreError(f"model of autoguidance must have the prior's noise {kind}, got {name} with {weak_kind}")
        return predict_by(weak, backbone)

    def load(self, strong: Backbone) -> Backbone:
        """Return the weaker model, on the device and in the precision of `strong`."""
        if not isinstance(self.model, str):
            return self.model
        device = next(strong.network.parameters()).device
        dtype = getattr(strong, "dtype", None) or strong.network.dtype
        if (device, dtype) not in self.loaded:
            from restore import zoo

            where = {"device": device, "precision": dtype, "offline": getattr(strong, "offline", None)}
            self.loaded[device, dtype] = zoo.load_backbone(self.model, **where)[1]
        return self.loaded[device, dtype]


def list_autoguidance(guidance: Guidance | None) -> list[Autoguidance]:
    """Return the terms of a guidance that have a weaker model."""
    return [term for term in (guidance.terms if guidance is not None else ()) if isinstance(term, Autoguidance)]


def predict_by(weak: Backbone, backbone: Backbone) -> WeakPass:
    """Return the pass in which `weak` predicts at the noise level that t has on `backbone`."""
    here, there = backbone.schedule, weak.schedule
    takes_no_class = getattr(unwrap(weak), "classes", ()) is None
    same_times = np.array_equal(here.ts, there.ts) and np.array_equal(here.ratios, there.ratios)
    sized = backbone.inner if isinstance(backbone, Renormalised) else backbone

    def eps(x_t: torch.Tensor, t: float, condition: Any, strong: Prediction) -> torch.Tensor:
        if not same_times:
            t = there.t(here.ratio(min(t, here.ts[-1])))
        if takes_no_class and _is_class(condition):
            condition = None
        eps = weak.predict(x_t, t, condition).eps
        if isinstance(sized, Sized):  # which counts the evaluations of the run
            sized.evaluations += 1
        return eps

    return WeakPass(eps)


def _is_class(condition: Any) -> bool:
    return isinstance(condition, int) or (isinstance(condition, torch.Tensor) and not condition.is_floating_point())


def unwrap(backbone: Backbone) -> Backbone:
    """Return the backbone itself, at its own size and normalisation of noise."""
    while isinstance(backbone, (Renormalised, Sized)):
        backbone = backbone.inner
    return backbone


def wrap_like(backbone: Backbone, weak: Backbone, window: int | None = None, overlap: float | None = None) -> Backbone:
    """Return `weak` with the image size and normalisation of `backbone`; window: side of its windows, in cells of x."""
    sized = backbone.inner if isinstance(backbone, Renormalised) else backbone
    if isinstance(sized, Sized):
        overlap = sized.overlap if overlap is None else overlap
        weak = Sized(weak, sized.height, sized.width, overlap=overlap, max_windows=sized.max_windows)
    elif window is not None:
        weak = Sized(weak, weak.resolution, weak.resolution, overlap=overlap)
    if window is not None:
        weak.resolution = window
    return Renormalised(weak, backbone.schedule.kind) if isinstance(backbone, Renormalised) else weak
