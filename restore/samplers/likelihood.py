"""The measurement's likelihood p(y | x) as samplers use it that need A alone: a norm per image, and its scale."""

from __future__ import annotations

from collections.abc import Callable

import torch

from operators import PoissonNoise, RestoreError
from operators.naming import lookup
from restore.samplers.dps import DATA_NORMS


def norm_of(operator, data_norm: str | Callable | None) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The data norm of that name in DATA_NORMS, a function itself, or None: the one of the operator's noise."""
    if data_norm is None:
        data_norm = "poisson" if isinstance(getattr(operator, "noise", None), PoissonNoise) else "l2"
    return data_norm if callable(data_norm) else lookup(data_norm, DATA_NORMS, "data_norm")


def likelihood_variance(operator, tau: float | None, name: str = "tau") -> float:
    """tau² such that -log p(y | x) = norm(y - A(x))² / tau² + const, the norm being that of `norm_of`.

    tau None: from the operator's noise, 2 sigma_y² where it is Gaussian and 4 / (255 rate) where it is Poisson.
    Raises RestoreError where that says nothing.
    """
    noise = getattr(operator, "noise", None)
    if tau is None and isinstance(noise, PoissonNoise):
        return 4 / (255 * noise.rate)
    variance = 2 * (getattr(noise, "sigma", None) or 0.0) ** 2 if tau is None else tau**2
    if not variance > 0:
        raise RestoreError(
            f"{name} must be positive; {name}=None takes it from the operator's noise, and there is none"
        )
    return variance
