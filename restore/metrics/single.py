"""Metrics of one image, and of the samples drawn for it. Metrics of a set of images are in sets.py."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from operators import RestoreError
from operators.naming import check_known
from restore.images.io import to_uint8
from restore.metrics.weights import find_weights, read_state

SSIM_DEFINITION = "Wang et al. 2004: Gaussian window 11x11, sigma 1.5, K1 0.01, K2 0.03, mean over channels, 8 bit"
PSNR_DEFINITION = "10 log10(255^2 / MSE) over all channels, 8 bit"
SPREAD_DEFINITION = "standard deviation over the samples, per value on [-1, 1], averaged over the image"
COVERAGE_DEFINITION = "share of values where the truth lies between the smallest and the largest sample"


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise RestoreError(
            f"metrics compare two uint8 images of one shape, but got {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        )
    return a.astype(np.float64), b.astype(np.float64)


def psnr_pixels(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays of one shape, in dB; infinite when they are equal."""
    image, truth = _pair(image, truth)
    mse = float(np.mean((image - truth) ** 2))
    return math.inf if mse == 0 else 10 * math.log10(255.0**2 / mse)


def ssim_pixels(image: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of two uint8 (H, W, 3) arrays, in [-1, 1]; Wang et al. 2004, eq. 13.

    Raises RestoreError for images smaller than the 11-pixel window.
    """
    x, y = _pair(image, truth)
    if min(x.shape[:2]) < 11:
        raise RestoreError(f"SSIM needs at least 11 x 11 pixels, but the image is {x.shape[0]} x {x.shape[1]}")

    def mean(v: np.ndarray) -> np.ndarray:
        return gaussian_filter(v, sigma=(1.5, 1.5, 0), truncate=3.5, mode="reflect")

    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2, mean(x * y) - mu_x * mu_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    # Only where the window lies inside the image.
    return float(similarity[5:-5, 5:-5].mean(dtype=np.float64))


def psnr(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """PSNR in dB per image, (B,) float64, of (B, 3, H, W) in [-1, 1] after rounding both to 8 bits."""
    return _per_image(psnr_pixels, image, truth)


def ssim(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """SSIM per image, (B,) float64, of (B, 3, H, W) in [-1, 1] after rounding both to 8 bits."""
    return _per_image(ssim_pixels, image, truth)


def _per_image(metric: Callable, image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    values = [metric(a, b) for a, b in zip(to_uint8(image), to_uint8(truth), strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def spread(samples: torch.Tensor) -> torch.Tensor:
    """(B, K, 3, H, W) samples to (B,): see SPREAD_DEFINITION. NaN for K = 1, where it is unknown."""
    if samples.shape[1] < 2:
        return torch.full((samples.shape[0],), math.nan)
    return samples.float().std(dim=1).mean(dim=(1, 2, 3)).cpu()


def coverage(samples: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """(B, K, 3, H, W) samples and (B, 3, H, W) truth to (B,): see COVERAGE_DEFINITION.

    For exact posterior samples the truth is exchangeable with them, so the expected value is (K - 1) / (K + 1):
    below it the samples are overconfident or biased. NaN for K = 1.
    """
    if samples.shape[1] < 2:
        return torch.full((samples.shape[0],), math.nan)
    inside = (samples.amin(dim=1) <= truth) & (truth <= samples.amax(dim=1))
    return inside.float().mean(dim=(1, 2, 3)).cpu()


LPIPS_NETS = {"alex": "alexnet", "vgg": "vgg16"}  # and their names among the weights


class LPIPS:
    """Learned perceptual distance (Zhang et al. 2018) by the `lpips` package, version 0.1, linear heads included.

    net: "alex" or "vgg". weights: see `weights.find_weights`; the backbone file is checked on construction and
    nothing is ever downloaded or left at random values. enlarge: images are brought to this many times their size
    first, by bicubic interpolation.
    """

    def __init__(
        self,
        net: str = "alex",
        weights: Mapping[str, str | os.PathLike] | None = None,
        device: str = "cpu",
        enlarge: int = 1,
    ) -> None:
        if enlarge < 1:
            raise RestoreError(f"lpips_enlarge={enlarge} must be a whole number of 1 or more")
        check_known([net], LPIPS_NETS, "LPIPS has no net")
        path = find_weights(LPIPS_NETS[net], weights)
        import lpips

        with warnings.catch_warnings():
            # torchvision's deprecation of the argument that lpips passes; nothing the user can act on.
            warnings.simplefilter("ignore", UserWarning)
            self.model = lpips.LPIPS(net=net, version="0.1", pnet_rand=True, verbose=False)
        # lpips slices torchvision's `features`, keeping each layer's index as the last part of its name.
        state = read_state(path)
        try:
            trunk = {key: state["features." + key.split(".", 1)[1]] for key in self.model.net.state_dict()}
        except KeyError as error:
            raise RestoreError(f"{path} holds no complete {LPIPS_NETS[net]}: {error} is not in it") from error
        self.model.net.load_state_dict(trunk, strict=True)
        self.model.requires_grad_(False).eval().to(device)
        self.net, self.device, self.enlarge = net, device, enlarge

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) pairs in [-1, 1], rounded to 8 bits, to (B,) distances float64; 0 for equal images."""
        pair = [torch.from_numpy(to_uint8(v)).permute(0, 3, 1, 2).float() / 127.5 - 1 for v in (image, truth)]
        if self.enlarge > 1:
            pair = [F.interpolate(v, scale_factor=self.enlarge, mode="bicubic").clamp(-1, 1) for v in pair]
        try:
            return self.model(*(v.to(self.device) for v in pair)).flatten().double().cpu()
        except RuntimeError as error:
            if "too small" in str(error):
                size = " x ".join(map(str, image.shape[-2:]))
                raise RestoreError(f"LPIPS ({self.net}) cannot be computed on images of {size}") from error
            raise

    def pairwise(self, images: torch.Tensor) -> float:
        """Mean distance over all pairs of (N, 3, H, W): the diversity of PAG's Table 3 (100 images give 4950)."""
        if len(images) < 2:
            raise RestoreError("the diversity of a set needs at least two images")
        first, second = torch.triu_indices(len(images), len(images), offset=1).split(1)
        pairs = zip(first[0].split(16), second[0].split(16), strict=True)
        return float(torch.cat([self(images[i], images[j]) for i, j in pairs]).mean())
