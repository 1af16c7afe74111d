"""Straight motion blur: how far and in which direction the camera moved, from the spectrum of a photo."""

from __future__ import annotations

import math
from collections.abc import Callable
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
APART, TRIED = 6, 3  # steps of angle between candidates of one length; candidates that are refined
STEPS = ((1.0, 4.0), (0.5, 2.0), (0.25, 1.0))  # of the refinement: pixels, degrees
LAST = ((0.25, 1.0), (0.1, 0.5))  # of that with the kernel itself
SECTORS = 12  # directions whose power is free
RING = (0.03, 0.46)  # cycles per pixel of the frequencies that are compared
FALL = (2.2, 0.3)  # exponent of the power of photos, mean and deviation
OWN = 0.2  # variance of a sharp photo's own blur
BLURS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)  # deviations of Gaussians that a motion must explain better than
GAIN = 60  # nats of one piece, of a motion that is believed
LONGEST = 0.2  # of a block's side, times the root of their number: parallel lines look like longer motions
HIGHEST = 6  # times the expected power; what is higher is a line, of an edge


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

    The spectrum of a motion over L pixels in the direction e is sinc(L f . e). Candidates are those whose zeros
    correlate best with the logarithm of the power, what depends on the distance or the direction alone removed
    (Gennery 1973); the most likely one is refined to a quarter of a pixel and a degree. It is believed if the photo's
    spectrum is likelier by GAIN than with any Gaussian blur, and refined once more with the spectrum of its kernel,
    whose pixels soften it a little. Motions below 5 pixels, above 40 and curved ones are not seen.
    """
    if min(x.shape[-2:]) < SMALLEST:
        return None
    grey = read_grey(x)
    likelihood = _Likelihood(grey, sigma)
    candidates = _find_candidates(average_spectra(grey), noise_power(sigma))
    likely = sorted(candidates, key=likelihood.measure_motion)[:TRIED]
    measure = likelihood.measure_motion
    best = min((_refine(motion, measure, STEPS) for motion in {candidates[0], *likely}), key=measure)
    other = min(likelihood.measure_blur(std) for std in BLURS)
    blocks = max(1.0, math.sqrt(math.prod(side // BLOCK for side in grey.shape)))
    longest = min(float(LENGTHS[-1]), LONGEST * blocks * min(BLOCK, *grey.shape))
    believed = LENGTHS[0] <= best.length <= longest and other - likelihood.measure_motion(best) > GAIN
    return _refine(best, likelihood.measure_kernel, LAST) if believed else None


def _refine(motion: Motion, measure: Callable[[Motion], float], steps: tuple[tuple[float, float], ...]) -> Motion:
    """Return the motion near by that is least unlikely by `measure`."""
    best = measure(motion)
    for longer, turned in steps:
        for _ in range(6):
            near = [
                Motion(motion.length + length, (motion.angle + angle) % 180)
                for length, angle in ((longer, 0), (-longer, 0), (0, turned), (0, -turned))
            ]
            found, candidate = min((measure(each), k) for k, each in enumerate(near))
            if found >= best:
                break
            best, motion = found, near[candidate]
    return motion


class _Likelihood:
    """How unlikely the spectrum of a photo is for a blur: the negative logarithm of Whittle's likelihood (1953).

    The power of the photo before its blur is A(direction) |f|^-a, with A and a fitted by Fisher scoring; windowing a
    piece averages the power of neighbouring frequencies, noise is added.
    """

    def __init__(self, grey: np.ndarray, sigma: float) -> None:
        side = min(BLOCK, *grey.shape)
        window = np.outer(*2 * [np.hanning(side + 2)[1:-1]])
        tops, lefts = (range(0, length - side + 1, side // 2) for length in grey.shape)
        pieces = np.stack([grey[top : top + side, left : left + side] for top in tops for left in lefts])
        pieces = pieces - (pieces * window).sum((1, 2), keepdims=True) / window.sum()
        power = (np.abs(scipy.fft.fft2(pieces * (window / math.sqrt((window**2).sum())))) ** 2).mean(0)
        smear = np.abs(scipy.fft.fft2(window)) ** 2
        self.smear = scipy.fft.rfft2(smear / smear.sum())
        self.v, self.u = scipy.fft.fftfreq(side)[:, None], scipy.fft.fftfreq(side)
        radius = np.hypot(self.v, self.u)
        half = (self.v > 0) | ((self.v == 0) & (self.u > 0))
        self.used = half & (radius > RING[0]) & (radius < RING[1])
        self.square, self.power = radius**2, power[self.used]
        self.noise = max((127.5 * sigma) ** 2, 1 / 12) / 3
        angle = ((np.arctan2(self.v, self.u) % np.pi) / np.pi * SECTORS)[self.used]
        rows, sector, share = np.arange(len(angle)), np.floor(angle).astype(int), angle % 1
        self.design = np.zeros((len(angle), SECTORS + 1))
        self.design[rows, sector % SECTORS] += 1 - share
        self.design[rows, (sector + 1) % SECTORS] += share
        self.design[:, -1] = -np.log(radius[self.used])
        self.known = np.diag([0.02] * SECTORS + [1 / FALL[1] ** 2])
        self.mean = np.array([0.0] * SECTORS + [FALL[0]])
        # A first fit to the logarithms, of the rings that exceed the noise.
        ring = (64 * radius[self.used]).astype(int)
        average = np.bincount(ring, self.power) / np.maximum(np.bincount(ring), 1)
        weighted = self.design * np.clip(average / self.noise - 1, 0.02, 1)[ring][:, None]
        self.solution = np.linalg.solve(weighted.T @ self.design + self.known, weighted.T)
        self.log = np.log(self.power + 1e-9) + 0.4

    def measure_motion(self, motion: Motion) -> float:
        angle = math.radians(motion.angle)
        along = motion.length * (self.u * math.cos(angle) + self.v * math.sin(angle))
        return self._measure(np.sinc(along) ** 2 * np.exp(-4 * np.pi**2 * OWN * self.square), rounds=6)

    def measure_kernel(self, motion: Motion) -> float:
        transfer = np.abs(scipy.fft.fft2(motion.kernel().numpy(), self.square.shape)) ** 2
        return self._measure(transfer * np.exp(-4 * np.pi**2 * OWN * self.square), rounds=6)

    def measure_blur(self, std: float) -> float:
        return self._measure(np.exp(-4 * np.pi**2 * (std**2 + OWN) * self.square), rounds=12)

    def _measure(self, transfer: np.ndarray, rounds: int) -> float:
        """transfer: (n, n), by which a blur multiplies the power."""
        seen = scipy.fft.irfft2(scipy.fft.rfft2(transfer) * self.smear, transfer.shape)[self.used]
        seen = np.maximum(seen, 1e-12)
        fitted = self.mean + self.solution @ (self.log - np.log(seen + DEPTH) - self.design @ self.mean)
        for _ in range(rounds):
            signal = np.exp(np.clip(self.design @ fitted, -30, 40)) * seen
            total = signal + self.noise
            share, excess = signal / total, np.minimum(self.power / total, HIGHEST) - 1
            slope = self.design.T @ (share * excess) - self.known @ (fitted - self.mean)
            curvature = (self.design * share[:, None] ** 2).T @ self.design + self.known
            fitted = fitted + np.clip(np.linalg.solve(curvature, slope), -1.5, 1.5)
        total = np.exp(np.clip(self.design @ fitted, -30, 40)) * seen + self.noise
        unlikely = np.log(total) + np.minimum(self.power / total, HIGHEST)
        return float(unlikely.sum()) + 0.5 * ((fitted[-1] - FALL[0]) / FALL[1]) ** 2


def _find_candidates(power: np.ndarray, noise: float) -> list[Motion]:
    """Return two motions of every length, those whose zeros correlate best with the spectrum first."""
    u, v = RADII[:, None] * np.cos(ANGLES), RADII[:, None] * np.sin(ANGLES)
    at = len(power) // 2 + len(power) * np.stack([v, u])
    floor = np.log(noise * RADII**2)
    log = np.log(scipy.ndimage.map_coordinates(scipy.ndimage.gaussian_filter(power, 0.7), at, order=1) + 1e-9)
    highest = np.maximum(np.quantile(log, 0.9, axis=1), floor)  # directions that are not blurred
    weight = (np.clip(highest - floor - 0.7, 0, 2) / 2)[:, None]
    share = np.exp(floor - highest)[:, None]

    def centre(values: np.ndarray) -> np.ndarray:
        """Remove what depends on the radius alone and on the angle alone."""
        values = values - values.mean(1, keepdims=True)
        return values - (weight * values).sum(0) / max(float(weight.sum()), 1e-9)

    observed = scipy.fft.fft(weight * centre(np.maximum(log, floor[:, None])), axis=1)
    found = []
    for length in LENGTHS:
        model = centre(np.log(np.maximum(np.sinc(length * u) ** 2, DEPTH) * (1 - share) + share))
        products = scipy.fft.ifft(observed * scipy.fft.fft(model, axis=1).conj(), axis=1).real.sum(0)
        products /= math.sqrt(float((weight * model**2).sum()) + 1e-9)
        for _ in range(2):  # of the model turned by every angle
            best = int(np.argmax(products))
            found.append((products[best], float(length), math.degrees(ANGLES[best])))
            products[np.arange(best - APART, best + APART + 1) % len(ANGLES)] = -np.inf
    return [Motion(length, angle) for _, length, angle in sorted(found, reverse=True)]
