"""Pixelwise degradations: none (denoising) and loss of colour."""

from __future__ import annotations

import torch

from operators import validate
from operators.base import Operator
from operators.errors import RestoreError
from operators.separable import Kronecker

BT601 = (0.299, 0.587, 0.114)


class Denoising(Operator):
    """A(x) = x: only the noise. Its reference "transpose" is the identity as well."""

    name = "denoising"
    has_reference = True
    stationary = True

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self._check_image(x)
        return x

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y

    A_dagger = A_adjoint

    def factors(self, image_shape) -> Kronecker:
        return Kronecker()


class Colorization(Operator):
    """y = the grey image: (B, 3, H, W) -> (B, 1, H, W), y = sum_c weights[c] x_c.

    weights: of R, G, B, summing to one; by default the luma of ITU-R BT.601, as in Pillow and MATLAB. DDRM and DDNM use
        (1/3, 1/3, 1/3).
    Raises RestoreError for weights that are not three finite numbers with sum one, and for adjoint="reference".
    """

    name = "colorization"

    def __init__(self, *, weights=BT601, noise=None, image_size=None, adjoint="exact"):
        super().__init__(noise=noise, image_size=image_size, adjoint=adjoint)
        values = torch.as_tensor([validate.require_number(w, "weights") for w in weights], dtype=torch.float64)
        if values.shape != (3,) or abs(values.sum().item() - 1) > 1e-3:
            raise RestoreError(f"weights must be three numbers that sum to one, got {tuple(weights)}")
        self.weights = values

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self._check_image(x, channels=3)
        return (self._column(x) * x).sum(dim=1, keepdim=True)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        validate.require_images(y, "y", channels=1)
        return self._column(y) * y

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        """Closed form: weights y / ||weights||^2."""
        return self.A_adjoint(y) / self.weights.square().sum().item()

    def factors(self, image_shape) -> Kronecker:
        return Kronecker(channels=self.weights[None])

    def image_shape(self, y: torch.Tensor) -> tuple[int, ...]:
        return (y.shape[0], 3, *y.shape[2:])

    def _column(self, x: torch.Tensor) -> torch.Tensor:
        """The weights (1, 3, 1, 1) in x's dtype and on its device."""
        return self._buffer(("weights",), lambda: self.weights.view(1, 3, 1, 1), x.dtype, x.device)
