"""What samplers ask of any operator: one of this package, a deepinv physics, any object with A and A_adjoint."""

from __future__ import annotations

import inspect

import torch

from operators import proximal, validate
from operators.base import Operator
from operators.errors import RestoreError


def with_adjoint(operator, adjoint: str):
    """A copy with the "exact" or the "reference" A_adjoint (the authors' approximation), in all parts of a Compose.

    Raises RestoreError where the operator has no reference transpose.
    """
    if isinstance(operator, Operator):
        return operator.with_adjoint(adjoint)
    if adjoint == "exact":
        return operator
    raise RestoreError(f"only operators of this package have a reference transpose, not a {type(operator).__name__}.")


def select_rows(operator, rows):
    """`operator[rows]`, the operator of these images of the batch; other libraries' objects are returned unchanged."""
    return operator[rows] if isinstance(operator, Operator) else operator


def image_shape(operator, y: torch.Tensor) -> tuple[int, int, int, int]:
    """Shape (B, C, H, W) of the images behind the measurement y (B, ...).

    Raises RestoreError for an object that is no operator, and for a y that does not fit it.
    """
    if isinstance(operator, Operator):
        validate.require_images(y, "the measurement")
        shape = tuple(operator.image_shape(y))
        with torch.no_grad():
            measured = operator.A(torch.zeros(shape, dtype=y.dtype, device=y.device)).shape
        if measured != y.shape:
            raise RestoreError(
                f"the measurement of shape {tuple(y.shape)} does not fit the operator: images of {shape} give "
                f"{tuple(measured)}; pass the measurement of this operator, built for the original's size."
            )
        return shape
    _check(operator)
    try:
        with torch.no_grad():
            shape = tuple(operator.A_adjoint(y).shape)
    except RuntimeError as error:
        raise RestoreError(f"the measurement of shape {tuple(y.shape)} does not fit the operator: {error}") from None
    if len(shape) != 4 or shape[0] != len(y):
        raise RestoreError(f"A_adjoint must return images (B, C, H, W), got {shape} from y of {tuple(y.shape)}.")
    return shape


def prox_l2(operator, z: torch.Tensor, y: torch.Tensor, gamma, rough: bool = False) -> torch.Tensor:
    """argmin_x gamma/2 ||A x - y||^2 + 1/2 ||x - z||^2; gamma: >= 0, one number or (B,). See `Operator.prox_l2`.

    rough: where conjugate gradients are needed, stop them as early as a step of a sampler allows (proximal.ROUGH).
    An object of another library with its own prox_l2(z, y, gamma) is asked for it (deepinv's physics; the accuracy is
    then theirs), any other is solved by conjugate gradients.
    """
    if isinstance(operator, Operator):
        if rough and operator.linear and type(operator).prox_l2 is Operator.prox_l2:
            return proximal.prox_l2(operator, z, y, gamma, rough)
        return operator.prox_l2(z, y, gamma)
    _check(operator)
    own = getattr(operator, "prox_l2", None)
    if not callable(own) or not {"z", "y", "gamma"} <= set(inspect.signature(own).parameters):
        return proximal.prox_l2(operator, z, y, gamma, rough)
    if isinstance(gamma, torch.Tensor):
        gamma = gamma.to(z.dtype).to(z.device).reshape(-1, *[1] * (z.ndim - 1)) if gamma.numel() > 1 else gamma.item()
    return own(z, y, gamma)


def regularised_inverse(operator, v: torch.Tensor, r) -> torch.Tensor:
    """(A A^T + r I)^-1 v; r: >= 0, one number or (B,). See `Operator.regularised_inverse`."""
    if isinstance(operator, Operator):
        return operator.regularised_inverse(v, r)
    _check(operator)
    return proximal.regularised_inverse(operator, v, r)


def svd(operator, image_shape, dtype: torch.dtype = torch.float32, device="cpu"):
    """`operator.svd(image_shape, dtype, device)`. Raises RestoreError where the operator offers none."""
    if isinstance(operator, Operator):
        return operator.svd(image_shape, dtype, device)
    raise RestoreError(
        f"a {type(operator).__name__} offers no singular value decomposition; use an operator that does."
    )


def _check(operator) -> None:
    if not (callable(getattr(operator, "A", None)) and callable(getattr(operator, "A_adjoint", None))):
        raise RestoreError(f"an operator needs A and A_adjoint, got {type(operator).__name__}.")
