"""Sliding-window guidance (SWG, Kaiser et al. 2024): the weak pass sees the image only in small windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from operators import RestoreError
from operators.ranges import Count, Range
from restore.backbones.base import Backbone
from restore.guidance.autoguidance import predict_by, unwrap, wrap_like
from restore.guidance.base import Term, WeakPass, require_prior


@dataclass(frozen=True)
class SWG(Term):
    """Sliding-window guidance. See Term for scale, interval and schedule.

    window: side in pixels, less than the prior's resolution. overlap: the fraction shared with a neighbour.
    """

    window: Count
    overlap: Annotated[float, Range(0, below=1)] = 0.5

    def bind(self, backbone: Backbone) -> WeakPass:
        """Raises RestoreError for a window that the network does not support or that is not smaller than its images."""
        require_prior(backbone, "swg")
        inner = unwrap(backbone)
        step, limit = inner.downscale * inner.multiple, inner.downscale * inner.resolution
        if self.window % step or self.window >= limit:
            raise RestoreError(f"window of swg must be below {limit} and a multiple of {step}, got {self.window}")
        sides = [getattr(backbone, name, None) for name in ("height", "width")]
        if None not in sides and max(sides) <= self.window:
            raise RestoreError(
                f"window of swg must be below the image's sides, {sides[0]} x {sides[1]}, got {self.window}"
            )
        return predict_by(wrap_like(backbone, inner, self.window // inner.downscale, self.overlap), backbone)
