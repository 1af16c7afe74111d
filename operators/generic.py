"""Functions for any operator: one of this package, a deepinv physics, any object with A and A_adjoint."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F

from operators import proximal, validate
from operators.base import Operator, describe_object
from operators.errors import RestoreError
from operators.noise import translate_noise

OPTIMAL = 1e-2  # relative gradient up to which another library's proximal step is taken for one


def with_adjoint(operator, adjoint: str):
    """Return a copy with the "exact" or the "reference" A_adjoint (see `Operator`), in all parts of a Compose. Raises
    RestoreError if the operator has no reference transpose."""
    if isinstance(operator, Operator):
        return operator.with_adjoint(adjoint)
    if adjoint == "exact":
        return operator
    raise RestoreError(f"adjoint must be 'exact' for a {type(operator).__name__}, got {adjoint!r}")


def select_rows(operator, rows):
    """Return `operator[rows]`, the operator of these images of the batch; other libraries' objects unchanged."""
    return operator[rows] if isinstance(operator, Operator) else operator


def image_shape(operator, y: torch.Tensor) -> tuple[int, int, int, int]:
    """Return the shape (B, C, H, W) of the images behind the measurement y (B, ...). Raises RestoreError for an object
    that is no operator, and for a y that does not fit it."""
    if isinstance(operator, Operator):
        validate.require_images(y, "y")
        shape = tuple(operator.image_shape(y))
        with torch.no_grad():
            expected = tuple(operator.A(torch.zeros(shape, dtype=y.dtype, device=y.device)).shape)
        if expected != tuple(y.shape):
            given = f"{tuple(y.shape)}; try an operator built for the original's size"
            raise RestoreError(f"y must have the shape {expected} of a measured {shape} image, got {given}")
        return shape
    require_adjoint(operator)
    try:
        with torch.no_grad():
            shape = tuple(operator.A_adjoint(y).shape)
    except RuntimeError as error:
        raise RestoreError(f"y must fit the operator, got {tuple(y.shape)}: {error}") from None
    if len(shape) != 4 or shape[0] != len(y):
        raise RestoreError(f"A_adjoint must return images (B, C, H, W), got {shape} from y of {tuple(y.shape)}")
    return shape


def prox_l2(operator, z: torch.Tensor, y: torch.Tensor, gamma, rough: bool = False) -> torch.Tensor:
    """Return argmin_x gamma/2 ||A x - y||^2 + 1/2 ||x - z||^2; gamma: >= 0, one number or (B,). See `Operator.prox_l2`.

    rough: if conjugate gradients are needed, stop them as early as a step of a sampler allows (proximal.ROUGH).
    If an object of another library has its own prox_l2(z, y, gamma), it is called; the accuracy is then theirs. A
    deepinv physics whose own result is not the minimum, and any other object, is solved by conjugate gradients.
    """
    if isinstance(operator, Operator):
        if rough and operator.linear and type(operator).prox_l2 is Operator.prox_l2:
            return proximal.prox_l2(operator, z, y, gamma, rough)
        return operator.prox_l2(z, y, gamma)
    require_adjoint(operator)
    own = getattr(operator, "prox_l2", None)
    if not callable(own) or not {"z", "y", "gamma"} <= set(inspect.signature(own).parameters):
        return proximal.prox_l2(operator, z, y, gamma, rough)
    if isinstance(gamma, torch.Tensor):
        gamma = gamma.to(z.dtype).to(z.device).reshape(-1, *[1] * (z.ndim - 1)) if gamma.numel() > 1 else gamma.item()
    if not hasattr(operator, "noise_model"):
        return own(z, y, gamma)
    try:
        x = own(z, y, gamma)
    except RuntimeError:  # deepinv's Upsampling inherits the closed form of Downsampling
        return proximal.prox_l2(operator, z, y, gamma, rough)
    gradient = gamma * operator.A_adjoint(operator.A(x) - y) + x - z
    scale = (gamma * operator.A_adjoint(y)).norm() + z.norm()
    return x if gradient.norm() <= OPTIMAL * scale else proximal.prox_l2(operator, z, y, gamma, rough)


def regularised_inverse(operator, v: torch.Tensor, r) -> torch.Tensor:
    """Return (A A^T + r I)^-1 v; r: >= 0, one number or (B,). See `Operator.regularised_inverse`."""
    if isinstance(operator, Operator):
        return operator.regularised_inverse(v, r)
    return proximal.regularised_inverse(require_adjoint(operator), v, r)


def svd(operator, image_shape, dtype: torch.dtype = torch.float32, device="cpu"):
    """Return `operator.svd(image_shape, dtype, device)`. Raises RestoreError if the operator has none."""
    if isinstance(operator, Operator):
        return operator.svd(image_shape, dtype, device)
    raise RestoreError(f"operator must have a singular value decomposition, got {type(operator).__name__}")


def cut_margin(operator, x: torch.Tensor) -> torch.Tensor:
    """Return what y shows of the images x (..., H, W): without the operator's margin."""
    rows, columns = operator.margin if isinstance(operator, Operator) else (0, 0)
    return x[..., rows : x.shape[-2] - rows, columns : x.shape[-1] - columns]


def continue_margin(operator, x: torch.Tensor) -> torch.Tensor:
    """Return images (B, C, H, W) whose inside is x, continued over the operator's margin by reflection, as often as it
    takes; x itself without a margin."""
    rows, columns = operator.margin if isinstance(operator, Operator) else (0, 0)
    while rows or columns:
        now = min(rows, max(x.shape[-2] - 1, 0)), min(columns, max(x.shape[-1] - 1, 0))
        mode = "reflect" if any(now) else "replicate"  # a side of one pixel has no mirror image
        now = now if any(now) else (rows, columns)
        x = F.pad(x, (now[1], now[1], now[0], now[0]), mode=mode)
        rows, columns = rows - now[0], columns - now[1]
    return x


def find_noise(operator):
    """Return the noise model of any operator, None for none; that of a deepinv physics, whose `noise` is a method, is
    its `noise_model` with sigma on [-1, 1]. Raises RestoreError for one of those that is not Gaussian."""
    if not isinstance(operator, Operator) and hasattr(operator, "noise_model"):
        return translate_noise(operator.noise_model)
    return getattr(operator, "noise", None)


def is_linear(operator) -> bool:
    """Return whether A is linear: as the operator says, or a deepinv physics by its class; True if nothing says it."""
    if hasattr(operator, "noise_model") and not isinstance(operator, Operator):
        return any(kind.__name__ == "LinearPhysics" for kind in type(operator).__mro__)
    return getattr(operator, "linear", True)


def describe(operator) -> str:
    """Return class and settings of any operator, arrays by shape and hash: with the same text they compute the same."""
    return repr(operator) if isinstance(operator, Operator) else describe_object(operator)


def require_adjoint(operator):
    """Return `operator`. Raises RestoreError unless it has methods A and A_adjoint."""
    if callable(getattr(operator, "A", None)) and callable(getattr(operator, "A_adjoint", None)):
        return operator
    raise RestoreError(f"operator must have A(x) and A_adjoint(y), got {type(operator).__name__}")
