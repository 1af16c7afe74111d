"""Checks of what a user passes in: every failure is a RestoreError of one sentence."""

from __future__ import annotations

import math
import numbers

import numpy as np
import torch

from operators.errors import RestoreError


def require_integer(value, name: str, minimum: int = 1, maximum: float = math.inf) -> int:
    """Return `value` as an int in [minimum, maximum]. Raises RestoreError also for a bool, a fraction and a string."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not minimum <= value <= maximum:
        limit = "" if maximum == math.inf else f" and at most {maximum}"
        raise RestoreError(f"{name} must be an integer of at least {minimum}{limit}, got {value!r}")
    return int(value)


def require_number(value, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """Return `value` as a finite float in [low, high]. Raises RestoreError otherwise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise RestoreError(f"{name} must be a finite number, got {value!r}")
    if not low <= value <= high:
        raise RestoreError(f"{name} must lie in [{low:g}, {high:g}], got {value!r}")
    return float(value)


def require_positive(value, name: str) -> float:
    """Return `value` as a finite float above 0. Raises RestoreError otherwise."""
    if require_number(value, name) <= 0:
        raise RestoreError(f"{name} must be positive, got {value!r}")
    return float(value)


def require_choice(value, name: str, choices: tuple):
    """Return `value` if it is one of `choices`. Raises RestoreError otherwise."""
    if value not in choices:
        raise RestoreError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
    return value


def require_per_image(value, name: str, like: torch.Tensor) -> torch.Tensor:
    """Return `value` >= 0 (infinity included) as float64 on the CPU: (1,), or (B,) with one entry per image of `like`.
    Raises RestoreError otherwise."""
    is_number = isinstance(value, (numbers.Real, torch.Tensor))
    values = torch.as_tensor(value if is_number else math.nan, dtype=torch.float64, device="cpu").reshape(-1)
    if len(values) not in (1, len(like)) or not (values >= 0).all():
        raise RestoreError(f"{name} must be a number >= 0, or one for each of the {len(like)} images, got {value!r}")
    return values


def require_count(values: torch.Tensor, name: str, images: torch.Tensor) -> None:
    """Raise RestoreError unless there is one entry of `values` for all `images`, or one for each."""
    if len(values) not in (1, len(images)):
        raise RestoreError(f"{name} must be one, or one for each of the {len(images)} images, got {len(values)}")


def require_size(value, name: str = "image_size") -> tuple[int, int]:
    """Return (height, width) from an integer (square) or a pair. Raises RestoreError otherwise."""
    if isinstance(value, numbers.Integral):
        value = (value, value)
    try:
        height, width = value
    except (TypeError, ValueError):
        raise RestoreError(f"{name} must be an integer or (height, width), got {value!r}") from None
    return require_integer(height, f"{name}: height"), require_integer(width, f"{name}: width")


def require_images(x, name: str = "x", channels: int | None = None) -> None:
    """Raise RestoreError unless x is a floating (B, C, H, W) tensor, with C == channels if given."""
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or not x.is_floating_point():
        kind = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise RestoreError(f"{name} must be a floating-point tensor (B, C, H, W), got {kind}")
    if channels is not None and x.shape[1] != channels:
        raise RestoreError(f"{name} must have {channels} channels, got {x.shape[1]}")


def require_tensor(value, name: str) -> torch.Tensor:
    """Return a tensor, array or nested list as a tensor on the CPU. Raises RestoreError for anything else."""
    try:
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError, RuntimeError):
        raise RestoreError(f"{name} must be a tensor or array, got {type(value).__name__}") from None
    return tensor.detach().cpu()


def select_images(values: torch.Tensor, rows, what: str) -> torch.Tensor:
    """Return values[rows] along the batch; rows: a list, tensor or slice of indices 0 ... B - 1, or a single one.
    Raises RestoreError if they do not exist."""
    try:
        index = np.arange(len(values))[rows.cpu().numpy() if isinstance(rows, torch.Tensor) else rows]
        return values[torch.from_numpy(index.reshape(-1))]
    except (IndexError, TypeError, ValueError, RuntimeError):
        raise RestoreError(f"rows must be indices of the {len(values)} {what}, got {rows!r}") from None


def make_random_state(seed) -> np.random.RandomState:
    """Return numpy's generator whose stream never changes between versions; seed: any integer >= 0, also 64-bit."""
    seed = require_integer(seed, "seed", minimum=0)
    words = [(seed >> shift) & 0xFFFFFFFF for shift in range(0, seed.bit_length(), 32)]
    return np.random.RandomState(seed if len(words) < 2 else words)
