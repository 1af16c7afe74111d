"""Checks of what a user passes in: every failure is one RestoreError sentence."""

from __future__ import annotations

import math
import numbers

import numpy as np
import torch

from operators.errors import RestoreError


def require_integer(value, name: str, minimum: int = 1, maximum: int | None = None) -> int:
    """`value` as an int >= minimum; a bool, a fraction, a string and what exceeds `maximum` are refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise RestoreError(f"{name} must be an integer of at least {minimum}, got {value!r}.")
    if maximum is not None and value > maximum:
        raise RestoreError(f"{name} must be at most {maximum}, got {value!r}.")
    return int(value)


def require_number(value, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a finite float in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise RestoreError(f"{name} must be a finite number, got {value!r}.")
    if not low <= value <= high:
        raise RestoreError(f"{name} must lie in [{low:g}, {high:g}], got {value!r}.")
    return float(value)


def require_per_image(value, name: str, like: torch.Tensor) -> torch.Tensor:
    """`value` >= 0 (infinity included) in float64 on the CPU: (1,) or, one for each image of `like`, (B,)."""
    is_number = isinstance(value, (numbers.Real, torch.Tensor))
    values = torch.as_tensor(value if is_number else math.nan, dtype=torch.float64, device="cpu").reshape(-1)
    if len(values) not in (1, len(like)) or not (values >= 0).all():
        raise RestoreError(f"{name} must be a number >= 0, or one for each of the {len(like)} images, got {value!r}.")
    return values


def select_images(values: torch.Tensor, rows, what: str) -> torch.Tensor:
    """values[rows] along the batch; rows: a list, tensor, slice or single one of indices 0 ... B - 1."""
    try:
        index = np.arange(len(values))[rows.cpu().numpy() if isinstance(rows, torch.Tensor) else rows]
        return values[torch.from_numpy(index.reshape(-1))]
    except (IndexError, TypeError, ValueError, RuntimeError):
        raise RestoreError(f"there are {len(values)} {what}, of which {rows!r} cannot be taken.") from None


def require_size(value, name: str = "image_size") -> tuple[int, int]:
    """(height, width) from one integer (square) or a pair of them."""
    if isinstance(value, numbers.Integral):
        value = (value, value)
    try:
        height, width = value
    except (TypeError, ValueError):
        raise RestoreError(f"{name} must be one integer or (height, width), got {value!r}.") from None
    return require_integer(height, f"{name}: height"), require_integer(width, f"{name}: width")


def make_random_state(seed) -> np.random.RandomState:
    """numpy's generator whose stream is frozen by its compatibility policy; any integer seed >= 0, 64-bit ones too."""
    seed = require_integer(seed, "the seed", minimum=0)
    words = [(seed >> shift) & 0xFFFFFFFF for shift in range(0, seed.bit_length(), 32)]
    return np.random.RandomState(seed if len(words) < 2 else words)


def require_images(x, what: str = "the image", channels: int | None = None) -> None:
    """Refuse anything but a floating (B, C, H, W) tensor, with C == channels where that is given."""
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or not x.is_floating_point():
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise RestoreError(f"{what} must be a floating-point tensor (B, C, H, W), got {found}.")
    if channels is not None and x.shape[1] != channels:
        raise RestoreError(f"{what} must have {channels} channels, got {x.shape[1]}.")
