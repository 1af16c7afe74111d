"""Combinations: how a strong prediction and weak ones become the guided one.

A combination is a function (eps, weak) -> guided eps: eps (B, C, H, W) the strong prediction, weak a list of
(scale, eps_weak) of the same shape. One that needs noise levels or a memory of earlier steps is an object with
`bind(backbone)`, which returns the function of one run, called as (eps, weak, x_t, t).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from operators import RestoreError
from operators.naming import lookup
from operators.ranges import Positive, Range, Share
from restore.guidance.options import check_options, construct, parse_spec

Weak = list[tuple[float, torch.Tensor]]


def weighted_sum(eps: torch.Tensor, weak: Weak) -> torch.Tensor:
    """Return eps + sum_k s_k (eps − eps_weak_k) (PAG, Ahn et al. 2024, eq. 14)."""
    guided = eps
    for scale, eps_weak in weak:
        guided = guided + scale * (eps - eps_weak)
    return guided


@dataclass(frozen=True)
class Rescale:
    """The sum, rescaled to the strong prediction's standard deviation, per image (Lin et al. 2024, eqs. 14-16).

    phi: share of the rescaled prediction in the result; 0 is the plain sum.
    """

    phi: Share = 0.7

    def __post_init__(self):
        check_options(self)

    def __call__(self, eps: torch.Tensor, weak: Weak) -> torch.Tensor:
        guided = weighted_sum(eps, weak)
        dims = tuple(range(1, eps.ndim))
        rescaled = guided * (eps.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
        return self.phi * rescaled + (1 - self.phi) * guided


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance (Sadat et al. 2025, Alg. 1), on clean estimates, with norms per image.

    With D = x0_hat of the strong pass and d = D − D_weak (for several terms their mean, weighted by scale): d is
    averaged over the steps, clipped to a norm of at most `threshold`, its part along D multiplied by eta; then D + s d.

    eta: 0 drops the parallel part, 1 keeps it.
    momentum: factor on the running mean, negative in the paper (−0.5 to −0.75); 0: none.
    threshold: largest ||d||_2 over an image's values, or None (the paper has 2.5 to 15 for latents, by model).
    """

    eta: float = 0.0
    momentum: Annotated[float, Range(above=-1, below=1)] = -0.5
    threshold: Positive | None = None

    def __post_init__(self):
        check_options(self)

    def bind(self, backbone) -> Callable[..., torch.Tensor]:
        """Return the function of one run, which remembers only its own steps."""
        mean: torch.Tensor | None = None

        def combine(eps: torch.Tensor, weak: Weak, x_t: torch.Tensor, t: float) -> torch.Tensor:
            nonlocal mean
            alpha, sigma = backbone.schedule.alpha(t), backbone.schedule.sigma(t)
            total = sum(abs(scale) for scale, _ in weak)
            d = sum((scale / total) * (eps_weak - eps) for scale, eps_weak in weak) * (sigma / alpha)
            if self.momentum:
                # A batch of another size belongs to another run.
                mean = d if mean is None or mean.shape != d.shape else d + self.momentum * mean
                d = mean
            if self.threshold is not None:
                d = d * (self.threshold / _norm(d)).clamp(max=1)
            x0 = (x_t - sigma * eps) / alpha
            along = x0 / _norm(x0)
            parallel = (d * along).flatten(1).sum(1).view(-1, *[1] * (d.ndim - 1)) * along
            return eps - (alpha / sigma) * total * (d - parallel + self.eta * parallel)

        return combine


def _norm(x: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(x.flatten(1), dim=1).clamp(min=torch.finfo(x.dtype).tiny)
    return norm.view(-1, *[1] * (x.ndim - 1))


COMBINATIONS: dict[str, Any] = {"sum": weighted_sum, "rescale": Rescale, "apg": APG}


def find_combination(combine: Any) -> Any:
    """Return a combination from its name in COMBINATIONS or "module:attribute", {name: options}, or itself. Raises
    RestoreError for an unknown name or option."""
    if not isinstance(combine, (str, Mapping)):
        if callable(combine) or hasattr(combine, "bind"):
            return combine
        raise RestoreError(f"combine must be a name, a mapping or a function, got {combine!r}")
    name, options = parse_spec(combine, "combination")
    entry = lookup(name, COMBINATIONS, "combination")
    return construct(entry, options, f"combination {name}") if isinstance(entry, type) or options else entry
