"""The power spectrum of a photo, from which motion and missing detail are seen."""

from __future__ import annotations

import math

import numpy as np
import scipy.fft
import torch

BLOCK = 128  # pixels; side of the pieces whose spectra are averaged
LARGEST = 1024  # pixels a side; of larger photos the centre is examined
FINEST = (0.36, 0.44)  # cycles per pixel of the finest detail


def read_grey(x: torch.Tensor) -> np.ndarray:
    """Return the mean of the channels of a photo (1, 3, H, W), on a scale of 255 levels; of a large one the centre."""
    grey = x[0].double().mean(0).numpy() * 127.5
    top, left = (max(0, (side - LARGEST) // 2) for side in grey.shape)
    return grey[top : top + LARGEST, left : left + LARGEST]


def noise_power(sigma: float) -> float:
    """Return the power, on that scale, of noise of `sigma` in three channels and of rounding to 8 bits."""
    return (127.5 * sigma) ** 2 / 3 + 1 / 12


def average_spectra(grey: np.ndarray) -> np.ndarray:
    """Return the power (n, n), zero frequency in the middle, of pieces whose spectrum was made flat by a factor |f|."""
    frequencies = (scipy.fft.fftfreq(grey.shape[0])[:, None], scipy.fft.rfftfreq(grey.shape[1])[None])
    flat = scipy.fft.irfft2(scipy.fft.rfft2(grey) * np.hypot(*frequencies), grey.shape)
    block = min(BLOCK, *grey.shape)
    window = np.outer(*2 * [np.hanning(block + 2)[1:-1]])
    window /= math.sqrt((window**2).sum())
    tops, lefts = (range(0, side - block + 1, block // 2) for side in grey.shape)
    pieces = np.stack([flat[i : i + block, j : j + block] for i in tops for j in lefts])
    return scipy.fft.fftshift((np.abs(scipy.fft.fft2(pieces * window)) ** 2).mean(0))


def measure_detail(x: torch.Tensor, sigma: float) -> float:
    """Return the power of a photo's finest detail, (1, 3, H, W), over that of its noise: near 1 if noise hides it,
    below 1 if there is none, as in a blurred photo with the grain blurred away before it was rounded."""
    power = average_spectra(read_grey(x))
    frequencies = (np.arange(len(power)) - len(power) // 2) / len(power)
    radius = np.hypot(frequencies[:, None], frequencies)
    ring = (radius >= FINEST[0]) & (radius <= FINEST[1])
    return float((power[ring] / radius[ring] ** 2).mean() / noise_power(sigma))
