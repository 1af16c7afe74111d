"""Degradation operators y = A(x) + n for images (B, C, H, W) in [-1, 1]."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from operators.errors import RestoreError

if TYPE_CHECKING:
    from operators.adapters import PhysicsOperator, as_linear_operator, as_operator, to_deepinv
    from operators.base import Operator, check_operator
    from operators.blur import Blur, GaussianBlur, MotionBlur
    from operators.compose import Compose
    from operators.factory import build_noise, build_operator, operator_options
    from operators.generic import image_shape, prox_l2, regularised_inverse, select_rows, svd, with_adjoint
    from operators.inpainting import Inpainting, box_mask, random_mask
    from operators.kernels import gaussian_kernel, motion_kernel
    from operators.noise import GaussianNoise, PoissonNoise
    from operators.nonlinear import Clipping, PhaseRetrieval
    from operators.pointwise import Colorization, Denoising
    from operators.proximal import least_squares
    from operators.super_resolution import SuperResolution

# Names are imported when they are used: who asks only for RestoreError does not wait for torch.
_WHERE = {
    "operators.adapters": ["PhysicsOperator", "as_linear_operator", "as_operator", "to_deepinv"],
    "operators.base": ["Operator", "check_operator"],
    "operators.blur": ["Blur", "GaussianBlur", "MotionBlur"],
    "operators.compose": ["Compose"],
    "operators.factory": ["build_noise", "build_operator", "operator_options"],
    "operators.generic": ["image_shape", "prox_l2", "regularised_inverse", "select_rows", "svd", "with_adjoint"],
    "operators.inpainting": ["Inpainting", "box_mask", "random_mask"],
    "operators.kernels": ["gaussian_kernel", "motion_kernel"],
    "operators.noise": ["GaussianNoise", "PoissonNoise"],
    "operators.nonlinear": ["Clipping", "PhaseRetrieval"],
    "operators.pointwise": ["Colorization", "Denoising"],
    "operators.proximal": ["least_squares"],
    "operators.super_resolution": ["SuperResolution"],
}

__all__ = [
    "Blur",
    "Clipping",
    "Colorization",
    "Compose",
    "Denoising",
    "GaussianBlur",
    "GaussianNoise",
    "Inpainting",
    "MotionBlur",
    "Operator",
    "PhaseRetrieval",
    "PhysicsOperator",
    "PoissonNoise",
    "RestoreError",
    "SuperResolution",
    "as_linear_operator",
    "as_operator",
    "box_mask",
    "build_operator",
    "build_noise",
    "check_operator",
    "gaussian_kernel",
    "image_shape",
    "least_squares",
    "motion_kernel",
    "operator_options",
    "prox_l2",
    "random_mask",
    "regularised_inverse",
    "select_rows",
    "svd",
    "to_deepinv",
    "with_adjoint",
]


def __getattr__(name: str):
    for module, names in _WHERE.items():
        if name in names:
            globals()[name] = value = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module 'operators' has no attribute '{name}'")
