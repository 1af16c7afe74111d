"""Downsampling by an integer factor."""

from __future__ import annotations

import math

import torch

from operators import separable, validate
from operators.base import Operator
from operators.errors import RestoreError


class SuperResolution(Operator):
    """y = x downsampled by `factor`: (B, C, H, W) -> (B, C, ceil(H / factor), ceil(W / factor)).

    factor: integer >= 1.
    method: "bicubic" (antialiased, a = -0.5, symmetric boundary: the resizer of DPS and MATLAB's
        imresize) or "average" (mean over factor x factor blocks).
    image_size: (H, W), needed for A_adjoint and A_dagger only where the factor does not divide the
        size; otherwise a measurement (h, w) belongs to an image (h factor, w factor). The output
        grid is concentric with the image (see `separable.downsampling_matrix`).
    adjoint="reference": nearest-neighbour replication, `transpose` of the DPS and PSLD repositories.

    Raises RestoreError for a bad factor, an image smaller than the factor, or a y of another size.
    """

    name = "super_resolution"
    has_reference = True

    def __init__(self, factor: int, *, method: str = "bicubic", noise=None, image_size=None, adjoint: str = "exact"):
        super().__init__(noise=noise, image_size=image_size, adjoint=adjoint)
        self.factor = validate.require_integer(factor, "the super-resolution factor")
        if method not in ("bicubic", "average"):
            raise RestoreError(f"method must be 'bicubic' or 'average', got {method!r}.")
        self.method = method
        if self.image_size is not None:
            self._check_factor(*self.image_size)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self._check_image(x)
        self._check_factor(*x.shape[2:])
        return separable.apply(self._matrices(x.shape, x), x)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        shape = self.image_shape(y)
        if self.adjoint == "reference":
            replicated = y.repeat_interleave(self.factor, dim=2).repeat_interleave(self.factor, dim=3)
            return replicated[..., : shape[2], : shape[3]]
        return separable.apply(separable.transposed(self._matrices(shape, y)), y)

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        """Closed form: the pseudo-inverse of a Kronecker product is the product of the pseudo-inverses."""
        shape = self.image_shape(y)
        return separable.apply((None, self._pseudo_inverse(shape[2], y), self._pseudo_inverse(shape[3], y)), y)

    def factors(self, image_shape):
        self._check_factor(*image_shape[1:])
        rows, columns = (separable.downsampling_matrix(side, self.factor, self.method) for side in image_shape[1:])
        return None, rows, columns

    def image_shape(self, y: torch.Tensor) -> tuple[int, ...]:
        validate.require_images(y, "the measurement")
        if self.image_size is None:
            return (*y.shape[:2], y.shape[2] * self.factor, y.shape[3] * self.factor)
        expected = tuple(math.ceil(side / self.factor) for side in self.image_size)
        if tuple(y.shape[2:]) != expected:
            raise RestoreError(
                f"the measurement is {y.shape[2]} x {y.shape[3]}, but an image of {self.image_size[0]} x "
                f"{self.image_size[1]} downsampled by {self.factor} is {expected[0]} x {expected[1]}; "
                "pass the matching image_size."
            )
        return (*y.shape[:2], *self.image_size)

    def _check_factor(self, height: int, width: int) -> None:
        if self.factor > min(height, width):
            raise RestoreError(
                f"the factor {self.factor} is larger than the image ({height} x {width}); use a smaller factor."
            )

    def _matrices(self, image_shape, x: torch.Tensor) -> separable.Factors:
        def matrix(size):
            def make():
                return separable.downsampling_matrix(size, self.factor, self.method)

            return self._buffer(("matrix", size), make, separable.like(x))

        return None, matrix(image_shape[2]), matrix(image_shape[3])

    def _pseudo_inverse(self, size: int, y: torch.Tensor) -> torch.Tensor:
        def make():
            return torch.linalg.pinv(separable.downsampling_matrix(size, self.factor, self.method))

        return self._buffer(("pseudo_inverse", size), make, separable.like(y))
