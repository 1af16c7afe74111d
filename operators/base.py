"""What every degradation promises: A, its transpose, inverses of several kinds, and noise."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from operators import proximal, separable, spectral, validate
from operators.errors import RestoreError

CACHE_LIMIT = 32  # buffers kept per operator; one per (size, dtype, device) in use


class Operator:
    """A degradation y = A(x) + n of images x (B, C, H, W) in [-1, 1], linear unless its class says `linear = False`.

    A new operator writes `A` alone: `A_adjoint` is derived from it by automatic differentiation, `A_dagger`,
    `prox_l2` and `regularised_inverse` by conjugate gradients. `A` must work for any batch, treat the images of a
    batch independently and, if linear, have no constant term. Override `image_shape` if `A` changes an image's
    shape, and `factors` if A is a matrix per axis: every inverse then has its closed form.

    A nonlinear operator has A alone; what needs a transpose raises RestoreError.

    noise: a noise model (`GaussianNoise`, `PoissonNoise`) or None.
    image_size: (H, W) of x, for operators where the size of y does not determine it. Where it is
        given, images of another size are refused.
    adjoint: "exact", or "reference" for the approximate "transpose" of the DPS and PSLD repositories
        (only to reproduce their numbers, and only in the operators they have).
    """

    name = "operator"  # by which presets are chosen: the class's name in configs
    linear = True
    has_reference = False  # whether adjoint="reference" exists
    derived: tuple[str, ...] = ()  # attributes computed from the others, left out of the printed form
    noise = None
    image_size: tuple[int, int] | None = None
    adjoint = "exact"

    def __init__(self, *, noise=None, image_size=None, adjoint: str = "exact"):
        if noise is not None and not callable(noise):
            raise RestoreError(f"noise must be a noise model such as GaussianNoise(0.05) or None, got {noise!r}.")
        self._check_adjoint(adjoint)
        self.noise = noise
        self.image_size = None if image_size is None else validate.require_size(image_size)
        self.adjoint = adjoint

    def A(self, x: torch.Tensor) -> torch.Tensor:
        """The noiseless measurement of x (B, C, H, W); differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must define A(x).")

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """The exact transpose, <A x, y> = <x, A_adjoint y>; differentiable itself."""
        self._check_linear("A_adjoint")
        return apply_transpose(self.A, y, self.image_shape(y))

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        """The pseudo-inverse: the smallest x among those that minimise ||A x - y||.

        Closed form where the class has one, else `least_squares` with its defaults.
        """
        self._check_linear("A_dagger")
        return proximal.least_squares(self, y)

    def prox_l2(self, z: torch.Tensor, y: torch.Tensor, gamma) -> torch.Tensor:
        """argmin_x gamma/2 ||A x - y||^2 + 1/2 ||x - z||^2, with z (B, C, H, W); deepinv's name and scaling.

        gamma: >= 0, one number or (B,). 0 gives z; infinity the point next to z that fits y best
        (in closed form only as well determined as the smallest singular values of A).
        Closed form through the singular values, in float64 where the device has it, where there is one
        (see `factors`); else conjugate gradients in z's dtype, from z, to the tolerance and the at most 200
        iterations of `least_squares`.
        """
        self._check_linear("prox_l2")
        return proximal.prox_l2(self, z, y, gamma)

    def regularised_inverse(self, v: torch.Tensor, r) -> torch.Tensor:
        """(A A^T + r I)^-1 v for v of a measurement's shape; r >= 0, one number or (B,).

        r = 0 is the pseudo-inverse of A A^T. Computed as `prox_l2` is.
        """
        self._check_linear("regularised_inverse")
        return proximal.regularised_inverse(self, v, r)

    def svd(self, image_shape: Sequence[int], dtype: torch.dtype = torch.float32, device="cpu"):
        """The singular value decomposition for images of image_shape (..., C, H, W): see `operators.spectral`.

        Its maps take any dtype and compute in `dtype`. `singular` has the shape (1 or B, C, H, W).
        Raises RestoreError where no closed form is known.
        """
        self._check_linear("svd")
        like = torch.empty(0, dtype=dtype, device=device)
        svd = self.cached_svd(image_shape, like, full=True)
        if svd is None:
            raise RestoreError(
                f"{self.name} has no closed-form singular value decomposition for images of shape "
                f"{tuple(image_shape)[-3:]}; use a sampler that does without, such as DPS or DiffPIR."
            )
        return dataclasses.replace(svd, singular=svd.singular.expand(-1, *tuple(image_shape)[-3:]))

    def factors(self, image_shape: Sequence[int]) -> separable.Factors | None:
        """Matrices (channels, rows, columns) whose Kronecker product is A for images (C, H, W), or None.

        In float64, None for the identity: see `separable.apply`.
        """
        return None

    def decompose(self, image_shape: Sequence[int], full: bool):
        """The SVD in float64 for images (C, H, W), with all of V or only with A's row space; None if unknown."""
        factors = self.factors(image_shape)
        return None if factors is None else spectral.kronecker(factors, full)

    def image_shape(self, y: torch.Tensor) -> tuple[int, ...]:
        """Shape (B, C, H, W) of the images whose measurement has the shape of y."""
        return (*y.shape[:2], *(self.image_size or y.shape[2:]))

    def with_adjoint(self, adjoint: str) -> Operator:
        """A copy with adjoint "exact" or "reference". Raises RestoreError where the operator has none."""
        if adjoint == self.adjoint:
            return self
        self._check_adjoint(adjoint)
        twin = copy.copy(self)
        twin.adjoint = adjoint
        twin.__dict__["_buffers"] = self.__dict__.setdefault("_buffers", {})  # no buffer depends on it
        return twin

    def __getitem__(self, rows) -> Operator:
        """The operator of these images of the batch: a list, tensor (repeats allowed) or slice of indices."""
        return self

    __iter__ = None  # indexing would make it an endless sequence

    def __call__(self, x: torch.Tensor, generator=None) -> torch.Tensor:
        """The measurement A(x) plus noise.

        generator: a torch.Generator, one per image of the batch (the noise of an image then depends
        on neither batch size nor order), or None for torch's global one.
        Raises RestoreError where x holds NaN or infinity.
        """
        validate.require_images(x)
        if not torch.isfinite(x).all():
            raise RestoreError("the image holds NaN or infinite pixels; expected finite values in [-1, 1].")
        y = self.A(x)
        return y if self.noise is None else self.noise(y, generator)

    def __matmul__(self, first: Operator) -> Operator:
        """(a @ b).A(x) = a.A(b.A(x)): b is applied first."""
        from operators.compose import Compose

        if not isinstance(first, Operator):
            return NotImplemented
        return Compose(first, self)

    def _check_adjoint(self, adjoint: str) -> None:
        if adjoint not in ("exact", "reference"):
            raise RestoreError(f"adjoint must be 'exact' or 'reference', got {adjoint!r}.")
        if adjoint == "reference" and not self.has_reference:
            raise RestoreError(f"the reference repositories have no {self.name}; use adjoint='exact'.")

    def _check_linear(self, what: str) -> None:
        if not self.linear:
            raise RestoreError(
                f"{self.name} is not linear, so it has no {what}; use a sampler that needs only A, such as DPS."
            )

    def _check_image(self, x: torch.Tensor, channels: int | None = None) -> None:
        validate.require_images(x, channels=channels)
        if self.image_size is not None and tuple(x.shape[2:]) != self.image_size:
            height, width = self.image_size
            raise RestoreError(
                f"the operator was built for images of {height} x {width} (height x width), but this one is "
                f"{x.shape[2]} x {x.shape[3]}; resize the image or build the operator with its image_size."
            )

    def cached_svd(self, image_shape: Sequence[int], like: torch.Tensor, full: bool = False):
        """`decompose`, kept in the dtype and on the device of `like`."""
        shape = tuple(image_shape)[-3:]
        return self._buffer(("svd", shape, full), lambda: self.decompose(shape, full), like)

    def _buffer(self, key: tuple, make: Callable, like: torch.Tensor):
        """A constant (tensor, SVD or None) in the dtype and on the device of `like`, made once for each of these."""
        cache = self.__dict__.setdefault("_buffers", {})
        key = (*key, like.dtype, like.device)
        try:
            return cache[key]
        except KeyError:  # not `key in cache`: another thread may clear it in between
            pass
        # a tensor made in inference mode could not be used in a later backward pass
        with torch.inference_mode(False), torch.no_grad():
            made = make()
            made = made if made is None else made.to(like.dtype).to(like.device)
            if isinstance(made, torch.Tensor) and made.is_inference():  # what a user gave was made there
                made = made.clone()
        if len(cache) >= CACHE_LIMIT:
            cache.clear()
        cache[key] = made
        return made

    def __repr__(self) -> str:
        """Class and settings, arrays by shape and hash: two operators that print alike compute alike."""
        names = [name for name in vars(self) if not name.startswith("_") and name not in self.derived]
        return f"{type(self).__name__}({', '.join(f'{name}={_shown(getattr(self, name))}' for name in names)})"

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_buffers"}


def _shown(value) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value)
        return f"<{'x'.join(map(str, array.shape))} {hashlib.sha256(array.tobytes()).hexdigest()[:12]}>"
    return repr(value)


def apply_transpose(A: Callable, y: torch.Tensor, image_shape: Sequence[int]) -> torch.Tensor:
    """A^T y of a linear map by automatic differentiation, differentiable with respect to y.

    image_shape: (B, C, H, W) of A's argument. The vector-Jacobian product of a linear map does not
    depend on the point it is taken at, so it is taken at zero.
    Raises RestoreError where A of that shape does not have the shape of y.
    """
    differentiable = torch.is_grad_enabled() and y.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        if y.is_inference():
            y = y.clone()
        x = torch.zeros(tuple(image_shape), dtype=y.dtype, device=y.device, requires_grad=True)
        measured = A(x)
        if measured.shape != y.shape:
            raise RestoreError(
                f"a measurement of shape {tuple(y.shape)} does not fit: images of shape {tuple(x.shape)} give "
                f"{tuple(measured.shape)}; build the operator with the image_size of the original."
            )
        (product,) = torch.autograd.grad(measured, x, y, create_graph=differentiable)
    return product if differentiable else product.detach()


def check_operator(operator, shape: Sequence[int], *, dtype=torch.float64, device="cpu", seed: int = 0) -> float:
    """Relative adjoint error |<A x, y> - <x, A^T y>| / (||A x|| ||y||) for random x and y.

    operator: anything with `A` and `A_adjoint`. shape: (B, C, H, W) of x. About 1e-16 in float64 and
    1e-7 in float32 for a correct pair; of order 0.1 for a wrong one.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype).to(device)
    measured = operator.A(x)
    y = torch.randn(measured.shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
    back = operator.A_adjoint(y)
    if back.shape != x.shape:
        raise RestoreError(f"A_adjoint returned shape {tuple(back.shape)}, but x has {tuple(x.shape)}.")
    left, right = (measured * y).double().sum(), (x * back).double().sum()
    return ((left - right).abs() / (measured.double().norm() * y.double().norm())).item()
