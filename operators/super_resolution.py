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

    def __init__(self, factor: int, *, method: str = "bicubic", noise=None, image_size=None, adjoint: str = "exact"):
        super().__init__(noise=noise, image_size=image_size, adjoint=adjoint)
        self.factor = validate.integer(factor, "the super-resolution factor")
        if method not in ("bicubic", "average"):
            raise RestoreError(f"method must be 'bicubic' or 'average', got {method!r}.")
        self.method = method
        if self.image_size is not None:
            self._check_factor(*self.image_size)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self._check_image(x)
        self._check_factor(*x.shape[2:])
        return separable.apply(self._matrix(x.shape[2], x), self._matrix(x.shape[3], x), x)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        height, width = self.image_shape(y)[2:]
        if self.adjoint == "reference":
            replicated = y.repeat_interleave(self.factor, dim=2).repeat_interleave(self.factor, dim=3)
            return replicated[..., :height, :width]
        return separable.apply(self._matrix(height, y).mT, self._matrix(width, y).mT, y)

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        """Closed form: the pseudo-inverse of a Kronecker product is the product of the pseudo-inverses."""
        height, width = self.image_shape(y)[2:]
        return separable.apply(self._pseudo_inverse(height, y), self._pseudo_inverse(width, y), y)

    def image_shape(self, y: torch.Tensor) -> tuple[int, ...]:
        validate.images(y, "the measurement")
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

    def _matrix(self, size: int, x: torch.Tensor) -> torch.Tensor:
        def make():
            return separable.downsampling_matrix(size, self.factor, self.method)

        return self._buffer(("matrix", size), make, separable.like(x))

    def _pseudo_inverse(self, size: int, y: torch.Tensor) -> torch.Tensor:
        def make():
            return torch.linalg.pinv(separable.downsampling_matrix(size, self.factor, self.method))

        return self._buffer(("pseudo_inverse", size), make, separable.like(y))
