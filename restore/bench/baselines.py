"""Linear baselines: interpolation, Wiener filter, pseudo-inverse."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import operators
from operators.base import apply_transpose


def pseudo_inverse(y: torch.Tensor, operator: Any) -> torch.Tensor:
    """Return A_dagger y, clamped to [-1, 1]; (B, 3, H, W)."""
    return operator.A_dagger(y).clamp(-1, 1)


def bicubic(y: torch.Tensor, operator: Any) -> torch.Tensor:
    """Return y resized to the image's size by bicubic interpolation, for super-resolution; (B, 3, H, W)."""
    size = operator.A_adjoint(y).shape[-2:]
    return F.interpolate(y, size=size, mode="bicubic", align_corners=False).clamp(-1, 1)


class _WithGradients:
    """The operator x -> (A x, ratio * grad x), flattened: its least squares solution is the Wiener estimate."""

    def __init__(self, operator: Any, ratio: float, shape: tuple[int, ...]) -> None:
        self.operator, self.ratio, self.shape = operator, ratio, shape

    def A(self, x: torch.Tensor) -> torch.Tensor:
        dy, dx = x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]
        parts = [self.operator.A(x), self.ratio * dy, self.ratio * dx]
        return torch.cat([part.flatten(1) for part in parts], dim=1)[:, None, None]

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return apply_transpose(self.A, y, (len(y), *self.shape[1:]))


def wiener(y: torch.Tensor, operator: Any, gradient_std: float = 0.2) -> torch.Tensor:
    """Return the Wiener estimate of any linear operator for a prior with a 1/f^2 spectrum; (B, 3, H, W).

    That prior is Gaussian with independent neighbour differences of standard deviation
    `gradient_std` (on [-1, 1]), so the estimate minimises
        ||y - A x||^2 / sigma_y^2 + ||grad x||^2 / gradient_std^2,
    the Wiener filter if A is a convolution, harmonic filling if A is a mask. sigma_y is the operator's, at least 1e-3.
    """
    ratio = max(getattr(operator.noise, "sigma", 0.0) or 0.0, 1e-3) / gradient_std
    stacked = _WithGradients(operator, ratio, operator.A_adjoint(y).shape)
    measured = torch.zeros_like(stacked.A(operator.A_adjoint(y)))
    measured[..., : y[0].numel()] = y.flatten(1)[:, None, None]
    return operators.least_squares(stacked, measured, tolerance=1e-4, max_iterations=500).clamp(-1, 1)


def baseline(y: torch.Tensor, operator: Any) -> torch.Tensor:
    """Return `bicubic` for super-resolution and `wiener` for the other linear operators; (B, 3, H, W)."""
    return (bicubic if getattr(operator, "name", "") == "super_resolution" else wiener)(y, operator)


BASELINES = {"baseline": baseline, "pseudo_inverse": pseudo_inverse, "bicubic": bicubic, "wiener": wiener}
