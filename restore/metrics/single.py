"""Metrics of one image, and of the samples drawn for it. Metrics of a set of images are in sets.py."""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F

from operators import RestoreError
from operators.naming import check_known
from restore.backbones.weights import read_weights
from restore.images.io import to_uint8
from restore.metrics.weights import WeightFiles, find_weights

PSNR_DEFINITION = "10 log10(255^2 / MSE) over all channels, 8 bit"
SSIM_DEFINITION = "Wang et al. 2004: Gaussian window 11x11, sigma 1.5, K1 0.01, K2 0.03, mean over channels, 8 bit"
SPREAD_DEFINITION = "standard deviation over the samples, per value on [-1, 1], averaged over the image"
COVERAGE_DEFINITION = "share of values where the truth lies between the smallest and the largest sample"
LPIPS_NETS = {"alex": "alexnet", "vgg": "vgg16"}  # names of the networks in weights.WEIGHTS


def round_to_8_bits(*images: torch.Tensor) -> list[torch.Tensor]:
    """Batches (B, 3, H, W) in [-1, 1] as float64 on 0..255. Raises RestoreError if their shapes differ."""
    if len({tuple(image.shape) for image in images}) > 1:
        raise RestoreError(f"image and truth must have one shape, got {[tuple(image.shape) for image in images]}")
    return [torch.from_numpy(to_uint8(image)).movedim(-1, -3).double() for image in images]


def psnr(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return the PSNR in dB per image, (B,) float64, of (B, 3, H, W) in [-1, 1] rounded to 8 bits; inf if equal."""
    x, y = round_to_8_bits(image, truth)
    errors = (x - y).square().mean(dim=(1, 2, 3)).tolist()
    return torch.tensor([10 * math.log10(255.0**2 / mse) if mse else math.inf for mse in errors], dtype=torch.float64)


def ssim(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return the structural similarity per image, (B,) float64, of (B, 3, H, W) in [-1, 1] rounded to 8 bits.

    Wang et al. 2004, eq. 13, averaged where the 11-pixel window lies inside the image. Raises RestoreError if the
    image is smaller than the window.
    """
    x, y = round_to_8_bits(image, truth)
    if min(x.shape[-2:]) < 11:
        raise RestoreError(f"SSIM needs images of at least 11 x 11 pixels, got {x.shape[-2]} x {x.shape[-1]}")
    import kornia  # takes half a second, which a restoration should not wait for

    return kornia.metrics.ssim(x, y, window_size=11, max_val=255.0, padding="valid").mean(dim=(1, 2, 3))


def spread(samples: torch.Tensor) -> torch.Tensor:
    """Return SPREAD_DEFINITION per image, (B,), of samples (B, K, 3, H, W); NaN if K = 1."""
    if samples.shape[1] < 2:
        return torch.full((samples.shape[0],), math.nan, dtype=torch.float32)
    return samples.float().std(dim=1).mean(dim=(1, 2, 3)).cpu()


def coverage(samples: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return COVERAGE_DEFINITION per image, (B,), of samples (B, K, 3, H, W) and truth (B, 3, H, W); NaN if K = 1.

    For exact posterior samples the truth is exchangeable with them, so the expected value is (K - 1) / (K + 1):
    below it the samples are overconfident or biased.
    """
    if samples.shape[1] < 2:
        return torch.full((samples.shape[0],), math.nan, dtype=torch.float32)
    inside = (samples.amin(dim=1) <= truth) & (truth <= samples.amax(dim=1))
    return inside.float().mean(dim=(1, 2, 3)).cpu()


class LPIPS:
    """Learned perceptual distance (Zhang et al. 2018) by the `lpips` package, version 0.1, linear heads included.

    net: "alex" or "vgg". weights: see `weights.find_weights`; nothing is downloaded. enlarge: factor by which images
    are enlarged first (bicubic). Raises RestoreError for missing or damaged weights.
    """

    def __init__(
        self, net: str = "alex", weights: WeightFiles | None = None, device: str = "cpu", enlarge: int = 1
    ) -> None:
        if enlarge < 1:
            raise RestoreError(f"lpips_enlarge must be a whole number of 1 or more, got lpips_enlarge={enlarge}")
        check_known([net], LPIPS_NETS, "LPIPS has no net")
        path = find_weights(LPIPS_NETS[net], weights)
        import lpips

        with warnings.catch_warnings():
            # torchvision's deprecation of the argument that lpips passes; nothing the user can act on.
            warnings.simplefilter("ignore", UserWarning)
            self.model = lpips.LPIPS(net=net, version="0.1", pnet_rand=True, verbose=False)
        # lpips slices torchvision's `features`, keeping each layer's index as the last part of its name.
        state = read_weights(path)
        try:
            trunk = {key: state["features." + key.split(".", 1)[1]] for key in self.model.net.state_dict()}
        except KeyError as error:
            raise RestoreError(f"{path} must hold a complete {LPIPS_NETS[net]}, but {error} is missing") from error
        self.model.net.load_state_dict(trunk, strict=True)
        self.model.requires_grad_(False).eval().to(device)
        self.net, self.device, self.enlarge = net, device, enlarge

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Return the distances, (B,) float64, of (B, 3, H, W) pairs in [-1, 1] rounded to 8 bits; 0 if equal."""
        pair = [v.float() / 127.5 - 1 for v in round_to_8_bits(image, truth)]
        if self.enlarge > 1:
            pair = [F.interpolate(v, scale_factor=self.enlarge, mode="bicubic").clamp(-1, 1) for v in pair]
        try:
            return self.model(*(v.to(self.device) for v in pair)).flatten().double().cpu()
        except RuntimeError as error:
            if "too small" in str(error):
                size = " x ".join(map(str, image.shape[-2:]))
                raise RestoreError(f"LPIPS ({self.net}) cannot be computed on images of {size} pixels") from error
            raise

    def mean_pairwise(self, images: torch.Tensor) -> float:
        """Return the mean distance over all pairs of (N, 3, H, W): the diversity of PAG's Table 3."""
        if len(images) < 2:
            raise RestoreError("the diversity of a set needs at least two images")
        first, second = torch.triu_indices(len(images), len(images), offset=1).split(1)
        pairs = zip(first[0].split(16), second[0].split(16), strict=True)
        return float(torch.cat([self(images[i], images[j]) for i, j in pairs]).mean())
