"""Tangential amplifying guidance (TAG, Cho et al. 2025): a larger share of the update across x_t, no weak pass.

eps + s (eps − <eps, x> x / ||x||^2),      x = x_t, per image; s = eta − 1 of the paper
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from operators import RestoreError
from restore.backbones.base import Backbone
from restore.guidance.base import Change, ChangeTerm
from restore.guidance.combine import project


@dataclass(frozen=True)
class TAG(ChangeTerm):
    """Tangential amplifying guidance. See Term for scale (0.15 in the paper), interval and schedule.

    The paper takes the update x_s − x_t of a step apart. Without fresh noise that is a x_t + b eps, whose part across
    x_t is b times that of eps, so that changing eps is the same; fresh noise is left as it is. It acts on the estimate
    that all weak passes have guided.
    """

    def bind(self, backbone: Backbone) -> Change:
        return Change(_find_tangent)


def _find_tangent(eps: torch.Tensor, x_t: torch.Tensor, t: float) -> torch.Tensor:
    """Raises RestoreError if eps is no change of x_t, as with a learned variance inside a pipeline."""
    if eps.ndim == x_t.ndim == 4:
        x_t = x_t[:, : eps.shape[1]]  # masks and images beside the latents of a pipeline's network
    if x_t.shape != eps.shape:
        raise RestoreError(f"tag needs predictions of the shape of x, {tuple(x_t.shape)}, got {tuple(eps.shape)}")
    return eps - project(eps, x_t)
