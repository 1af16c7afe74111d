"""Temporal score rescaling (TSR, Xu et al. 2025): the score of a sharper or flatter distribution, no weak pass.

eps' = r eps,      r = (eta sigma_0^2 + 1) / (eta sigma_0^2 / k + 1),      eta = alpha^2 / sigma^2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from operators.ranges import Positive
from restore.backbones.base import Backbone
from restore.guidance.base import Change, ChangeTerm, require_prior


@dataclass(frozen=True)
class TSR(ChangeTerm):
    """Temporal score rescaling: eps + s (r − 1) eps. See Term for scale (1 is the paper's), interval and schedule.

    For x_0 of a Gaussian of standard deviation sigma0, r eps is exactly that of variance sigma0^2 / k.

    k: above 1 sharpens, below 1 flattens. sigma0: scale, in units of x, of the details that are to change.
    """

    k: Positive = 0.93
    sigma0: Positive = 3.0

    def bind(self, backbone: Backbone) -> Change:
        """Raises RestoreError inside a diffusers pipeline, whose network need not predict eps."""
        require_prior(backbone, "tsr")

        def direction(eps: torch.Tensor, x_t: torch.Tensor, t: float) -> torch.Tensor:
            ratio = backbone.schedule.ratio(min(t, backbone.schedule.ts[-1]))  # sigma / alpha
            r = (self.sigma0**2 + ratio**2) / (self.sigma0**2 / self.k + ratio**2)
            return (r - 1) * eps

        return Change(direction)
