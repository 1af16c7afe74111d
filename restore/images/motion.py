"""Straight motion blur: how far and in which direction the camera moved, from the spectrum of a photo."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.ndimage
import torch

from operators.kernels import rasterise
from restore.images.spectrum import BLOCK, average_spectra, noise_power, read_grey

SMALLEST = 64  # pixels a side
RADII = np.linspace(0.04, 0.44, 48)  # cycles per pixel
ANGLES = np.pi * np.arange(72) / 72
LENGTHS = np.arange(5, 41)  # pixels
DEPTH = 0.02  # of a zero of the blur's spectrum, which the window fills
# Of 23 photos, sharp or blurred by Gaussians, noisy or not, none passes all; see `_Fit`. The spectrum of a photo of few
# BLOCKs is no mean, and a line in it looks like a long motion: the second numbers are added, over the square root of
# the number of blocks, and a motion may have LONGEST times that root of a block's side.
EVIDENCE, RIPPLE, HIGHEST = (0.56, -0.06), (0.36, 0.06), (0.15, 0.07)
SLOPES, PERIODS, LONGEST = (0.5, 1.6), 1.8, 1 / 9
# Zeros lie nearer together in a spectrum that a window smears: lengths of 7, 9, 12, 15, 21 of four photos were found as
# 7.0, 8.75, 11.5, 14.0, 19.0.
STRETCH, UNSTRETCHED = 0.15, 7


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
    grey = read_grey(x)
    fit = _Fit(average_spectra(grey), noise_power(sigma))
    blocks = max(1.0, math.sqrt(math.prod(side // BLOCK for side in grey.shape)))
    return fit.refine() if fit.convinces(sigma, min(BLOCK, *grey.shape), blocks) else None


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

    def convinces(self, sigma: float, side: int, blocks: float) -> bool:
        """Whether it is a motion: evidence, the correlation with the model; ripple, what its zeros add to a mere fall
        of the same width; the slope, 1 for a true model; and zeros that are seen above the noise. side: of a block;
        blocks: the square root of their number."""
        evidence, ripple, least = (a + b / blocks for a, b in (EVIDENCE, RIPPLE, HIGHEST))
        if self.evidence < evidence + 1.2 * sigma or not SLOPES[0] < self.slope < SLOPES[1]:
            return False
        highest = RADII[self.weight[:, 0] > 0.15].max(initial=0)
        seen = highest > least and highest * self.motion.length > PERIODS
        return seen and self.motion.length <= LONGEST * side * blocks and self._measure_ripple() > ripple

    def refine(self) -> Motion:
        """Return the motion to a quarter of a pixel and a degree."""
        found = []
        for length in self.motion.length + np.arange(-1, 1.01, 0.25):
            for degrees in self.motion.angle + np.arange(-3, 3.1, 1):
                angle = math.radians(degrees)
                model = self._predict(np.sinc(length * (self.u * math.cos(angle) + self.v * math.sin(angle))) ** 2)
                evidence = self._multiply(model, self.observed) / math.sqrt(self._multiply(model, model) + 1e-9)
                found.append((evidence, float(length), float(degrees % 180)))
        _, length, degrees = max(found)
        return Motion(round(length + STRETCH * max(0.0, length - UNSTRETCHED), 2), degrees)

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
