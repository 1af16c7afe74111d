"""Straight motion blur: how far and in which direction the camera moved, from the spectrum of a photo."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.ndimage
import torch

from operators.kernels import rasterise

BLOCK = 128  # pixels; side of the pieces whose spectra are averaged
SMALLEST, LARGEST = 64, 1024  # pixels a side; of larger photos the centre is examined
RADII = np.linspace(0.04, 0.44, 48)  # cycles per pixel
ANGLES = np.pi * np.arange(72) / 72
LENGTHS = np.arange(5, 41)  # pixels
DEPTH = 0.02  # of a zero of the blur's spectrum, which the window fills
# Of 23 photos, sharp or blurred by Gaussians, noisy or not, none passes all; see `_Fit`.
EVIDENCE, RIPPLE, SLOPES, HIGHEST, PERIODS = 0.55, 0.36, (0.5, 3.0), 0.15, 1.8


@dataclass(frozen=True)
class Motion:
    """A camera's straight motion. length: pixels. angle: degrees from the x axis, y down, in [0, 180)."""

    length: float
    angle: float

    def kernel(self) -> torch.Tensor:
        """Return the blur kernel (k, k) float64 of sum one."""
        size = 2 * math.ceil(self.length / 2) + 3
        times = np.linspace(-0.5, 0.5, 2 + 8 * math.ceil(self.length)) * self.length
        angle = math.radians(self.angle)
        path = np.stack([times * math.sin(angle), times * math.cos(angle)], 1)
        return torch.from_numpy(rasterise(size // 2 - path, size))


def estimate_motion(x: torch.Tensor, sigma: float) -> Motion | None:
    """Return the straight motion that blurred a photo (1, 3, H, W) with noise of `sigma`; None if there is no evidence.

    The spectrum of a motion over L pixels in the direction e is sinc(L f . e). What depends only on the distance from
    the origin of the spectrum, as the fall of photos does, or only on the direction, as edges do, is removed from the
    logarithm of the power; the rest is compared with that of every length and angle (the zeros of the spectrum:
    Gennery 1973). Motions below 5 pixels, above 40 and curved ones are not seen.
    """
    if min(x.shape[-2:]) < SMALLEST:
        return None
    grey = x[0].double().mean(0).numpy() * 127.5
    top, left = (max(0, (side - LARGEST) // 2) for side in grey.shape)
    power = _average_spectra(grey[top : top + LARGEST, left : left + LARGEST])
    noise = (127.5 * sigma) ** 2 / 3 + 1 / 12  # of the mean of the channels; rounding
    fit = _Fit(power, noise)
    return fit.motion if fit.convinces(EVIDENCE + 1.2 * sigma) else None


def _average_spectra(grey: np.ndarray) -> np.ndarray:
    """Return the power (n, n), zero frequency in the middle, of pieces whose spectrum was made flat by a factor |f|."""
    frequencies = (scipy.fft.fftfreq(grey.shape[0])[:, None], scipy.fft.rfftfreq(grey.shape[1])[None])
    flat = scipy.fft.irfft2(scipy.fft.rfft2(grey) * np.hypot(*frequencies), grey.shape)
    block = min(BLOCK, *grey.shape)
    window = np.outer(*2 * [np.hanning(block + 2)[1:-1]])
    window /= math.sqrt((window**2).sum())
    tops, lefts = (range(0, side - block + 1, block // 2) for side in grey.shape)
    pieces = np.stack([flat[i : i + block, j : j + block] for i in tops for j in lefts])
    return scipy.fft.fftshift((np.abs(scipy.fft.fft2(pieces * window)) ** 2).mean(0))


class _Fit:
    """The motion that explains a spectrum best, and how well it does."""

    def __init__(self, power: np.ndarray, noise: float) -> None:
        self.u, self.v = RADII[:, None] * np.cos(ANGLES), RADII[:, None] * np.sin(ANGLES)
        at = len(power) // 2 + len(power) * np.stack([self.v, self.u])
        floor = np.log(noise * RADII**2)
        log = np.log(scipy.ndimage.map_coordinates(scipy.ndimage.gaussian_filter(power, 0.7), at, order=1) + 1e-9)
        highest = np.maximum(np.quantile(log, 0.9, axis=1), floor)  # directions that are not blurred
        self.weight = (np.clip(highest - floor - 0.7, 0, 2) / 2)[:, None]
        self.noise = np.exp(floor - highest)[:, None]
        self.observed = self._centre(np.maximum(log, floor[:, None]))
        scale = math.sqrt(self._multiply(self.observed, self.observed)) + 1e-9
        self.evidence = 0.0
        for length in LENGTHS:
            model = self._predict(np.sinc(length * self.u) ** 2)
            size = self._multiply(model, model) + 1e-9
            spectra = scipy.fft.fft(self.weight * self.observed, axis=1) * scipy.fft.fft(model, axis=1).conj()
            products = scipy.fft.ifft(spectra, axis=1).real.sum(0)  # of the model turned by every angle
            best = int(np.argmax(products))
            if (evidence := products[best] / (scale * math.sqrt(size))) > self.evidence:
                self.evidence, self.slope = evidence, products[best] / size
                self.motion = Motion(float(length), math.degrees(ANGLES[best]))

    def convinces(self, evidence: float) -> bool:
        """Whether it is a motion: evidence, the correlation with the model; ripple, what its zeros add to a mere fall
        of the same width; the slope, 1 for a true model; and zeros that are seen above the noise."""
        if self.evidence < evidence or not SLOPES[0] < self.slope < SLOPES[1]:
            return False
        highest = RADII[self.weight[:, 0] > 0.15].max(initial=0)
        return highest > HIGHEST and highest * self.motion.length > PERIODS and self._measure_ripple() > RIPPLE

    def _measure_ripple(self) -> float:
        angle = math.radians(self.motion.angle)
        along = self.motion.length * (self.u * math.cos(angle) + self.v * math.sin(angle))
        fall = self._predict(1 / (1 + 2 * (np.pi * along) ** 2))
        model, rest = (
            part - fall * self._multiply(part, fall) / (self._multiply(fall, fall) + 1e-9)
            for part in (self._predict(np.sinc(along) ** 2), self.observed)
        )
        scale = math.sqrt(self._multiply(model, model) * self._multiply(rest, rest)) + 1e-9
        return self._multiply(model, rest) / scale

    def _predict(self, spectrum: np.ndarray) -> np.ndarray:
        return self._centre(np.log(np.maximum(spectrum, DEPTH) * (1 - self.noise) + self.noise))

    def _multiply(self, a: np.ndarray, b: np.ndarray) -> float:
        return float((self.weight * a * b).sum())

    def _centre(self, values: np.ndarray) -> np.ndarray:
        """Remove what depends on the radius alone and on the angle alone."""
        values = values - values.mean(1, keepdims=True)
        return values - (self.weight * values).sum(0) / max(float(self.weight.sum()), 1e-9)
