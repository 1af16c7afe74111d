"""Blurs: cross-correlation with a kernel, image reflected at its border (as DPS)."""

from __future__ import annotations

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F

from operators import kernels, separable
from operators.base import Operator
from operators.errors import RestoreError

SEPARABLE_LIMIT = 384  # pixels; beyond it two dense matrices cost more than the FFT


class Blur(Operator):
    """y = x cross-correlated with a kernel: (B, C, H, W) -> (B, C, H, W), the same for every channel.

    kernel: (kh, kw) tensor or array that sums to one, anchored at pixel (kh // 2, kw // 2) and not
        flipped. Negative entries are allowed. normalize=True divides it by its sum first.
    adjoint="reference": the identity, `transpose` of the DPS and PSLD repositories.

    The border is reflected about the edge pixels' centres, therefore the kernel's radius must be
    smaller than both sides of the image; the kernel itself may be up to twice as large as the image.
    Computed by FFT at a cost independent of the kernel's size (in float32 for half precision).

    Raises RestoreError for a kernel that is not 2-D, holds NaN or does not sum to one, and for images
    not larger than the kernel's radius.
    """

    name = "blur"
    derived = ("radius",)

    def __init__(self, kernel, *, normalize: bool = False, noise=None, image_size=None, adjoint: str = "exact"):
        super().__init__(noise=noise, image_size=image_size, adjoint=adjoint)
        self.kernel = as_kernel(kernel, normalize)
        self.radius = (self.kernel.shape[0] // 2, self.kernel.shape[1] // 2)
        if self.image_size is not None:
            self._check_radius(*self.image_size)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self._check_image(x)
        self._check_radius(*x.shape[2:])
        (height, width), (ry, rx) = x.shape[2:], self.radius
        like = separable.like(x)
        size, spectrum = self._spectrum(height, width, like)
        padded = F.pad(x.to(like.dtype), (rx, rx, ry, ry), mode="reflect")
        y = torch.fft.irfft2(torch.fft.rfft2(padded, s=size) * spectrum.conj(), s=size)
        return y[..., :height, :width].to(x.dtype)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        self._check_image(y)
        if self.adjoint == "reference":
            return y
        self._check_radius(*y.shape[2:])
        (height, width), (ry, rx) = y.shape[2:], self.radius
        like = separable.like(y)
        size, spectrum = self._spectrum(height, width, like)
        z = torch.fft.irfft2(torch.fft.rfft2(y.to(like.dtype), s=size) * spectrum, s=size)
        z = z[..., : height + 2 * ry, : width + 2 * rx]
        return fold_reflection(fold_reflection(z, ry).mT, rx).mT.to(y.dtype)

    def _spectrum(self, height: int, width: int, like: torch.Tensor) -> tuple[tuple[int, int], torch.Tensor]:
        """FFT size for the padded image, and the kernel's spectrum at that size."""
        ry, rx = self.radius
        size = (scipy.fft.next_fast_len(height + 2 * ry, True), scipy.fft.next_fast_len(width + 2 * rx, True))

        def make():
            return torch.view_as_real(torch.fft.rfft2(self.kernel, s=size))

        return size, torch.view_as_complex(self._buffer(("spectrum", size), make, like))

    def _check_radius(self, height: int, width: int) -> None:
        if self.radius[0] >= height or self.radius[1] >= width:
            kh, kw = self.kernel.shape
            raise RestoreError(
                f"the blur kernel ({kh} x {kw}, radius {max(self.radius)}) is too large for an image of "
                f"{height} x {width}: its radius must be smaller than both sides; use a smaller kernel_size."
            )


class GaussianBlur(Blur):
    """Blur by a Gaussian of `std` pixels on a kernel_size x kernel_size grid (DPS: 61, 3.0 at 256 pixels).

    Images of up to 384 pixels are blurred with one small matrix per axis, which is faster than the FFT.
    """

    name = "gaussian_blur"
    derived = ("radius", "profile", "kernel")

    def __init__(self, kernel_size: int = 61, std: float = 3.0, *, noise=None, image_size=None, adjoint="exact"):
        self.kernel_size, self.std = kernel_size, std
        self.profile = kernels.gaussian_profile(kernel_size, std)
        if kernel_size % 2 == 0:
            self.profile = np.append(self.profile, 0.0)
        kernel = np.outer(self.profile, self.profile)
        super().__init__(kernel, noise=noise, image_size=image_size, adjoint=adjoint)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self._check_image(x)
        self._check_radius(*x.shape[2:])
        if max(x.shape[2:]) > SEPARABLE_LIMIT:
            return super().A(x)
        return separable.apply(self._matrix(x.shape[2], x), self._matrix(x.shape[3], x), x)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        if self.adjoint == "reference" or y.ndim != 4 or max(y.shape[2:]) > SEPARABLE_LIMIT:
            return super().A_adjoint(y)
        self._check_image(y)
        self._check_radius(*y.shape[2:])
        return separable.apply(self._matrix(y.shape[2], y).mT, self._matrix(y.shape[3], y).mT, y)

    def _matrix(self, size: int, x: torch.Tensor) -> torch.Tensor:
        return self._buffer(("matrix", size), lambda: separable.filter_matrix(size, self.profile), separable.like(x))


class MotionBlur(Blur):
    """Blur by a random camera motion (`kernels.motion_kernel`; DPS: 61, 0.5 at 256 pixels)."""

    name = "motion_blur"
    derived = ("radius", "kernel")

    def __init__(
        self,
        kernel_size: int = 61,
        intensity: float = 0.5,
        seed: int = 0,
        *,
        noise=None,
        image_size=None,
        adjoint: str = "exact",
    ):
        self.kernel_size, self.intensity, self.seed = kernel_size, intensity, seed
        kernel = kernels.motion_kernel(kernel_size, intensity, seed)
        super().__init__(kernel, noise=noise, image_size=image_size, adjoint=adjoint)


def as_kernel(kernel, normalize: bool = False) -> torch.Tensor:
    """A checked float64 kernel with odd sides; an even one gets a zero row or column at its end.

    Raises RestoreError as described in `Blur`.
    """
    try:
        if not isinstance(kernel, torch.Tensor):
            kernel = torch.from_numpy(np.array(kernel, dtype=np.float64))
        kernel = kernel.detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise RestoreError(f"the blur kernel must be a 2-D tensor or array, got {type(kernel).__name__}.") from None
    while kernel.ndim > 2 and kernel.shape[0] == 1:
        kernel = kernel[0]
    if kernel.ndim != 2 or kernel.numel() == 0:
        raise RestoreError(f"the blur kernel must be 2-D and not empty, got shape {tuple(kernel.shape)}.")
    if not torch.isfinite(kernel).all():
        raise RestoreError("the blur kernel holds NaN or infinite values; expected finite weights that sum to one.")
    total = kernel.sum().item()
    if normalize and abs(total) > 1e-12:
        kernel = kernel / total
    elif abs(total - 1.0) > 1e-3:
        raise RestoreError(
            f"the blur kernel sums to {total:.6g}, but must sum to one; divide it by its sum or pass normalize=True."
        )
    return F.pad(kernel, (0, 1 - kernel.shape[1] % 2, 0, 1 - kernel.shape[0] % 2)).contiguous()


def fold_reflection(z: torch.Tensor, radius: int) -> torch.Tensor:
    """Transpose of reflection padding along dim -2: the mirrored margins are added back to the inside."""
    if radius == 0:
        return z
    height = z.shape[-2] - 2 * radius
    top, inside, bottom = z.split([radius, height, radius], dim=-2)
    far = height - 1 - radius
    return inside + F.pad(top.flip(-2), (0, 0, 1, far)) + F.pad(bottom.flip(-2), (0, 0, far, 1))
