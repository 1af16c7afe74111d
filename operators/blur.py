"""Blurs: cross-correlation with a kernel; at its border the image is reflected (as DPS), circular or not known."""

from __future__ import annotations

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F

from operators import kernels, spectral, validate
from operators.base import Operator
from operators.errors import RestoreError
from operators.separable import Kronecker, compute_dtype, filter_matrix

SEPARABLE_LIMIT = 384  # pixels; up to it one small matrix per axis is faster than the FFT


class Blur(Operator):
    """y = x cross-correlated with a kernel: (B, C, H, W) -> (B, C, H, W), the same for every channel.

    kernel: (kh, kw) tensor or array that sums to one, or (B, kh, kw), one for each image; anchored at pixel
        (kh // 2, kw // 2) and not flipped. Negative entries are allowed. normalize=True divides it by its sum first.
    border: "reflect" about the edge pixels' centres (DPS); the kernel's radius must then be smaller than both
        sides of the image, and the kernel itself may be up to twice as large as the image. Or "circular"
        (DiffPIR): the image is continued periodically, and must not be smaller than the kernel. Or "unknown", as in
        every real photo: y is the inner part of a larger image, which extends beyond y by `margin` pixels (the radius
        of the kernel without its zeros) at each side: (B, C, H, W) -> (B, C, H - 2 rows, W - 2 columns).
    adjoint="reference": the identity, `transpose` of the DPS and PSLD repositories.

    Computed by FFT at a cost independent of the kernel's size (in float32 for half precision). Closed forms of
    `prox_l2`, `regularised_inverse` and `svd` exist for a circular border, and for one kernel that is a column
    times a row (a Gaussian, a box), unless the border is unknown.

    Raises RestoreError for a kernel that is not 2-D, holds NaN or does not sum to one, and for images too small for it.
    """

    name = "blur"
    has_reference = True
    derived = ("radius",)
    stationary = True

    def __init__(self, kernel, *, normalize=False, border="reflect", noise=None, image_size=None, adjoint="exact"):
        super().__init__(noise=noise, image_size=image_size, adjoint=adjoint)
        self.border = validate.require_choice(border, "border", ("reflect", "circular", "unknown"))
        self.kernel = as_kernel(kernel, normalize)
        self._given = tuple(validate.require_tensor(kernel, "kernel").shape[-2:])  # not what makes its sides odd
        if border == "unknown":
            self.kernel = trim_kernel(self.kernel)
        self.radius = (self.kernel.shape[-2] // 2, self.kernel.shape[-1] // 2)
        self._padding = self.radius if border == "reflect" else (0, 0)  # by which the image is continued
        if self.image_size is not None:
            self._check_radius(*self.image_size)

    @property
    def margin(self) -> tuple[int, int]:
        return self.radius if self.border == "unknown" else (0, 0)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self._check_image(x)
        factors = self._separate(x)
        if factors is not None:
            return factors.apply(x)
        (ry, rx), (rows, columns) = self._padding, self.margin
        height, width = x.shape[2] - 2 * rows, x.shape[3] - 2 * columns
        size, spectrum = self._spectrum(x, conjugate=True)
        padded = F.pad(x.to(compute_dtype(x)), (rx, rx, ry, ry), mode="reflect")
        y = torch.fft.irfft2(torch.fft.rfft2(padded, s=size) * spectrum, s=size)
        return y[..., :height, :width].to(x.dtype)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        (rows, columns), (ry, rx) = self.margin, self._padding
        like = y if self.border != "unknown" else y.new_empty(1).expand(self.image_shape(y))
        if self.adjoint == "reference":
            super()._check_image(like)
            return y if like is y else F.pad(y, (columns, columns, rows, rows))
        self._check_image(like)
        factors = self._separate(like)
        if factors is not None:
            return factors.mT.apply(y)
        height, width = like.shape[2:]
        size, spectrum = self._spectrum(like)
        z = y if like is y else F.pad(y, (0, 2 * columns, 0, 2 * rows))
        z = torch.fft.irfft2(torch.fft.rfft2(z.to(compute_dtype(y)), s=size) * spectrum, s=size)
        z = z[..., : height + 2 * ry, : width + 2 * rx]
        return fold_reflection(fold_reflection(z, ry, -2), rx, -1).to(y.dtype)

    def image_shape(self, y: torch.Tensor) -> tuple[int, ...]:
        if self.border != "unknown":
            return super().image_shape(y)
        rows, columns = self.margin
        return (*y.shape[:2], y.shape[2] + 2 * rows, y.shape[3] + 2 * columns)

    def factors(self, image_shape) -> Kronecker | None:
        profiles = self._profiles() if self.border != "circular" else None
        if profiles is None:
            return None
        self._check_radius(*image_shape[1:])
        ends = "reflect" if self.border == "reflect" else "cut"
        return Kronecker(None, *(filter_matrix(n, p, ends) for n, p in zip(image_shape[1:], profiles, strict=True)))

    def decompose(self, image_shape, full: bool):
        if self.border != "circular":
            return super().decompose(image_shape, full)
        self._check_radius(*image_shape[1:])
        return spectral.decompose_circular(torch.fft.fft2(self._place_kernel(*image_shape[1:])).conj())

    def __getitem__(self, rows) -> Blur:
        if self.kernel.ndim == 2 or len(self.kernel) == 1:
            return self
        return self._with(kernel=validate.select_images(self.kernel, rows, "kernels"))

    def _separate(self, x: torch.Tensor) -> Kronecker | None:
        """The matrices to compute x with instead of the FFT, or None."""
        return None

    def _profiles(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(column, row) whose outer product is the kernel, or None."""
        if self.kernel.ndim > 2:
            return None
        u, s, vh = np.linalg.svd(self.kernel.numpy())
        return (u[:, 0] * s[0], vh[0]) if (s[1:] <= 1e-14 * s[0]).all() else None

    def _place_kernel(self, height: int, width: int) -> torch.Tensor:
        """The kernels (1 or B, 1, height, width); with a circular border anchored at pixel (0, 0), else at `radius`."""
        (kh, kw), (ry, rx) = self.kernel.shape[-2:], self.radius
        kernel = F.pad(self.kernel.reshape(-1, 1, kh, kw), (0, width - kw, 0, height - kh))
        return kernel.roll((-ry, -rx), (-2, -1)) if self.border == "circular" else kernel

    def _spectrum(self, x: torch.Tensor, conjugate: bool = False) -> tuple[tuple[int, ...], torch.Tensor]:
        """FFT size for the continued image, and the kernels' spectra (1 or B, 1, ...) or their conjugates at that
        size."""
        size = tuple(x.shape[2:])
        if self.border == "reflect":
            size = tuple(scipy.fft.next_fast_len(n + 2 * r, True) for n, r in zip(size, self.radius, strict=True))

        def make():
            spectrum = torch.fft.rfft2(self._place_kernel(*size))
            return torch.view_as_real(spectrum.conj_physical() if conjugate else spectrum)

        return size, torch.view_as_complex(
            self._buffer(("spectrum", conjugate, size), make, compute_dtype(x), x.device)
        )

    def _check_image(self, x: torch.Tensor) -> None:
        super()._check_image(x)
        self._check_radius(*x.shape[2:])
        if self.kernel.ndim == 3:
            validate.require_count(self.kernel, "kernel", x)

    def _check_radius(self, height: int, width: int) -> None:
        (kh, kw), (rows, columns) = self._given, self.margin
        ry, rx = kh // 2, kw // 2
        height, width, circular = height - 2 * rows, width - 2 * columns, self.border == "circular"
        if not (kh <= height and kw <= width if circular else ry < height and rx < width):
            limit = "not exceed the image with a circular border" if circular else "have a radius below both sides"
            given = f"{kh} x {kw} (radius {max(ry, rx)}) for an image of {height} x {width}; try a smaller kernel_size"
            raise RestoreError(f"kernel must {limit}, got {given}")


class GaussianBlur(Blur):
    """Blur by a Gaussian of `std` pixels on a kernel_size x kernel_size grid (DPS: 61, 3.0 at 256 pixels)."""

    name = "gaussian_blur"
    derived = ("radius", "profile", "kernel")

    def __init__(self, kernel_size=61, std=3.0, *, border="reflect", noise=None, image_size=None, adjoint="exact"):
        self.kernel_size, self.std = kernel_size, std
        self.profile = kernels.gaussian_profile(kernel_size, std)
        if kernel_size % 2 == 0:
            self.profile = np.append(self.profile, 0.0)
        kernel = np.outer(self.profile, self.profile)
        super().__init__(kernel, border=border, noise=noise, image_size=image_size, adjoint=adjoint)
        if border == "unknown":
            self.__dict__["profile"] = self.profile[np.flatnonzero(self.profile)[0] :][: self.kernel.shape[-1]]

    def _profiles(self):
        return self.profile, self.profile

    def _separate(self, x: torch.Tensor) -> Kronecker | None:
        large = max(x.shape[2:]) > SEPARABLE_LIMIT
        return None if large or self.border == "circular" else self._cached_factors(x.shape, x)


class MotionBlur(Blur):
    """Blur by a random camera motion (DPS: 61, 0.5 at 256 pixels).

    law: of the kernel: "boracchi-foi" (`kernels.motion_kernel`), or "dps" (`kernels.dps_motion_kernel`).
    """

    name = "motion_blur"
    derived = ("radius", "kernel")

    def __init__(
        self,
        kernel_size=61,
        intensity=0.5,
        seed=0,
        *,
        law="boracchi-foi",
        border="reflect",
        noise=None,
        image_size=None,
        adjoint="exact",
    ):
        self.kernel_size, self.intensity, self.seed = kernel_size, intensity, seed
        self.law = validate.require_choice(law, "law", tuple(kernels.MOTION_LAWS))
        kernel = kernels.MOTION_LAWS[law](kernel_size, intensity, seed)
        super().__init__(kernel, border=border, noise=noise, image_size=image_size, adjoint=adjoint)


def as_kernel(kernel, normalize: bool = False) -> torch.Tensor:
    """Return a float64 kernel (kh, kw) or (B, kh, kw) with odd sides; an even one is continued with zeros. Raises
    RestoreError as described in `Blur`."""
    kernel = validate.require_tensor(kernel, "kernel").double()
    while kernel.ndim > 2 and kernel.shape[0] == 1:
        kernel = kernel[0]
    if kernel.ndim == 4 and kernel.shape[1] == 1:
        kernel = kernel[:, 0]
    if kernel.ndim not in (2, 3) or kernel.numel() == 0:
        shape = tuple(kernel.shape)
        raise RestoreError(f"kernel must be 2-D, or (B, kh, kw) for one per image, and not empty, got {shape}")
    if not torch.isfinite(kernel).all():
        raise RestoreError("kernel must hold finite weights that sum to one, got NaN or infinity")
    totals = kernel.sum((-2, -1), keepdim=True)
    if normalize and (totals.abs() > 1e-12).all():
        kernel = kernel / totals
    elif ((totals - 1.0).abs() > 1e-3).any():
        total = totals.flatten()[(totals - 1.0).abs().argmax()].item()
        raise RestoreError(f"kernel must sum to one, got a sum of {total:.6g}; try normalize=True")
    return F.pad(kernel, (0, 1 - kernel.shape[-1] % 2, 0, 1 - kernel.shape[-2] % 2)).contiguous()


def trim_kernel(kernel: torch.Tensor) -> torch.Tensor:
    """Return the kernels without the rows and columns at opposite ends that are zero in all of them."""
    for dim in (-2, -1):
        other = tuple(d for d in range(-kernel.ndim, 0) if d != dim)
        used = (kernel != 0).sum(other).nonzero().flatten()
        middle = kernel.shape[dim] // 2
        radius = int((used - middle).abs().max())
        kernel = kernel.narrow(dim, middle - radius, 2 * radius + 1)
    return kernel.contiguous()


def fold_reflection(z: torch.Tensor, radius: int, dim: int) -> torch.Tensor:
    """Apply the transpose of reflection padding along dim: the mirrored margins are added back to the inside."""
    if radius == 0:
        return z
    size = z.shape[dim] - 2 * radius
    out, mirrored = z.narrow(dim, radius, size).clone(), z.flip(dim)
    out.narrow(dim, 1, radius).add_(mirrored.narrow(dim, radius + size, radius))  # the first margin
    out.narrow(dim, size - 1 - radius, radius).add_(mirrored.narrow(dim, 0, radius))  # the last
    return out
