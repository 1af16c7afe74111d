"""Nonlinear degradations: they only have A, for samplers that need no transpose (DPS, DAPS, RED-diff)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from operators import validate
from operators.base import Operator
from operators.blur import MotionBlur
from operators.errors import RestoreError
from operators.jpeg import JPEGNoise
from operators.separable import compute_dtype

SLOPE_AT_WHITE = 2.4 / 1.055  # of the light over the encoded values of sRGB


class Clipping(Operator):
    """y = clip(gain x, -1, 1): an overexposed photo, whose highlights and shadows are lost (HDR reconstruction).

    gain: > 0; DAPS (Zhang et al. 2024) uses 2. The gradient is gain where y is not saturated, else 0.
    """

    name = "clipping"
    linear = False

    def __init__(self, gain: float = 2.0, *, noise=None, image_size=None, adjoint="exact"):
        super().__init__(noise=noise, image_size=image_size, adjoint=adjoint)
        self.gain = validate.require_positive(gain, "gain")

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self._check_image(x)
        return (self.gain * x).clamp(-1.0, 1.0)


class PhaseRetrieval(Operator):
    """y = |F P x|: magnitude of the orthonormal Fourier transform of the zero-padded image, per channel.

    oversample: P adds int(side oversample / 8) zeros at each of the four borders, as DPS does with 2.0 (Chung et al.
        2023, App. B: 256 -> 384 pixels). The zero frequency is in the middle of y. x and its half turn have the same y.
    unit: transform brightness (x + 1) / 2 in place of x, as DAPS (Zhang et al. 2024) does; else, as in DPS, -x has the
        same y, too, and noise of the same sigma is half as strong beside the contrast.

    y (B, C, h, w) is not in [-1, 1]: its mean square is that of the padded image. Its gradient at |.| = 0 is 0.
    Raises RestoreError if no image size fits y.
    """

    name = "phase_retrieval"
    linear = False

    def __init__(self, oversample: float = 2.0, unit: bool = False, *, noise=None, image_size=None, adjoint="exact"):
        super().__init__(noise=noise, image_size=image_size, adjoint=adjoint)
        self.oversample = validate.require_number(oversample, "oversample", low=0.0)
        self.unit = validate.require_choice(unit, "unit", (False, True))

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self._check_image(x)
        rows, columns = (self._margin(side) for side in x.shape[2:])
        x, dtype = x.to(compute_dtype(x)), x.dtype
        padded = F.pad((x + 1) / 2 if self.unit else x, (columns, columns, rows, rows))
        return torch.fft.fftshift(torch.fft.fft2(padded, norm="ortho"), dim=(-2, -1)).abs().to(dtype)

    def image_shape(self, y: torch.Tensor) -> tuple[int, ...]:
        validate.require_images(y, "y")
        return (*y.shape[:2], *(self._find_side(side) for side in y.shape[2:]))

    def _margin(self, side: int) -> int:
        return int(self.oversample / 8.0 * side)

    def _find_side(self, measured: int) -> int:
        """The image's side for a padded side of `measured` pixels, which grows strictly with it."""
        for side in range(measured, 0, -1):
            if side + 2 * self._margin(side) == measured:
                return side
        raise RestoreError(f"y must have the sides of a padded image, oversample {self.oversample:g}, got {measured}")


class JPEGRounding(Operator):
    """y = JPEG(x): a picture as Pillow compresses and reads it again, as a function of the picture.

    It is not differentiable: its derivative is 0 where it exists. What is given for it is that of the identity
    (straight-through estimate, Bengio et al. 2013, arXiv 1308.3432). `operators.JPEG` models the same file with the
    rounding as noise of known variance, has a proximal step and is what the task `jpeg` takes.

    quality: 1 to 100 of libjpeg, with its standard tables. subsampling: "4:4:4", "4:2:2" or "4:2:0".
    """

    name = "jpeg_rounding"
    linear = False

    def __init__(self, quality: int = 10, subsampling: str = "4:2:0", *, noise=None, image_size=None, adjoint="exact"):
        super().__init__(noise=noise, image_size=image_size, adjoint=adjoint)
        self.quality, self.subsampling = quality, subsampling
        self._compress = JPEGNoise(quality, subsampling=subsampling)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self._check_image(x)
        return self._compress(x) + (x - x.detach())  # the bytes of the first term, the derivative of the second


class NonlinearBlur(MotionBlur):
    """y = f(k * f^-1(x)): a motion blur of light, as a sensor collects it during an exposure, f the curve of sRGB.

    The light of a bright spot outshines what it is moved over, while `MotionBlur` averages the pixels' encoded values.
    Averaged light and a fixed curve are the model of Nah et al. (2017, eq. 2), who take f(v) = v^(1/2.2); f is that of
    IEC 61966-2-1 here, whose derivative is finite at black. The nonlinear blur of DPS (Chung et al. 2023) is a trained
    network instead. The options are those of `MotionBlur`.
    """

    name = "nonlinear_blur"
    linear = has_reference = stationary = False

    def A(self, x: torch.Tensor) -> torch.Tensor:
        light = decode_srgb((x.to(compute_dtype(x)) + 1) / 2)
        return (2 * encode_srgb(super().A(light)) - 1).to(x.dtype)

    A_adjoint = Operator.A_adjoint  # that of the motion alone would be wrong


def decode_srgb(v: torch.Tensor) -> torch.Tensor:
    """Return the light of encoded values, both 0 to 1 (IEC 61966-2-1); beyond, its tangents: samplers go there."""
    inside = ((v.clamp(0.04045, 1.0) + 0.055) / 1.055) ** 2.4
    return torch.where(v > 0.04045, inside + SLOPE_AT_WHITE * (v - 1).clamp(min=0.0), v / 12.92)


def encode_srgb(light: torch.Tensor) -> torch.Tensor:
    """Return the encoded values of light: the inverse of `decode_srgb`."""
    inside = 1.055 * light.clamp(0.0031308, 1.0) ** (1 / 2.4) - 0.055
    return torch.where(light > 0.0031308, inside + (light - 1).clamp(min=0.0) / SLOPE_AT_WHITE, 12.92 * light)
