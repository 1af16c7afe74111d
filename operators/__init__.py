"""Degradation operators y = A(x) + n for images (B, C, H, W) in [-1, 1]."""

from __future__ import annotations

import importlib

from operators.errors import RestoreError

# Imported on first use: a program that only catches RestoreError does not wait for torch.
_MODULES = {
    "adapters": ["PhysicsOperator", "as_linear_operator", "as_operator", "to_deepinv"],
    "base": ["Operator", "check_operator"],
    "blur": ["Blur", "GaussianBlur", "MotionBlur"],
    "compose": ["Compose"],
    "factory": ["build_noise", "build_operator", "forget_border", "operator_options", "read_extent", "read_parts"],
    "generic": [
        "continue_margin",
        "cut_margin",
        "describe",
        "find_noise",
        "image_shape",
        "is_linear",
        "prox_l2",
        "regularised_inverse",
        "select_rows",
        "svd",
        "with_adjoint",
    ],
    "jpeg": ["JPEG", "JPEGNoise"],
    "inpainting": ["Inpainting", "box_mask", "random_mask"],
    "kernels": ["gaussian_kernel", "motion_kernel"],
    "noise": ["GaussianNoise", "PoissonNoise"],
    "nonlinear": ["Clipping", "JPEGRounding", "NonlinearBlur", "PhaseRetrieval"],
    "pointwise": ["Colorization", "Denoising"],
    "proximal": ["least_squares"],
    "super_resolution": ["SuperResolution"],
}

__all__ = ["RestoreError", *(name for names in _MODULES.values() for name in names)]


def __getattr__(name: str):
    for module, names in _MODULES.items():
        if name in names:
            globals()[name] = value = getattr(importlib.import_module(f"operators.{module}"), name)
            return value
    raise AttributeError(f"module 'operators' has no attribute '{name}'")
