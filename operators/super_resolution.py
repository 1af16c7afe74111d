"""Downsampling by an integer factor."""

from __future__ import annotations

import math

import torch

from operators import validate
from operators.base import Operator
from operators.errors import RestoreError
from operators.separable import Kronecker, compute_dtype, downsampling_matrix


class SuperResolution(Operator):
    """y = x downsampled by `factor`: (B, C, H, W) -> (B, C, ceil(H / factor), ceil(W / factor)).

    factor: integer >= 1.
    method: "bicubic" (antialiased, a = -0.5, symmetric boundary: the resizer of DPS and MATLAB's imresize) or "average"
        (mean over factor x factor blocks); see `separable.downsampling_matrix`.
    image_size: (H, W), needed for A_adjoint and A_dagger only if the factor does not divide the size.
    adjoint="reference": nearest-neighbour replication, `transpose` of the DPS and PSLD repositories.

    Raises RestoreError for a bad factor, an image smaller than the factor, or a y of another size.
    """

    name = "super_resolution"
    enlarges = True
    has_reference = True
    stationary = True

    def __init__(self, factor: int, *, method="bicubic", noise=None, image_size=None, adjoint="exact"):
        super().__init__(noise=noise, image_size=image_size, adjoint=adjoint)
        self.factor = validate.require_integer(factor, "factor")
        self.method = validate.require_choice(method, "method", ("bicubic", "average"))
        if self.image_size is not None:
            self._check_factor(*self.image_size)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self._check_image(x)
        self._check_factor(*x.shape[2:])
        return self._cached_factors(x.shape, x).apply(x)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        shape = self.image_shape(y)
        if self.adjoint == "reference":
            replicated = y.repeat_interleave(self.factor, dim=2).repeat_interleave(self.factor, dim=3)
            return replicated[..., : shape[2], : shape[3]]
        return self._cached_factors(shape, y).mT.apply(y)

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        """Closed form: the pseudo-inverse of a Kronecker product is the product of the pseudo-inverses."""
        shape = self.image_shape(y)[1:]
        return self._buffer(
            ("pseudo_inverse", shape), lambda: self.factors(shape).each(torch.linalg.pinv), compute_dtype(y), y.device
        ).apply(y)

    def factors(self, image_shape) -> Kronecker:
        self._check_factor(*image_shape[1:])
        return Kronecker(None, *(downsampling_matrix(side, self.factor, self.method) for side in image_shape[1:]))

    def image_shape(self, y: torch.Tensor) -> tuple[int, ...]:
        validate.require_images(y, "y")
        if self.image_size is None:
            return (*y.shape[:2], y.shape[2] * self.factor, y.shape[3] * self.factor)
        height, width = (math.ceil(side / self.factor) for side in self.image_size)
        if tuple(y.shape[2:]) != (height, width):
            image = "{} x {} downsampled by {}".format(*self.image_size, self.factor)
            raise RestoreError(f"y must be {height} x {width}, an image of {image}, got {y.shape[2]} x {y.shape[3]}")
        return (*y.shape[:2], *self.image_size)

    def _check_factor(self, height: int, width: int) -> None:
        if self.factor > min(height, width):
            raise RestoreError(f"factor must be at most the image's {height} x {width}, got {self.factor}")
