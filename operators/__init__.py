"""Degradation operators y = A(x) + n for images (B, C, H, W) in [-1, 1]."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from operators.errors import RestoreError

if TYPE_CHECKING:
    from operators.adapters import PhysicsOperator, as_linear_operator, as_operator, to_deepinv
    from operators.base import Compose, Operator, check, least_squares
    from operators.blur import Blur, GaussianBlur, MotionBlur
    from operators.factory import build, build_noise, options
    from operators.inpainting import Inpainting, box_mask, random_mask
    from operators.kernels import gaussian_kernel, motion_kernel
    from operators.noise import GaussianNoise, PoissonNoise
    from operators.pointwise import Colorization, Denoising
    from operators.super_resolution import SuperResolution

# Names are imported when they are used: who asks only for RestoreError does not wait for torch.
_WHERE = {
    "Blur": "operators.blur",
    "Colorization": "operators.pointwise",
    "Compose": "operators.base",
    "Denoising": "operators.pointwise",
    "GaussianBlur": "operators.blur",
    "GaussianNoise": "operators.noise",
    "Inpainting": "operators.inpainting",
    "MotionBlur": "operators.blur",
    "Operator": "operators.base",
    "PhysicsOperator": "operators.adapters",
    "PoissonNoise": "operators.noise",
    "SuperResolution": "operators.super_resolution",
    "as_linear_operator": "operators.adapters",
    "as_operator": "operators.adapters",
    "box_mask": "operators.inpainting",
    "build": "operators.factory",
    "build_noise": "operators.factory",
    "check": "operators.base",
    "gaussian_kernel": "operators.kernels",
    "least_squares": "operators.base",
    "motion_kernel": "operators.kernels",
    "options": "operators.factory",
    "random_mask": "operators.inpainting",
    "to_deepinv": "operators.adapters",
}

__all__ = [
    "Blur",
    "Colorization",
    "Compose",
    "Denoising",
    "GaussianBlur",
    "GaussianNoise",
    "Inpainting",
    "MotionBlur",
    "Operator",
    "PhysicsOperator",
    "PoissonNoise",
    "RestoreError",
    "SuperResolution",
    "as_linear_operator",
    "as_operator",
    "box_mask",
    "build",
    "build_noise",
    "check",
    "gaussian_kernel",
    "least_squares",
    "motion_kernel",
    "options",
    "random_mask",
    "to_deepinv",
]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'operators' has no attribute '{name}'")
    globals()[name] = value = getattr(importlib.import_module(_WHERE[name]), name)
    return value
