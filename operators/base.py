"""What every degradation promises: A, its transpose, its pseudo-inverse, and noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from operators import validate
from operators.errors import RestoreError

CACHE_LIMIT = 32  # buffers kept per operator; one per (size, dtype, device) in use


class Operator:
    """A linear degradation y = A(x) + n of images x (B, C, H, W) in [-1, 1].

    A new operator writes `A` alone: `A_adjoint` is derived from it by automatic differentiation and
    `A_dagger` by conjugate gradients. `A` must be linear (no constant term), work for any batch, and
    treat the images of a batch independently. Override `image_shape` if `A` changes an image's shape.

    noise: a noise model (`GaussianNoise`, `PoissonNoise`) or None.
    image_size: (H, W) of x, for operators where the size of y does not determine it. Where it is
        given, images of another size are refused.
    adjoint: "exact", or "reference" for the approximate "transpose" of the DPS and PSLD repositories
        (only to reproduce their numbers).
    """

    derived: tuple[str, ...] = ()  # attributes computed from the others, left out of the printed form
    name = "operator"  # by which presets are chosen: the class's name in configs
    noise = None
    image_size: tuple[int, int] | None = None
    adjoint = "exact"

    def __init__(self, *, noise=None, image_size=None, adjoint: str = "exact"):
        if noise is not None and not callable(noise):
            raise RestoreError(f"noise must be a noise model such as GaussianNoise(0.05) or None, got {noise!r}.")
        if adjoint not in ("exact", "reference"):
            raise RestoreError(f"adjoint must be 'exact' or 'reference', got {adjoint!r}.")
        self.noise = noise
        self.image_size = None if image_size is None else validate.size_pair(image_size)
        self.adjoint = adjoint

    def A(self, x: torch.Tensor) -> torch.Tensor:
        """The noiseless measurement of x (B, C, H, W); differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must define A(x).")

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """The exact transpose, <A x, y> = <x, A_adjoint y>; differentiable itself."""
        return transpose(self.A, y, self.image_shape(y))

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        """The pseudo-inverse: the smallest x among those that minimise ||A x - y||.

        Closed form where the class has one, else `least_squares` with its defaults.
        """
        return least_squares(self, y)

    def image_shape(self, y: torch.Tensor) -> tuple[int, ...]:
        """Shape (B, C, H, W) of the images whose measurement has the shape of y."""
        return (*y.shape[:2], *(self.image_size or y.shape[2:]))

    def __call__(self, x: torch.Tensor, generator=None) -> torch.Tensor:
        """The measurement A(x) plus noise.

        generator: a torch.Generator, one per image of the batch (the noise of an image then depends
        on neither batch size nor order), or None for torch's global one.
        Raises RestoreError where x holds NaN or infinity.
        """
        validate.images(x)
        if not torch.isfinite(x).all():
            raise RestoreError("the image holds NaN or infinite pixels; expected finite values in [-1, 1].")
        y = self.A(x)
        return y if self.noise is None else self.noise(y, generator)

    def __matmul__(self, first: Operator) -> Compose:
        """(a @ b).A(x) = a.A(b.A(x)): b is applied first."""
        if not isinstance(first, Operator):
            return NotImplemented
        return Compose(first, self)

    def _check_image(self, x: torch.Tensor, channels: int | None = None) -> None:
        validate.images(x, channels=channels)
        if self.image_size is not None and tuple(x.shape[2:]) != self.image_size:
            height, width = self.image_size
            raise RestoreError(
                f"the operator was built for images of {height} x {width} (height x width), but this one is "
                f"{x.shape[2]} x {x.shape[3]}; resize the image or build the operator with its image_size."
            )

    def _buffer(self, key: tuple, make: Callable[[], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """A constant tensor in the dtype and on the device of `like`, made once for each of these."""
        cache = self.__dict__.setdefault("_buffers", {})
        key = (*key, like.dtype, like.device)
        if key not in cache:
            if len(cache) >= CACHE_LIMIT:
                cache.clear()
            # a tensor made in inference mode could not be used in a later backward pass
            with torch.inference_mode(False), torch.no_grad():
                cache[key] = make().to(like.dtype).to(like.device)
        return cache[key]

    def __repr__(self) -> str:
        """Class and settings, arrays by shape and hash: two operators that print alike compute alike."""
        names = [name for name in vars(self) if not name.startswith("_") and name not in self.derived]
        return f"{type(self).__name__}({', '.join(f'{name}={_shown(getattr(self, name))}' for name in names)})"

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_buffers"}


class Compose(Operator):
    """Operators one after the other: Compose(a, b).A(x) = b.A(a.A(x)), the same as `b @ a`.

    The noise is that of the last operator unless `noise` is given. Raises RestoreError where an
    earlier operator carries noise: noise in the middle of a chain would be degraded itself.
    """

    name = "compose"

    def __init__(self, *operators: Operator, noise=None, image_size=None):
        if not operators or not all(isinstance(operator, Operator) for operator in operators):
            raise RestoreError("Compose needs at least one Operator; wrap other objects with as_operator first.")
        if any(operator.noise is not None for operator in operators[:-1]):
            raise RestoreError("only the last operator of a composition can carry noise; remove it from the others.")
        exact = all(operator.adjoint == "exact" for operator in operators)
        super().__init__(
            noise=operators[-1].noise if noise is None else noise,
            image_size=operators[0].image_size if image_size is None else image_size,
            adjoint="exact" if exact else "reference",
        )
        self.operators = operators

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self._check_image(x)
        for operator in self.operators:
            x = operator.A(x)
        return x

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        for operator in reversed(self.operators):
            y = operator.A_adjoint(y)
        return y

    def image_shape(self, y: torch.Tensor) -> tuple[int, ...]:
        for operator in reversed(self.operators):
            y = torch.empty(operator.image_shape(y), device="meta")
        return tuple(y.shape)


def _shown(value) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value)
        return f"<{'x'.join(map(str, array.shape))} {hashlib.sha256(array.tobytes()).hexdigest()[:12]}>"
    return repr(value)


def transpose(A: Callable, y: torch.Tensor, image_shape: Sequence[int]) -> torch.Tensor:
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


def least_squares(
    operator, y: torch.Tensor, *, damping: float = 0.0, tolerance: float | None = None, max_iterations: int = 200
) -> torch.Tensor:
    """argmin_x ||A x - y||^2 + damping ||x||^2 per image, by conjugate gradients (CGLS) from x = 0.

    Björck, Numerical Methods for Least Squares Problems (1996), Alg. 7.4.1. Started at zero, the
    iterates stay in the row space of A, so that with damping = 0 they converge to the pseudo-inverse.

    Each image stops by itself as soon as ||A^T(y - A x) - damping x|| <= tolerance ||A^T y||, at the
    latest after max_iterations. tolerance defaults to 1e-5 in float32 and 1e-10 in float64. For an
    ill-conditioned A (a blur) max_iterations is the regularisation: components with small singular
    values come last. With noisy y prefer damping = (noise std / signal std)^2 per pixel, which is the
    Wiener (posterior mean) solution for white x and white noise.

    operator: anything with `A` and `A_adjoint`. float16 and bfloat16 are computed in float32.
    Raises RestoreError where y is not finite or an option makes no sense.
    """
    validate.images(y, "the measurement")
    if not torch.isfinite(y).all():
        raise RestoreError("the measurement holds NaN or infinite values, so it has no least-squares solution.")
    damping = validate.number(damping, "damping", low=0.0)
    dtype = compute_dtype(y)
    tolerance = (1e-10 if dtype == torch.float64 else 1e-5) if tolerance is None else tolerance
    adjoint = operator.A_adjoint
    if getattr(operator, "adjoint", "exact") == "reference":
        # conjugate gradients diverge unless the transpose is exact
        def adjoint(v):
            return transpose(operator.A, v, operator.image_shape(v))

    def energy(v):
        return v.square().sum(dim=(1, 2, 3), keepdim=True)

    residual = y.to(dtype)
    gradient = direction = adjoint(residual)
    x = torch.zeros_like(gradient)
    gamma = energy(gradient)
    threshold = tolerance**2 * gamma
    active = gamma > threshold
    for _ in range(validate.integer(max_iterations, "max_iterations")):
        if not active.any():
            break
        measured = operator.A(direction)
        curvature = energy(measured) + damping * energy(direction)
        active = active & (curvature > 0)
        step = torch.where(active, gamma / curvature.clamp_min(torch.finfo(dtype).tiny), 0.0)
        x = x + step * direction
        residual = residual - step * measured
        gradient = adjoint(residual) - damping * x
        previous, gamma = gamma, energy(gradient)
        active = active & (gamma > threshold)
        direction = gradient + torch.where(active, gamma / previous, 0.0) * direction
    return x.to(y.dtype)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Half precision images are measured in float32: a data term rounded to 8 bits is useless."""
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def check(operator, shape: Sequence[int], *, dtype=torch.float64, device="cpu", seed: int = 0) -> float:
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
