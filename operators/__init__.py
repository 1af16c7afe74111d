"""Degradation operators y = A(x) + n for images (B, C, H, W) in [-1, 1]."""

from operators.adapters import PhysicsOperator, as_linear_operator, as_operator, to_deepinv
from operators.base import Compose, Operator, check, least_squares
from operators.blur import Blur, GaussianBlur, MotionBlur
from operators.errors import RestoreError
from operators.factory import build, build_noise, options
from operators.inpainting import Inpainting, box_mask, random_mask
from operators.kernels import gaussian_kernel, motion_kernel
from operators.noise import GaussianNoise, PoissonNoise
from operators.pointwise import Colorization, Denoising
from operators.super_resolution import SuperResolution

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
