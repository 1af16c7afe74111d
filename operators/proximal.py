"""Least squares, proximal steps and regularised inverses: in closed form through an SVD, or by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch

from operators import separable, validate
from operators.errors import RestoreError

MAX_ITERATIONS = 200
# What a step of a sampler needs of conjugate gradients. Motion deblurring of 16 held-out faces, 50 steps of DiffPIR:
# 29.01 dB with these and with (1e-5, 200), LPIPS the same to 0.0002, in half the time of the whole.
ROUGH = (1e-2, 12)


def least_squares(
    operator, y: torch.Tensor, *, damping=0.0, tolerance: float | None = None, max_iterations: int = MAX_ITERATIONS
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
    validate.require_images(y, "the measurement")
    if not torch.isfinite(y).all():
        raise RestoreError("the measurement holds NaN or infinite values, so it has no least-squares solution.")
    damping = validate.require_per_image(damping, "damping", y)
    exact = exact_transpose(operator)
    v = y.to(separable.compute_dtype(y))
    return _cgls(exact.A, exact.A_adjoint, v, None, damping, tolerance, max_iterations).to(y.dtype)


def prox_l2(operator, z: torch.Tensor, y: torch.Tensor, gamma, rough: bool = False) -> torch.Tensor:
    """argmin_x gamma/2 ||A x - y||^2 + 1/2 ||x - z||^2: see `Operator.prox_l2`.

    operator: an Operator with a closed form, or anything with `A` and `A_adjoint`. rough: see operators.prox_l2.
    """
    gamma = validate.require_per_image(gamma, "gamma", z)
    exact = exact_transpose(operator)
    wide = _wide(z)
    svd = _thin_svd(exact, z.shape, wide)
    if svd is not None:
        x = z.to(wide.dtype)
        weights = svd.singular * _inverse(svd.singular, _beside(1 / gamma, x))
        return (x + svd.V(weights * svd.U_adjoint(y.to(wide.dtype) - exact.A(x)))).to(z.dtype)
    # the correction d = x - z is least squares with damping 1 / gamma; it is 0 where gamma is 0
    x = z.to(separable.compute_dtype(z))
    known = gamma > 0
    damping = torch.where(known, 1 / gamma, 1.0)
    residual = y.to(x.dtype) - exact.A(x)
    d = _cgls(exact.A, exact.A_adjoint, residual, None, damping, *(ROUGH if rough else (None, MAX_ITERATIONS)))
    return (x + torch.where(_beside(known, x), d, 0.0)).to(z.dtype)


def regularised_inverse(operator, v: torch.Tensor, r) -> torch.Tensor:
    """(A A^T + r I)^-1 v: see `Operator.regularised_inverse`.

    operator: an Operator with a closed form, or anything with `A` and `A_adjoint`.
    """
    r = validate.require_per_image(r, "r", v)
    exact = exact_transpose(operator)
    wide = _wide(v)
    shape = exact.image_shape(v) if hasattr(exact, "image_shape") else None
    svd = _thin_svd(exact, shape, wide)
    if svd is not None:
        u = v.to(wide.dtype)
        c = svd.U_adjoint(u)
        return (svd.U(_inverse(svd.singular, _beside(r, u)) * c)).to(v.dtype)
    u = v.to(separable.compute_dtype(v))
    # with B = A^T: (B^T B + r) u = v
    return _cgls(exact.A_adjoint, exact.A, None, u, r, None, MAX_ITERATIONS).to(v.dtype)


def exact_transpose(operator):
    """`operator` with its exact transpose: conjugate gradients diverge with any other."""
    return operator.with_adjoint("exact") if getattr(operator, "adjoint", "exact") == "reference" else operator


def _cgls(B: Callable, B_adjoint: Callable, y, plus, damping, tolerance, max_iterations: int) -> torch.Tensor:
    """Solves (B^T B + damping) x = B^T y + plus per image by CGLS from 0, as `least_squares` describes.

    y, plus: None is zero, one of them is given. damping: (B,) or (1,).
    """
    start = y if plus is None else plus
    tolerance = (1e-10 if start.dtype == torch.float64 else 1e-5) if tolerance is None else tolerance
    damping = damping.to(start.dtype).to(start.device)

    def energy(v):
        return v.flatten(1).square().sum(dim=1)

    gradient = direction = B_adjoint(y) if plus is None else plus
    residual = y if plus is None else 0.0
    x = torch.zeros_like(gradient)
    gamma = energy(gradient)
    threshold = tolerance**2 * gamma
    active = gamma > threshold
    for _ in range(validate.require_integer(max_iterations, "max_iterations")):
        if not active.any():
            break
        measured = B(direction)
        curvature = energy(measured) + damping * energy(direction)
        active = active & (curvature > 0)
        step = torch.where(active, gamma / curvature.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
        x = x + _beside(step, x) * direction
        residual = residual - _beside(step, measured) * measured
        gradient = B_adjoint(residual) - _beside(damping, x) * x
        if plus is not None:
            gradient = gradient + plus
        previous, gamma = gamma, energy(gradient)
        active = active & (gamma > threshold)
        direction = gradient + _beside(torch.where(active, gamma / previous, 0.0), x) * direction
    return x


def _thin_svd(operator, shape, like: torch.Tensor):
    return None if shape is None or not hasattr(operator, "cached_svd") else operator.cached_svd(shape, like)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """float64 where the device has it: a large gamma magnifies rounding by up to sqrt(gamma)."""
    return torch.empty(0, dtype=torch.float32 if x.device.type == "mps" else torch.float64, device=x.device)


def _beside(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """values (B,) or (1,) so that they multiply the images of x, on its device; floating ones in its dtype."""
    values = values.to(x.dtype) if values.is_floating_point() else values
    return values.to(x.device).view(-1, *[1] * (x.ndim - 1))


def _inverse(singular: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """1 / (s^2 + r), and 0 where both are 0: the pseudo-inverse."""
    total = singular.square() + r
    return torch.where(total > 0, 1 / total.where(total > 0, 1.0), 0.0)
