"""The likelihood p(y | x) of a measurement: norms of y - A(x), one number per image, and the noise of y."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch

from operators import PoissonNoise, RestoreError, find_noise, is_linear
from operators.naming import lookup
from operators.ranges import Names

# Least sigma_y in an inverse of A: the rounding of y, which small singular values would magnify without bound.
SIGMA_Y_FLOOR = 1e-4


def l2_norm(difference: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return ||y - A(x)||_2, not squared (DPS's choice for Gaussian noise), (B,)."""
    return torch.linalg.vector_norm(difference.flatten(1), dim=1)


def poisson_norm(difference: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return ||y - A(x)||_Lambda with Lambda = diag(1 / 2y) (DPS, Chung et al. 2023, eq. 19), (B,).

    y is taken as an intensity on [0, 1] and floored at one grey level, below which the weight would diverge.
    """
    weight = 1 / (2 * ((y + 1) / 2).clamp(min=1 / 255))
    return torch.linalg.vector_norm((weight.sqrt() * difference).flatten(1), dim=1)


def poisson_reference_norm(difference: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return mean(||y - A(x)||_2 / |y|), the norm of DPS's authors' code for Poisson noise, (B,)."""
    return (l2_norm(difference, y)[:, None] / y.abs().flatten(1)).mean(dim=1)


DATA_NORMS = {"l2": l2_norm, "poisson": poisson_norm, "poisson-reference": poisson_reference_norm}


DataNorm = Annotated[str | Callable, Names(DATA_NORMS)]


def gaussian_sigma(operator) -> float | None:
    """Return the standard deviation of the operator's Gaussian noise, 0 if it has no noise, None if it has another."""
    noise = find_noise(operator)
    return 0.0 if noise is None else getattr(noise, "sigma", None)


def find_data_norm(operator, data_norm: str | Callable | None) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the norm (y - A(x), y) -> (B,) of a name in DATA_NORMS; a function is returned unchanged.

    None: "poisson" if the operator's noise is Poisson noise, else "l2". Raises RestoreError for an unknown name.
    """
    if data_norm is None:
        data_norm = "poisson" if isinstance(find_noise(operator), PoissonNoise) else "l2"
    return data_norm if callable(data_norm) else lookup(data_norm, DATA_NORMS, "data_norm")


def likelihood_variance(operator, tau: float | None, name: str = "tau") -> float:
    """Return tau² such that -log p(y | x) = norm(y - A(x))² / tau² + const, with the norm of `find_data_norm`.

    tau None: from the operator's noise, 2 sigma_y² if it is Gaussian and 4 / (255 rate) if it is Poisson noise.
    Raises RestoreError, which calls tau by `name`, if the result is not positive.
    """
    if tau is None and isinstance(find_noise(operator), PoissonNoise):
        return 4 / (255 * operator.noise.rate)
    variance = 2 * (gaussian_sigma(operator) or 0.0) ** 2 if tau is None else tau**2
    if not variance > 0:
        raise RestoreError(f"{name} must be positive, or None if the operator has noise, got {tau}")
    return variance


def is_linear_gaussian(operator) -> bool:
    """Return whether y = A x + n with a linear A and Gaussian noise, or none."""
    return is_linear(operator) and gaussian_sigma(operator) is not None


def require_linear(sampler: str, operator, unless: str = "", instead: str = "dps") -> None:
    """Raise RestoreError for an operator that is not linear. unless: when it may be; instead: what takes it."""
    if not is_linear(operator):
        name = getattr(operator, "name", type(operator).__name__)
        raise RestoreError(f"{sampler} needs a linear operator{unless}, got {name}; try {instead}")


def require_linear_gaussian(sampler: str, prior, operator, sigma_y: float | None, *, latents: bool = False) -> float:
    """Return sigma_y of y = A x + sigma_y n: the given one, else that of the operator's noise, 0 if it has none.

    latents: the sampler runs on latent priors too. Raises RestoreError if x is a latent and `latents` is false, if A is
    not linear, if the noise is not Gaussian and no sigma_y is given, and for a negative or infinite sigma_y.
    """
    if prior.downscale != 1 and not latents:
        raise RestoreError(f"{sampler} needs a pixel prior, got a latent one; try psld")
    require_linear(sampler, operator)
    sigma_y = gaussian_sigma(operator) if sigma_y is None else sigma_y
    if sigma_y is None:
        raise RestoreError(f"{sampler} needs Gaussian noise, got {operator.noise!r}; give sigma_y or try dps")
    if not 0 <= float(sigma_y) < float("inf"):
        raise RestoreError(f"sigma_y must be a finite number >= 0, got {sigma_y!r}")
    return float(sigma_y)
