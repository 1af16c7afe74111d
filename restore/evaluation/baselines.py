"""What a posterior sampler has to beat: interpolation, Wiener filtering, pseudo-inverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def pseudo_inverse(y: torch.Tensor, operator: Any) -> torch.Tensor:
    """A_dagger y, clamped to [-1, 1]; (B, 3, H, W)."""
    return operator.A_dagger(y).clamp(-1, 1)


def bicubic(y: torch.Tensor, operator: Any) -> torch.Tensor:
    """y resized to the image's size by bicubic interpolation, for super-resolution; (B, 3, H, W)."""
    size = operator.A_adjoint(y).shape[-2:]
    return F.interpolate(y, size=size, mode="bicubic", align_corners=False).clamp(-1, 1)


def wiener(
    y: torch.Tensor, operator: Any, sigma_y: float, gradient_std: float = 0.2, tolerance: float = 1e-4
) -> torch.Tensor:
    """The Wiener estimate for a prior with a 1/f^2 spectrum, for any linear operator; (B, 3, H, W).

    That prior is Gaussian with independent neighbour differences of standard deviation
    `gradient_std` (on [-1, 1]), so the estimate minimises
        ||y - A x||^2 / sigma_y^2 + ||grad x||^2 / gradient_std^2,
    which is the Wiener filter where A is a convolution and harmonic filling where A is a mask.
    Solved by conjugate gradients on the normal equations to the relative `tolerance`.
    """
    ratio = (max(sigma_y, 1e-3) / gradient_std) ** 2

    def normal(x: torch.Tensor) -> torch.Tensor:
        return operator.A_adjoint(operator.A(x)) + ratio * _laplacian(x)

    return conjugate_gradients(normal, operator.A_adjoint(y), tolerance).clamp(-1, 1)


def _laplacian(x: torch.Tensor) -> torch.Tensor:
    """grad^T grad with free boundaries: the negative Laplacian, positive semi-definite."""
    out = torch.zeros_like(x)
    dy, dx = x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]
    out[..., 1:, :] += dy
    out[..., :-1, :] -= dy
    out[..., :, 1:] += dx
    out[..., :, :-1] -= dx
    return out


def conjugate_gradients(matvec: Callable, b: torch.Tensor, tolerance: float, max_steps: int = 500) -> torch.Tensor:
    """Solve matvec(x) = b for each image of the batch separately (Hestenes & Stiefel 1952)."""

    def dot(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (u * v).flatten(1).sum(1).view(-1, 1, 1, 1)

    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), dot(r, r)
    stop = tolerance**2 * rr
    for _ in range(max_steps):
        if bool((rr <= stop).all()):
            break
        q = matvec(p)
        step = rr / dot(p, q).clamp(min=1e-30)
        x, r = x + step * p, r - step * q
        rr_new = dot(r, r)
        p, rr = r + rr_new / rr.clamp(min=1e-30) * p, rr_new
    return x


def baseline(y: torch.Tensor, operator: Any, sigma_y: float) -> tuple[str, torch.Tensor]:
    """(name, estimate): bicubic for super-resolution, Wiener for the other linear operators."""
    if getattr(operator, "name", "") == "super_resolution":
        return "bicubic", bicubic(y, operator)
    return "Wiener", wiener(y, operator, sigma_y)
