"""Means over images, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

RESAMPLES = 2000
# Below this number of values the interval is Student's, which covers the mean of normal values in 95 % of cases (of
# gamma-distributed ones in 92 %); the bootstrap's does so in 50 % of cases for 2 values, 84 % for 5 and 90 % for 8.
FEW = 30


@dataclass(frozen=True)
class BootstrapMean:
    """The mean of `n` values and the bounds of its 95 % interval (NaN for one value)."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> BootstrapMean:
    """Return the mean of the values and its percentile bootstrap interval (Efron 1979), or Student's t interval of
    fewer than FEW values.

    Deterministic: the resamples depend on `seed` and the number of values only, so two methods measured on the
    same images are resampled alike. Infinite values (the PSNR of an exact result) make the interval infinite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        return BootstrapMean(float(array[0]) if array.size else math.nan, math.nan, math.nan, int(array.size))
    if not np.isfinite(array).all():
        return BootstrapMean(float(array.mean()), float(array.min()), float(array.max()), int(array.size))
    if array.size < FEW:
        half = t.ppf(0.975, array.size - 1) * array.std(ddof=1) / math.sqrt(array.size)
        return BootstrapMean(float(array.mean()), float(array.mean() - half), float(array.mean() + half), array.size)
    indices = np.random.default_rng(seed).integers(0, array.size, (RESAMPLES, array.size), dtype=np.int32)
    low, high = np.quantile(array[indices].mean(axis=1), [0.025, 0.975])
    return BootstrapMean(float(array.mean()), float(low), float(high), int(array.size))
