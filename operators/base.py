"""The contract of a degradation: A, its transpose, several inverses, and noise."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from operators import proximal, spectral, validate
from operators.errors import RestoreError
from operators.separable import Kronecker, compute_dtype

CACHE_LIMIT = 32  # buffers kept per operator; one per (size, dtype, device) in use
# Of the largest: what nearly vanishes in the middle is not inverted, or the few iterations of a step follow noise and
# border. DiffPIR, 20 steps, motion of 25 pixels with an unknown border: 22.3 dB at a sigma of 0.005, 20.2 without
# it (three shipped faces; at 0.05 both have 20.0); DPIR, sigma 0.004: 31.3 and 31.1 (three shipped photos).
LEAST_POWER = 1e-3


class Operator:
    """A degradation y = A(x) + n of images x (B, C, H, W) in [-1, 1], linear unless its class sets `linear = False`.

    A new operator implements only `A`: `A_adjoint` is derived from it by automatic differentiation, `A_dagger`,
    `prox_l2` and `regularised_inverse` by conjugate gradients. `A` must accept any batch, treat the images of a
    batch independently and, if linear, have no constant term. Override `image_shape` if `A` changes an image's
    shape, and `factors` if A is a matrix per axis: `prox_l2`, `regularised_inverse` and `svd` then have closed forms.

    On a nonlinear operator, everything that needs a transpose raises RestoreError.

    noise: a noise model (`GaussianNoise`, `PoissonNoise`) or None.
    image_size: (H, W) of x, if the size of y does not determine it. Images of another size are then refused.
    adjoint: "exact", or "reference" for the approximate "transpose" of the DPS and PSLD repositories, to reproduce
        their numbers.
    """

    name = "operator"  # by which presets are chosen: the class's name in configs
    linear = True
    has_reference = False  # whether adjoint="reference" exists
    margin = (0, 0)  # rows and columns at each side of an image that lie outside of what y shows, see `Blur`
    stationary = False  # whether A commutes with shifts (of y's pixels), but for its border
    enlarges = False  # whether an image has `factor`, an option, times the sides of what y shows
    derived: tuple[str, ...] = ()  # attributes computed from the others, left out of the repr
    noise = None
    image_size: tuple[int, int] | None = None
    adjoint = "exact"

    def __init__(self, *, noise=None, image_size=None, adjoint: str = "exact"):
        if noise is not None and not callable(noise):
            raise RestoreError(f"noise must be a noise model or None, got {noise!r}; try GaussianNoise(0.05)")
        self._check_adjoint(adjoint)
        self.noise = noise
        self.image_size = None if image_size is None else validate.require_size(image_size)
        self.adjoint = adjoint

    def A(self, x: torch.Tensor) -> torch.Tensor:
        """Return the noiseless measurement of x (B, C, H, W); differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must define A(x)")

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """Apply the exact transpose, <A x, y> = <x, A_adjoint y>; differentiable itself."""
        self._check_linear("A_adjoint")
        return apply_transpose(self.A, y, self.image_shape(y))

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        """Apply the pseudo-inverse, the smallest x among those that minimise ||A x - y||: in closed form if the class
        has one, else by `least_squares` with its defaults."""
        self._check_linear("A_dagger")
        return proximal.least_squares(self, y)

    def prox_l2(self, z: torch.Tensor, y: torch.Tensor, gamma) -> torch.Tensor:
        """Return argmin_x gamma/2 ||A x - y||^2 + 1/2 ||x - z||^2, z (B, C, H, W); deepinv's name and scaling.

        gamma: >= 0, one number or (B,). 0 gives z; infinity the point next to z that fits y best (in closed
            form only as well determined as the smallest singular values of A).

        Closed form through the singular values (see `factors`) in float64, or float32 on a device without it; else
        conjugate gradients in z's dtype, from z, with the defaults of `least_squares`.
        """
        self._check_linear("prox_l2")
        return proximal.prox_l2(self, z, y, gamma)

    def regularised_inverse(self, v: torch.Tensor, r) -> torch.Tensor:
        """Return (A A^T + r I)^-1 v (r = 0: the pseudo-inverse) for v of a measurement's shape; r >= 0, one number or
        (B,). Computed as `prox_l2` is."""
        self._check_linear("regularised_inverse")
        return proximal.regularised_inverse(self, v, r)

    def svd(self, image_shape: Sequence[int], dtype: torch.dtype = torch.float32, device="cpu"):
        """Return the singular value decomposition for images (..., C, H, W): see `operators.spectral`.

        Its maps take any dtype and compute in `dtype`. `singular` has the shape (1 or B, C, H, W).
        Raises RestoreError if no closed form is known.
        """
        self._check_linear("svd")
        shape = tuple(image_shape)[-3:]
        svd = self.cached_svd(shape, dtype, torch.device(device), full=True)
        if svd is None:
            raise RestoreError(f"{self.name} has no closed-form singular value decomposition for {shape}; try DPS")
        return dataclasses.replace(svd, singular=svd.singular.expand(-1, *shape))

    def factors(self, image_shape: Sequence[int]) -> Sequence[torch.Tensor | None] | None:
        """Return float64 matrices (channels, rows, columns), None for the identity, whose Kronecker product is A for
        images (C, H, W); None if A is no such product."""
        return None

    def decompose(self, image_shape: Sequence[int], full: bool):
        """Return the SVD in float64 for images (C, H, W), with all of V or only A's row space; None if unknown."""
        factors = self.factors(image_shape)
        return None if factors is None else spectral.decompose_kronecker(Kronecker(*factors), full)

    def approximate_inverse(self, y: torch.Tensor) -> Callable | None:
        """Return a function (v, r) that approximates (A A^T + r I)^-1 v for v like y, or None: a preconditioner.

        A A^T of a stationary operator is nearly circulant, and exactly in the middle: with the same response to a point
        everywhere it is inverted by FFT (T. Chan 1988).
        """
        if not self.stationary:
            return None
        power = torch.fft.rfft2(self.respond(y)).real.clamp_min(0.0)
        least = LEAST_POWER * power.amax()

        def apply(v, r):
            return torch.fft.irfft2(torch.fft.rfft2(v) / torch.maximum(power + r, least), s=v.shape[-2:])

        return apply

    def respond(self, y: torch.Tensor) -> torch.Tensor:
        """Return A A^T of a point in the middle of every channel of measurements like y, moved to pixel (0, 0)."""

        def make():
            rows, columns = y.shape[2] // 2, y.shape[3] // 2
            point = torch.zeros(y.shape, dtype=compute_dtype(y), device=y.device)
            point[..., rows, columns] = 1.0
            return self.A(self.A_adjoint(point)).roll((-rows, -columns), (-2, -1))

        return self._buffer(("response", tuple(y.shape)), make, compute_dtype(y), y.device)

    def image_shape(self, y: torch.Tensor) -> tuple[int, ...]:
        """Return the shape (B, C, H, W) of the images whose measurement has the shape of y."""
        return (*y.shape[:2], *(self.image_size or y.shape[2:]))

    def with_adjoint(self, adjoint: str) -> Operator:
        """Return a copy with adjoint "exact" or "reference". Raises RestoreError if there is no such adjoint."""
        if adjoint == self.adjoint:
            return self
        self._check_adjoint(adjoint)
        twin = self._with(adjoint=adjoint)
        twin.__dict__["_buffers"] = self.__dict__.setdefault("_buffers", {})  # no buffer depends on it
        return twin

    def __getitem__(self, rows) -> Operator:
        """Return the operator of these images of the batch: a list, tensor (repeats allowed) or slice of indices."""
        return self

    __iter__ = None  # indexing would make it an endless sequence

    def __call__(self, x: torch.Tensor, generator=None) -> torch.Tensor:
        """Return the measurement A(x) plus noise.

        generator: a torch.Generator, a list of one per image (whose noise then depends on neither batch size nor
            order), or None for torch's global one.
        Raises RestoreError if x holds NaN or infinity.
        """
        validate.require_images(x)
        if not torch.isfinite(x).all():
            raise RestoreError("x must hold finite values in [-1, 1], got NaN or infinite pixels")
        y = self.A(x)
        return y if self.noise is None else self.noise(y, generator)

    def __matmul__(self, first: Operator) -> Operator:
        """(a @ b).A(x) = a.A(b.A(x)): b is applied first."""
        from operators.compose import Compose

        return Compose(first, self) if isinstance(first, Operator) else NotImplemented

    def _check_adjoint(self, adjoint: str) -> None:
        validate.require_choice(adjoint, "adjoint", ("exact", "reference"))
        if adjoint == "reference" and not self.has_reference:
            raise RestoreError(f"adjoint must be 'exact' for {self.name}, which has no reference transpose")

    def _check_linear(self, what: str) -> None:
        if not self.linear:
            raise RestoreError(f"{self.name} is not linear and has no {what}; try a sampler without it, such as DPS")

    def _check_image(self, x: torch.Tensor, channels: int | None = None) -> None:
        validate.require_images(x, channels=channels)
        if self.image_size is not None and tuple(x.shape[2:]) != self.image_size:
            height, width = self.image_size
            size = f"{x.shape[2]} x {x.shape[3]}"
            raise RestoreError(f"image must be {height} x {width} (height x width) for this {self.name}, got {size}")

    def cached_svd(self, image_shape: Sequence[int], dtype: torch.dtype, device: torch.device, full: bool = False):
        """Return `decompose` for images (C, H, W) in this dtype and on this device, computed once."""
        return self._buffer(("svd", image_shape, full), lambda: self.decompose(image_shape, full), dtype, device)

    def _cached_factors(self, image_shape: Sequence[int], x: torch.Tensor) -> Kronecker:
        """`factors` for images of this shape, in the dtype to compute x in."""
        shape = tuple(image_shape)[-3:]
        return self._buffer(("factors", shape), lambda: Kronecker(*self.factors(shape)), compute_dtype(x), x.device)

    def _buffer(self, key: tuple, make: Callable, dtype: torch.dtype, device: torch.device):
        """Return the constant make() (None or anything with `to`) in this dtype and on this device, made once."""
        cache = self.__dict__.setdefault("_buffers", {})
        # a tensor's version counts its changes in place
        versions = (v._version for v in vars(self).values() if isinstance(v, torch.Tensor) and not v.is_inference())
        key = (*key, dtype, device, *versions)
        try:
            return cache[key]
        except KeyError:  # not `key in cache`: another thread may clear it in between
            pass
        # a tensor made in inference mode could not be used in a later backward pass
        with torch.inference_mode(False), torch.no_grad():
            value = make()
            value = value if value is None else value.to(dtype).to(device)
            if isinstance(value, torch.Tensor) and value.is_inference():  # given by the user, who made it there
                value = value.clone()
        if len(cache) >= CACHE_LIMIT:
            cache.clear()
        cache[key] = value
        return value

    def _with(self, **attributes) -> Operator:
        """Return a copy with these attributes and no buffers."""
        twin = copy.copy(self)
        vars(twin).update(attributes)
        return twin

    def __setattr__(self, name: str, value) -> None:
        """Set an attribute and forget what was computed from the old one. Raises RestoreError if other attributes were
        (a kernel's weights from its size, say)."""
        made = bool(self.derived) and all(known in self.__dict__ for known in self.derived)
        if made and name in self.__dict__ and not name.startswith("_") and name not in ("noise", "name"):
            kind = type(self).__name__
            raise RestoreError(f"{name} of a {kind} must stay as it was made; try another {kind}({name}=...)")
        object.__setattr__(self, name, value)
        if name != "noise":
            self.__dict__.pop("_buffers", None)

    def __repr__(self) -> str:
        """Return class and settings, arrays by shape and hash: operators with the same repr compute the same."""
        names = [name for name in vars(self) if not name.startswith("_") and name not in self.derived]
        return f"{type(self).__name__}({', '.join(f'{name}={_format(getattr(self, name))}' for name in names)})"

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_buffers"}


def _format(value) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = np.ascontiguousarray(
            value.detach().cpu().resolve_conj().resolve_neg().numpy() if isinstance(value, torch.Tensor) else value
        )
        return f"<{'x'.join(map(str, array.shape))} {hashlib.sha256(array.tobytes()).hexdigest()[:12]}>"
    return repr(value) if not hasattr(value, "A") or isinstance(value, Operator) else describe_object(value)


def describe_object(value) -> str:
    """Return class and settings of another library's operator, its parts' too, arrays by shape and hash."""
    settings = {}
    for part, owner in value.named_modules() if isinstance(value, torch.nn.Module) else [("", value)]:
        tensors = {**owner._buffers, **owner._parameters} if isinstance(owner, torch.nn.Module) else {}
        for name, item in {**vars(owner), **tensors}.items():
            plain = isinstance(item, (bool, int, float, str, tuple, list, torch.Tensor, np.ndarray))
            if plain and not name.startswith("_") and name != "training":
                settings[f"{part}.{name}".strip(".")] = _format(item)
    return f"{type(value).__name__}({', '.join(f'{name}={text}' for name, text in settings.items())})"


def apply_transpose(A: Callable, y: torch.Tensor, image_shape: Sequence[int]) -> torch.Tensor:
    """Return A^T y of a linear map by automatic differentiation, differentiable with respect to y.

    image_shape: (B, C, H, W) of A's argument. The vector-Jacobian product of a linear map is the same at every point.
    Raises RestoreError if A of an image of that shape does not have the shape of y.
    """
    differentiable = torch.is_grad_enabled() and y.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        if y.is_inference():
            y = y.clone()
        x = torch.zeros(tuple(image_shape), dtype=y.dtype, device=y.device, requires_grad=True)
        measured = A(x)
        if measured.shape != y.shape:
            expected, given = tuple(measured.shape), tuple(y.shape)
            raise RestoreError(f"y must have the shape {expected}, got {given}; try the image_size of the original")
        (product,) = torch.autograd.grad(measured, x, y, create_graph=differentiable)
    return product if differentiable else product.detach()


def check_operator(operator, shape: Sequence[int], *, dtype=torch.float64, device="cpu", seed: int = 0) -> float:
    """Return the relative adjoint error |<A x, y> - <x, A^T y>| / (||A x|| ||y||) for random x and y.

    operator: anything with `A` and `A_adjoint`. shape: (B, C, H, W) of x. A correct pair has about 1e-16 in float64 and
    1e-7 in float32, a wrong one about 0.1.
    Raises RestoreError if A_adjoint does not return the shape of x.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype).to(device)
    measured = operator.A(x)
    y = torch.randn(measured.shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
    back = operator.A_adjoint(y)
    if back.shape != x.shape:
        raise RestoreError(f"A_adjoint must return the shape {tuple(x.shape)} of x, got {tuple(back.shape)}")
    left, right = (measured * y).double().sum(), (x * back).double().sum()
    return ((left - right).abs() / (measured.double().norm() * y.double().norm())).item()
