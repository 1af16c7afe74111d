"""Quantisation tables of JPEG: those of libjpeg for a quality, and those that a file has."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from operators import validate
from operators.errors import RestoreError

SIDE = 8  # pixels of a block

# ITU-T T.81, Annex K.1.
_BRIGHTNESS = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)
_COLOUR = (
    *(17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66),
    *([99] * 38),
)


def standard_tables(quality: int) -> list[torch.Tensor]:
    """Return libjpeg's steps (8, 8) of brightness and colour for a quality of 1 to 100."""
    quality = validate.require_integer(quality, "quality", 1, 100)
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return as_tables([[min(max((n * scale + 50) // 100, 1), 255) for n in table] for table in (_BRIGHTNESS, _COLOUR)])


def as_tables(tables: Sequence) -> list[torch.Tensor]:
    """Return one or two tables of 64 positive steps as float64 (8, 8), the second that of colour."""
    values = [torch.as_tensor(table, dtype=torch.float64).flatten() for table in tables]
    if not 1 <= len(values) <= 4 or any(len(t) != 64 or not (t >= 1).all() for t in values):
        raise RestoreError(f"tables must be one or two of 64 steps of at least 1, got {[len(t) for t in values]}")
    return [values[0].view(SIDE, SIDE), values[min(1, len(values) - 1)].view(SIDE, SIDE)]
