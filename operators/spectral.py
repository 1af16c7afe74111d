"""Singular value decompositions A = U diag(s) V^T in closed form, as maps on batches of images.

Both classes offer `singular`, `U(c)`, `U_adjoint(y)`, `V(c)` and `V_adjoint(x)`. Coordinates c have the layout
(B, C, H, W) of the image, for U as for V, so that U_adjoint(A(x)) = singular * V_adjoint(x). singular = 0 marks what y
does not determine; U ignores coordinates for which y has no entry, and U_adjoint sets them to 0.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from operators.separable import Kronecker

LIMIT = 2048  # the largest matrix that is decomposed: some seconds once, 32 MB in float64


@dataclasses.dataclass
class KroneckerSVD:
    """SVD of a Kronecker product, or with the identities left = right = Kronecker() of a diagonal operator.

    singular: (1 or B, 1 or C, 1 or H, 1 or W), broadcast over the coordinates. left, right: U and V. If right's
    matrices are thin (only the row space of A), so is the layout of the coordinates.
    """

    singular: torch.Tensor
    left: Kronecker = Kronecker()
    right: Kronecker = Kronecker()

    def U(self, c: torch.Tensor) -> torch.Tensor:
        for axis, matrix in enumerate(self.left, start=1):
            c = c if matrix is None else c.narrow(axis, 0, matrix.shape[1])
        return self.left.apply(c)

    def U_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        c = self.left.mT.apply(y)
        sizes = [n if matrix is None else matrix.shape[1] for n, matrix in zip(c.shape[1:], self.right, strict=True)]
        return F.pad(c, (0, sizes[2] - c.shape[3], 0, sizes[1] - c.shape[2], 0, sizes[0] - c.shape[1]))

    def V(self, c: torch.Tensor) -> torch.Tensor:
        return self.right.apply(c)

    def V_adjoint(self, x: torch.Tensor) -> torch.Tensor:
        return self.right.mT.apply(x)

    def to(self, target) -> KroneckerSVD:
        return KroneckerSVD(self.singular.to(target), self.left.to(target), self.right.to(target))


@dataclasses.dataclass
class FourierSVD:
    """SVD of a real circular convolution A = F^-1 diag(|t| phase) F.

    The symmetric circular convolution with spectrum |t| is diagonal in the real Hartley basis V, and A = W V |t| V^T
    with the orthogonal W = F^-1 diag(phase) F, thus U = W V.

    singular: |t| (1 or B, 1, H, W). phase: t / |t| as (1 or B, 1, H, W, 2), real and imaginary part.
    """

    singular: torch.Tensor
    phase: torch.Tensor

    def U(self, c: torch.Tensor) -> torch.Tensor:
        return self._rotate(self.V(c), torch.view_as_complex(self.phase))

    def U_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self.V(self._rotate(y, torch.view_as_complex(self.phase).conj()))

    def V(self, c: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.fft2(c.to(self.singular.dtype), norm="ortho")
        return (spectrum.real - spectrum.imag).to(c.dtype)

    V_adjoint = V  # the Hartley transform is its own inverse

    def to(self, target) -> FourierSVD:
        return FourierSVD(self.singular.to(target), self.phase.to(target))

    def _rotate(self, x: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
        return torch.fft.ifft2(phase * torch.fft.fft2(x.to(self.singular.dtype))).real.to(x.dtype)


def decompose_kronecker(factors: Kronecker, full: bool) -> KroneckerSVD | None:
    """Return the SVD of float64 matrices; None if one exceeds LIMIT or has more rows than columns.

    full: with all of V; otherwise only the row space of A, which is cheaper. Singular values below the rounding error
    of the largest are 0 (as in torch.linalg.pinv).
    """
    singular, left, right = torch.ones(1, 1, 1, 1, dtype=torch.float64), [None] * 3, [None] * 3
    for axis, matrix in enumerate(factors):
        if matrix is None:
            continue
        if (max if full else min)(matrix.shape) > LIMIT or matrix.shape[0] > matrix.shape[1]:
            return None
        left[axis], s, vh = torch.linalg.svd(matrix.double(), full_matrices=full)
        s = torch.where(s > s[0] * max(matrix.shape) * torch.finfo(s.dtype).eps, s, 0.0)
        s = F.pad(s, (0, vh.shape[0] - len(s)))
        singular = singular * s.view([-1 if dim == axis + 1 else 1 for dim in range(4)])
        right[axis] = vh.mT
    return KroneckerSVD(singular, Kronecker(*left), Kronecker(*right))


def decompose_circular(transfer: torch.Tensor) -> FourierSVD:
    """Return the SVD of the circular convolution with the complex spectrum `transfer` (1 or B, 1, H, W), float64."""
    size = transfer.abs()
    known = size > size.amax((-2, -1), keepdim=True) * max(transfer.shape[-2:]) * torch.finfo(size.dtype).eps
    phase = torch.where(known, transfer / size.where(known, 1.0), 1.0)
    return FourierSVD(size.where(known, 0.0), torch.view_as_real(phase).contiguous())
