"""Operators in other libraries' clothes: deepinv physics in both directions, scipy's LinearOperator."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import scipy.sparse.linalg
import torch

from operators import generic
from operators.base import Operator
from operators.errors import RestoreError
from operators.noise import GaussianNoise


class PhysicsOperator(Operator):
    """Any object with `A(x)` and `A_adjoint(y)`, such as a deepinv physics, as an Operator.

    physics: its A must be linear. A torch module follows the images to their device and dtype (as a
        copy: the module itself is not moved).
    noise: a noise model of this package. By default that of a deepinv physics: none or Gaussian, whose
        sigma is taken as it is, on the range of the images given here, [-1, 1].
    Raises RestoreError for objects without A and A_adjoint, and where a deepinv noise model has no
    counterpart (pass `noise` then).
    """

    name = "physics"

    def __init__(self, physics, *, noise=None, image_size=None):
        if not (callable(getattr(physics, "A", None)) and callable(getattr(physics, "A_adjoint", None))):
            raise RestoreError(f"expected an object with A(x) and A_adjoint(y), got {type(physics).__name__}.")
        super().__init__(noise=_translate_noise(physics) if noise is None else noise, image_size=image_size)
        self.physics = physics

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self._check_image(x)
        return self._physics(x).A(x)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self._physics(y).A_adjoint(y)

    def prox_l2(self, z: torch.Tensor, y: torch.Tensor, gamma) -> torch.Tensor:
        return generic.prox_l2(self._physics(z), z, y, gamma)

    def image_shape(self, y: torch.Tensor) -> tuple[int, ...]:
        y = torch.zeros(y.shape) if y.is_meta else y
        return generic.image_shape(self._physics(y), y)

    def _physics(self, like: torch.Tensor):
        if not isinstance(self.physics, torch.nn.Module):
            return self.physics
        copies = self.__dict__.setdefault("_buffers", {})
        key = (like.dtype, like.device)
        if key not in copies:
            copies[key] = _moved(self.physics, like)
        return copies[key]


def as_operator(operator, *, noise=None) -> Operator:
    """`operator` itself if it is an Operator, else `PhysicsOperator(operator, noise=noise)`."""
    if isinstance(operator, Operator):
        if noise is not None:
            raise RestoreError("an Operator carries its own noise; set it there instead of passing noise.")
        return operator
    return PhysicsOperator(operator, noise=noise)


def to_deepinv(operator: Operator):
    """A deepinv.physics.LinearPhysics with this operator's A, A_adjoint and (Gaussian) noise.

    Raises RestoreError where deepinv is not installed or the noise is not Gaussian.
    """
    try:
        from deepinv.physics import GaussianNoise as DeepinvGaussian
        from deepinv.physics import LinearPhysics, ZeroNoise
    except ImportError:
        raise RestoreError("deepinv is not installed; run `pip install deepinv`.") from None
    if operator.noise is None:
        noise_model = ZeroNoise()
    elif isinstance(operator.noise, GaussianNoise):
        noise_model = DeepinvGaussian(operator.noise.sigma)
    else:
        raise RestoreError(f"{operator.noise!r} has no deepinv counterpart on [-1, 1]; remove it from the operator.")

    # deepinv passes its physics' parameters as keywords; ours has none
    def forward(x, **_):
        return operator.A(x)

    def adjoint(y, **_):
        return operator.A_adjoint(y)

    return LinearPhysics(A=forward, A_adjoint=adjoint, noise_model=noise_model)


def as_linear_operator(operator, image_shape: Sequence[int], *, dtype=torch.float64, device="cpu"):
    """A scipy.sparse.linalg.LinearOperator (measurements, pixels) acting on flattened numpy vectors.

    operator: anything with A and A_adjoint. image_shape: (C, H, W) of one image.
    """
    shape = tuple(image_shape)
    if len(shape) != 3:
        raise RestoreError(f"image_shape must be (channels, height, width), got {shape}.")
    with torch.no_grad():
        measured = tuple(operator.A(torch.zeros(1, *shape, dtype=dtype, device=device)).shape[1:])

    def acting(function, source):
        def matmat(columns):  # the columns travel as one batch
            batch = torch.as_tensor(np.ascontiguousarray(columns.T), dtype=dtype, device=device)
            with torch.no_grad():
                result = function(batch.reshape(-1, *source))
            return result.flatten(1).cpu().numpy().T

        return (lambda vector: matmat(vector.reshape(-1, 1))[:, 0]), matmat

    matvec, matmat = acting(operator.A, shape)
    rmatvec, rmatmat = acting(operator.A_adjoint, measured)
    return scipy.sparse.linalg.LinearOperator(
        (math.prod(measured), math.prod(shape)),
        matvec=matvec,
        rmatvec=rmatvec,
        matmat=matmat,
        rmatmat=rmatmat,
        dtype=torch.empty(0, dtype=dtype).numpy().dtype,
    )


def _moved(module: torch.nn.Module, like: torch.Tensor) -> torch.nn.Module:
    """A copy on the device of `like`, in its precision; complex buffers stay complex (module.to would not)."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, tensor in [*part.named_buffers(recurse=False), *part.named_parameters(recurse=False)]:
            dtype = tensor.dtype
            if tensor.is_complex():
                dtype = torch.complex128 if like.dtype == torch.float64 else torch.complex64
            elif tensor.is_floating_point():
                dtype = like.dtype
            moved = tensor.detach().to(like.device, dtype)
            setattr(part, name, torch.nn.Parameter(moved) if isinstance(tensor, torch.nn.Parameter) else moved)
    return module


def _translate_noise(physics) -> GaussianNoise | None:
    model = getattr(physics, "noise_model", None)
    kind = type(model).__name__
    if model is None or kind == "ZeroNoise":
        return None
    if kind == "GaussianNoise" and torch.as_tensor(model.sigma).numel() == 1:
        return GaussianNoise(float(model.sigma))
    raise RestoreError(f"the physics' noise model {kind} has no counterpart here; pass noise=... explicitly.")
