"""How soft a photo is: the Gaussian blur that explains how its spectrum falls."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.optimize
import scipy.special
import torch

from restore.images.spectrum import read_grey

BLOCK = 64  # pixels; side of the pieces whose spectra are averaged
SECTORS, RINGS, LOWEST = 8, 16, 0.05  # cells of the spectrum; cycles per pixel
FALL = (2.2, 0.3)  # exponent of the power of photos, mean and deviation
OWN = 0.45  # pixels; blur of a photo that is sharp, median of pieces of held-out photos
FLOOR = 0.5  # deviation of the logarithm of the noise's power
WIDENED = 0.00845  # 8 pi^2 times the variance, in squared cycles per pixel, of the window's power
SPREAD = 0.3  # weight of a direction's distance from the mean of all
STARTS = (0.3, 2.0, 6.0)  # variances
LARGEST = 60.0  # variance


@dataclass(frozen=True)
class Softness:
    """std: of a Gaussian blur in pixels, without the softness of any photo. evidence: by how much the spectrum of a
    sharp photo explains this one worse, in nats."""

    std: float
    evidence: float


def measure_softness(x: torch.Tensor, sigma: float) -> Softness:
    """Return how soft a photo (1, 3, H, W) with noise of `sigma` is.

    The power of a sharp photo falls as A(direction) |f|^-a with a near 2 (Field 1987); a blur multiplies it by
    exp(-4 pi^2 std^2 |f|^2), noise is added. The parameters are those that fit the logarithm of the mean power of
    windowed pieces best, in rings and sectors of the frequencies, with a's and the noise's known spread. The window
    widens that Gaussian, as a smaller blur would be, which is undone.
    """
    fit = _Fit(_average_spectra(read_grey(x)), max((127.5 * sigma) ** 2, 1 / 12) / 3)
    best = min((fit.solve(start) for start in STARTS), key=lambda found: found.cost)
    sharp = fit.solve(OWN**2, fixed=True)
    variance = best.x[0] / max(1 - WIDENED * best.x[0], 0.5)
    return Softness(math.sqrt(max(variance - OWN**2, 0.0)), float(sharp.cost - best.cost))


class _Fit:
    """The cells of a spectrum (n, n), zero frequency in the middle, and what is predicted for them."""

    def __init__(self, power: np.ndarray, noise: float) -> None:
        side = (np.arange(len(power)) - len(power) // 2) / len(power)
        radius, angle = np.hypot(side[:, None], side), np.arctan2(side[:, None], side) % np.pi
        ring = np.digitize(radius, np.geomspace(LOWEST, 0.5, RINGS + 1)) - 1
        sector = np.rint(angle / np.pi * SECTORS).astype(int) % SECTORS
        inside = (ring >= 0) & (ring < RINGS)
        cell = (ring * SECTORS + sector)[inside]
        count = np.bincount(cell, minlength=RINGS * SECTORS)
        used = count > 0
        self.log, self.distance, self.square = (
            np.bincount(cell, values[inside], minlength=len(count))[used] / count[used]
            for values in (np.log(power + 1e-12), np.log(radius + 1e-12), radius**2)
        )
        self.sector = np.flatnonzero(used) % SECTORS
        self.weight = np.sqrt(np.minimum(count[used], 30) / 30)
        self.noise = math.log(noise)

    def solve(self, variance: float, fixed: bool = False) -> scipy.optimize.OptimizeResult:
        """Return the best variance, exponent, logarithms of the noise and of every sector's power, and their cost."""
        near = self.log + FALL[0] * self.distance + 4 * np.pi**2 * variance * self.square
        near = [np.clip(near[(self.sector == k) & (self.square < 0.015)].mean(), -29, 59) for k in range(SECTORS)]
        start = np.array([variance, FALL[0], self.noise, *near])
        low, high = np.full_like(start, -30.0), np.full_like(start, 60.0)
        low[:3], high[:3] = (-0.5, 0.5, self.noise - 3), (LARGEST, 4.0, self.noise + 3)
        if fixed:
            low[0], high[0] = variance - 1e-6, variance + 1e-6
        bounds = {"bounds": (low, high), "loss": "soft_l1"}
        return scipy.optimize.least_squares(self._compare, start, self._differentiate, **bounds)

    def _predict(self, parameters: np.ndarray) -> np.ndarray:
        """The logarithm of the power of the blurred photo alone."""
        variance, exponent = parameters[:2]
        return parameters[3:][self.sector] - exponent * self.distance - 4 * np.pi**2 * variance * self.square

    def _compare(self, parameters: np.ndarray) -> np.ndarray:
        _, exponent, noise, *sectors = parameters
        difference = self.log - np.logaddexp(self._predict(parameters), noise)
        known = [(exponent - FALL[0]) / FALL[1], (noise - self.noise) / FLOOR]
        return np.concatenate([self.weight * difference, known, SPREAD * (sectors - np.mean(sectors))])

    def _differentiate(self, parameters: np.ndarray) -> np.ndarray:
        share = scipy.special.expit(self._predict(parameters) - parameters[2])  # of the photo in the power
        sectors = np.eye(SECTORS)[self.sector]
        columns = [-4 * np.pi**2 * self.square * share, -self.distance * share, 1 - share, *(sectors.T * share)]
        rows = np.zeros((len(self.log) + 2 + SECTORS, len(parameters)))
        rows[: len(self.log)] = -self.weight[:, None] * np.stack(columns, axis=1)
        rows[len(self.log), 1], rows[len(self.log) + 1, 2] = 1 / FALL[1], 1 / FLOOR
        rows[-SECTORS:, -SECTORS:] = SPREAD * (np.eye(SECTORS) - 1 / SECTORS)
        return rows


def _average_spectra(grey: np.ndarray) -> np.ndarray:
    """Return the mean power of pieces, each without its mean and windowed so that edges of the piece leak little."""
    side = min(BLOCK, *grey.shape)
    window = np.outer(*2 * [np.blackman(side + 2)[1:-1]])
    tops, lefts = (range(0, length - side + 1, side // 2) for length in grey.shape)
    pieces = np.stack([grey[top : top + side, left : left + side] for top in tops for left in lefts])
    pieces = pieces - (pieces * window).sum((1, 2), keepdims=True) / window.sum()
    spectra = scipy.fft.fft2(pieces * (window / math.sqrt((window**2).sum())))
    return scipy.fft.fftshift((np.abs(spectra) ** 2).mean(0))
