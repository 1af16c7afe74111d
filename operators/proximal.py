"""Least squares, proximal steps and regularised inverses: in closed form through an SVD, or by conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from operators import validate
from operators.device import is_on_host
from operators.errors import RestoreError
from operators.separable import compute_dtype

MAX_ITERATIONS = 200
# Tolerance and iterations of conjugate gradients that a step of a sampler needs. Motion deblurring of 16 held-out
# faces, 50 steps of DiffPIR: 29.01 dB with these and with (1e-5, 200), the same LPIPS to 0.0002, in half the time.
ROUGH = (1e-2, 12)
ASK_EVERY = 25  # iterations after which an accelerator is asked again whether all images are done


def least_squares(
    operator, y: torch.Tensor, *, damping=0.0, tolerance: float | None = None, max_iterations: int = MAX_ITERATIONS
) -> torch.Tensor:
    """Return argmin_x ||A x - y||^2 + damping ||x||^2 per image, by conjugate gradients (CGLS) from x = 0.

    Björck, Numerical Methods for Least Squares Problems (1996), Alg. 7.4.1. The iterates stay in the row space of A,
    so that with damping = 0 they converge to the pseudo-inverse. With noisy y prefer damping = (noise std / signal
    std)^2 per pixel, the Wiener (posterior mean) solution for white x and white noise.

    operator: anything with `A` and `A_adjoint`. float16 and bfloat16 are computed in float32.
    tolerance, max_iterations: each image stops independently as soon as ||A^T(y - A x) - damping x|| <= tolerance
        ||A^T y||, by default 1e-5 in float32 and 1e-10 in float64. For an ill-conditioned A (a blur) max_iterations is
        the regularisation: components with small singular values come last.
    Raises RestoreError if y is not finite or an option is invalid.
    """
    validate.require_images(y, "y")
    if not torch.isfinite(y).all():
        raise RestoreError("y must hold finite values, got NaN or infinity")
    damping = validate.require_per_image(damping, "damping", y)
    exact = use_exact_adjoint(operator)
    v = y.to(compute_dtype(y))
    return _cgls(exact.A, exact.A_adjoint, v, None, damping, tolerance, max_iterations).to(y.dtype)


def prox_l2(operator, z: torch.Tensor, y: torch.Tensor, gamma, rough: bool = False) -> torch.Tensor:
    """See `operators.prox_l2`; operator: an Operator with a closed form, or anything with `A` and `A_adjoint`."""
    gamma = validate.require_per_image(gamma, "gamma", z)
    exact = use_exact_adjoint(operator)
    coloured = getattr(getattr(exact, "noise", None), "prox_l2", None)
    if coloured is not None:  # noise that is not white has its own norm
        return coloured(exact, z, y, gamma, rough)
    svd = _find_svd(exact, z.shape, z)
    if svd is not None:
        x = z.to(svd.singular.dtype)
        weights = svd.singular * _invert(svd.singular, as_factors(1 / gamma, x))
        return (x + svd.V(weights * svd.U_adjoint(y.to(x.dtype) - exact.A(x)))).to(z.dtype)
    # the correction d = x - z is least squares with damping 1 / gamma; it is 0 where gamma is 0
    x = z.to(compute_dtype(z))
    known = gamma > 0
    damping = torch.where(known, 1 / gamma, 1.0)
    residual = y.to(x.dtype) - exact.A(x)
    limits = ROUGH if rough else (None, MAX_ITERATIONS)
    inverse = _find_preconditioner(exact, residual)
    if inverse is None:
        d = _cgls(exact.A, exact.A_adjoint, residual, None, damping, *limits)
    else:  # d = A^T (A A^T + 1 / gamma)^-1 residual
        d = exact.A_adjoint(_invert_damped(exact, inverse, residual, damping, *limits))
    return (x + (d if known.all() else torch.where(as_factors(known, x), d, 0.0))).to(z.dtype)


def regularised_inverse(operator, v: torch.Tensor, r) -> torch.Tensor:
    """See `Operator.regularised_inverse`; operator: as in `prox_l2`."""
    r = validate.require_per_image(r, "r", v)
    exact = use_exact_adjoint(operator)
    svd = _find_svd(exact, exact.image_shape(v), v) if hasattr(exact, "image_shape") else None
    if svd is not None:
        u = v.to(svd.singular.dtype)
        c = svd.U_adjoint(u)
        return (svd.U(_invert(svd.singular, as_factors(r, u)) * c)).to(v.dtype)
    u = v.to(compute_dtype(v))
    inverse = _find_preconditioner(exact, u)
    if inverse is not None:
        return _invert_damped(exact, inverse, u, r, None, MAX_ITERATIONS).to(v.dtype)
    # with B = A^T: (B^T B + r) u = v
    return _cgls(exact.A_adjoint, exact.A, None, u, r, None, MAX_ITERATIONS).to(v.dtype)


def use_exact_adjoint(operator):
    """Return `operator` with its exact transpose: conjugate gradients diverge with any other."""
    return operator.with_adjoint("exact") if getattr(operator, "adjoint", "exact") == "reference" else operator


def _cgls(B: Callable, B_adjoint: Callable, y, plus, damping, tolerance, max_iterations: int) -> torch.Tensor:
    """Solve (B^T B + damping) x = B^T y + plus per image by CGLS from 0, as `least_squares` describes.

    y, plus: exactly one of them is given, the other is None (zero). damping: (B,) or (1,).
    """
    start = y if plus is None else plus
    tolerance = (1e-10 if start.dtype == torch.float64 else 1e-5) if tolerance is None else tolerance
    max_iterations = validate.require_integer(max_iterations, "max_iterations")
    asks = _plan_questions(start, _expect_iterations(damping, tolerance), max_iterations)
    damping = as_factors(damping, start).flatten()

    def energy(v):
        return v.flatten(1).square().sum(dim=1)

    gradient = direction = B_adjoint(y) if plus is None else plus
    residual = y if plus is None else 0.0
    x = torch.zeros_like(gradient)
    gamma = energy(gradient)
    threshold, zero = tolerance**2 * gamma, torch.zeros_like(gamma)
    active = gamma > threshold
    for i in range(max_iterations):
        if i in asks and not active.any():
            break
        measured = B(direction)
        curvature = energy(measured) + damping * energy(direction)
        active = active & (curvature > 0)
        step = torch.where(active, gamma / curvature.clamp_min(torch.finfo(x.dtype).tiny), zero)
        x = x + as_factors(step, x) * direction
        residual = residual - as_factors(step, measured) * measured
        gradient = B_adjoint(residual) - as_factors(damping, x) * x
        if plus is not None:
            gradient = gradient + plus
        previous, gamma = gamma, energy(gradient)
        active = active & (gamma > threshold)
        direction = gradient + as_factors(torch.where(active, gamma / previous, zero), x) * direction
    return x


def _find_preconditioner(operator, v: torch.Tensor) -> Callable | None:
    """The operator's approximate inverse, where conjugate gradients need it: a border that y does not show."""
    return operator.approximate_inverse(v) if any(getattr(operator, "margin", ())) else None


def _invert_damped(operator, inverse: Callable, v, damping, *limits) -> torch.Tensor:
    """(A A^T + damping)^-1 v by `solve_pcg`, preconditioned by inverse(v, damping)."""
    damping = as_factors(damping, v)

    def apply(u):
        return operator.A(operator.A_adjoint(u)) + damping * u

    return solve_pcg(apply, lambda u: inverse(u, damping), v, *limits)


def solve_pcg(apply: Callable, inverse: Callable, v, tolerance: float | None, max_iterations: int) -> torch.Tensor:
    """Solve apply(u) = v, symmetric and positive, per image by preconditioned conjugate gradients from u = 0 until
    ||residual|| <= tolerance ||v|| (Golub & Van Loan, Matrix Computations, 2013, Alg. 11.5.1).

    inverse: the preconditioner, near to the inverse of `apply`. tolerance: None as in `least_squares`.
    """
    tolerance = (1e-10 if v.dtype == torch.float64 else 1e-5) if tolerance is None else tolerance

    def dot(a, b):
        return (a * b).flatten(1).sum(dim=1)

    u, residual = torch.zeros_like(v), v
    direction = preconditioned = inverse(residual)
    rho, threshold = dot(residual, preconditioned), tolerance**2 * dot(v, v)
    active, zero, one = dot(residual, residual) > threshold, torch.zeros_like(rho), torch.ones_like(rho)
    asks = _plan_questions(v, ROUGH[1], max_iterations)
    for i in range(max_iterations):
        if i in asks and not active.any():
            break
        image = apply(direction)
        curvature = dot(direction, image)
        active = active & (curvature > 0)
        step = as_factors(torch.where(active, rho / curvature.where(active, one), zero), v)
        u, residual = u + step * direction, residual - step * image
        active = active & (dot(residual, residual) > threshold)
        preconditioned = inverse(residual)
        previous, rho = rho, dot(residual, preconditioned)
        turn = torch.where(active, rho / previous.where(active, one), zero)
        direction = preconditioned + as_factors(turn, v) * direction
    return u


def _find_svd(operator, image_shape, x: torch.Tensor):
    if not hasattr(operator, "cached_svd"):
        return None
    # a large gamma magnifies rounding by up to sqrt(gamma)
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return operator.cached_svd(tuple(image_shape)[-3:], dtype, x.device)


def _plan_questions(like: torch.Tensor, expected: int, limit: int) -> range:
    """The iterations before which it is asked whether all images are done: each on the CPU. An accelerator is asked
    when the end is expected and now and then after; images that are done no longer change, so that the result is the
    same."""
    return range(limit) if is_on_host(like) else range(min(expected, limit), limit, ASK_EVERY)


def _expect_iterations(damping: torch.Tensor, tolerance: float) -> int:
    """Iterations that suffice if the norm of A is 1: sqrt(condition) / 2 log(2 / tolerance), a bound of conjugate
    gradients (Golub & Van Loan, Matrix Computations, 2013, sec. 11.3.3)."""
    least = float(damping.min())
    condition = 1 + 1 / least if least > 0 else float("inf")
    return math.ceil(min(condition**0.5 / 2 * math.log(2 / tolerance), MAX_ITERATIONS))


def as_factors(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Values (B,) or (1,) as factors of the images of x, on its device; floating ones in its dtype."""
    if values.numel() == 1 and is_on_host(values):  # without a copy to the device
        return x.new_full([1] * x.ndim, values.item(), dtype=x.dtype if values.is_floating_point() else values.dtype)
    values = values.to(x.dtype) if values.is_floating_point() else values
    return values.to(x.device).view(-1, *[1] * (x.ndim - 1))


def _invert(singular: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """1 / (s^2 + r), and 0 where both are 0: the pseudo-inverse."""
    total = singular.square() + r
    return torch.where(total > 0, 1 / total.where(total > 0, 1.0), 0.0)
