"""Adapters to other libraries: deepinv physics in both directions, scipy's LinearOperator."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch

from operators import generic
from operators.base import Operator
from operators.errors import RestoreError
from operators.noise import GaussianNoise, translate_noise


class PhysicsOperator(Operator):
    """Any object with `A(x)` and `A_adjoint(y)`, such as a deepinv physics, as an Operator.

    physics: its A must be linear. A copy of a torch module follows the images to their device and dtype.
    noise: a noise model of this package; None: that of a deepinv physics, its sigma taken on [-1, 1].
    Raises RestoreError for objects without A and A_adjoint, and for a deepinv noise model that is not Gaussian.
    """

    name = "physics"

    def __init__(self, physics, *, noise=None, image_size=None):
        self.physics = generic.require_adjoint(physics)
        if noise is None:
            translate_noise(getattr(physics, "noise_model", None))  # raises now for what it cannot be
        super().__init__(noise=noise, image_size=image_size)

    @property
    def noise(self):
        """The noise model given, else that of the physics, as it is now."""
        return translate_noise(getattr(self.physics, "noise_model", None)) if self._noise is None else self._noise

    @noise.setter
    def noise(self, noise) -> None:
        self._noise = noise

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self._check_image(x)
        return self._move_physics(x).A(x)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self._move_physics(y).A_adjoint(y)

    def prox_l2(self, z: torch.Tensor, y: torch.Tensor, gamma) -> torch.Tensor:
        return generic.prox_l2(self._move_physics(z), z, y, gamma)

    def image_shape(self, y: torch.Tensor) -> tuple[int, ...]:
        y = torch.zeros(y.shape) if y.is_meta else y
        return generic.image_shape(self._move_physics(y), y)

    def _move_physics(self, x: torch.Tensor):
        """The physics; a module as a copy on the device of x, in its precision (complex buffers stay complex)."""
        if not isinstance(self.physics, torch.nn.Module):
            return self.physics
        state = [
            (value, getattr(value, "_version", None))
            for part in self.physics.modules()
            for value in (*part.parameters(False), *part.buffers(False), *vars(part).values())
        ]
        # deepinv's `update_parameters` changes a physics that is in use
        known = self.__dict__.get("_known", [])
        if len(known) != len(state) or any(a is not c or b != d for (a, b), (c, d) in zip(known, state, strict=True)):
            self.__dict__.update(_known=state, _copies={})
        copies, key = self.__dict__["_copies"], (x.dtype, x.device)
        if key not in copies:

            def convert(tensor):  # module.to would make complex buffers real
                dtype = x.dtype if tensor.is_floating_point() else tensor.dtype
                dtype = torch.promote_types(x.dtype, torch.complex64) if tensor.is_complex() else dtype
                return tensor.detach().to(x.device, dtype, copy=True)

            copies[key] = copy.deepcopy(self.physics)._apply(convert)
        return copies[key]


def as_operator(operator, *, noise=None) -> Operator:
    """Return `operator` itself if it is an Operator, else `PhysicsOperator(operator, noise=noise)`."""
    if not isinstance(operator, Operator):
        return PhysicsOperator(operator, noise=noise)
    if noise is not None:
        raise RestoreError("noise must be None for an Operator, which carries its own noise; try setting it there")
    return operator


def to_deepinv(operator: Operator):
    """Return a deepinv.physics.LinearPhysics with this operator's A, A_adjoint and (Gaussian) noise. Raises
    RestoreError if deepinv is not installed or the noise is not Gaussian."""
    try:
        from deepinv.physics import GaussianNoise as DeepinvGaussian
        from deepinv.physics import LinearPhysics, ZeroNoise
    except ImportError:
        raise RestoreError("deepinv must be installed; try `pip install deepinv`") from None
    if operator.noise is None:
        noise_model = ZeroNoise()
    elif isinstance(operator.noise, GaussianNoise):
        noise_model = DeepinvGaussian(operator.noise.sigma)
    else:
        raise RestoreError(f"noise must be None or Gaussian for deepinv's range, got {operator.noise!r}")
    # deepinv passes its physics' parameters as keywords; ours has none
    return LinearPhysics(
        A=lambda x, **_: operator.A(x), A_adjoint=lambda y, **_: operator.A_adjoint(y), noise_model=noise_model
    )


def as_linear_operator(operator, image_shape: Sequence[int], *, dtype=torch.float64, device="cpu"):
    """Return a scipy.sparse.linalg.LinearOperator (measurements, pixels) acting on flattened numpy vectors.

    operator: anything with A and A_adjoint. image_shape: (C, H, W) of one image.
    """
    from scipy.sparse.linalg import LinearOperator

    shape = tuple(image_shape)
    if len(shape) != 3:
        raise RestoreError(f"image_shape must be (channels, height, width), got {shape}")
    with torch.no_grad():
        measured = tuple(operator.A(torch.zeros(1, *shape, dtype=dtype, device=device)).shape[1:])

    def flatten(function, source):
        def apply(columns):  # a vector or a matrix, whose columns travel as one batch
            batch = torch.as_tensor(np.ascontiguousarray(columns.T), dtype=dtype, device=device)
            with torch.no_grad():
                return function(batch.reshape(-1, *source)).flatten(1).cpu().numpy().T

        return apply

    forward, adjoint = flatten(operator.A, shape), flatten(operator.A_adjoint, measured)
    size, kind = (math.prod(measured), math.prod(shape)), torch.empty(0, dtype=dtype).numpy().dtype
    return LinearOperator(size, forward, adjoint, forward, dtype=kind, rmatmat=adjoint)
