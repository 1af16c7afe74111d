"""Combinations: how a strong prediction and weak ones become the guided one.

A combination is a function (eps, weak) -> guided eps: eps (B, C, H, W) the strong prediction, weak a list of
(scale, eps_weak) of the same shape. One that needs noise levels or a memory of earlier steps is an object with
`bind(backbone)`, which returns the function of one run, called as (eps, weak, x_t, t). It is called where a weak pass
ran, or, if its attribute `unguided` is true, in every step, with an empty list where none did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from operators import RestoreError
from operators.naming import lookup
from operators.ranges import Positive, Range, Share
from restore.guidance.options import check_options, construct, freeze, parse_spec

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
            t = backbone.schedule.come_back(t)
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
            parallel = project(d, x0)
            return eps - (alpha / sigma) * total * (d - parallel + self.eta * parallel)

        return combine


@dataclass(frozen=True)
class ZeroStar:
    """CFG-Zero* (Fan et al. 2025): every weak prediction is first scaled to be nearest to the strong one, per image,

        u + sum_k s_k (u − a_k u_weak_k),      a_k = <u, u_weak_k> / ||u_weak_k||^2,      u the velocity eps − x_0,

    and in the first `zero_steps` steps of the run, guided or not, u is zero. Priors that predict no velocity have one
    all the same: eps − x_0.
    """

    unguided: ClassVar[bool] = True

    zero_steps: Annotated[int, Range(0)] = 1

    def __post_init__(self):
        check_options(self)

    def bind(self, backbone) -> Callable[..., torch.Tensor]:
        """Return the function of one run, which remembers the times of its first steps."""
        seen: set[float] = set()

        def combine(eps: torch.Tensor, weak: Weak, x_t: torch.Tensor, t: float) -> torch.Tensor:
            alpha, sigma = backbone.schedule.levels(min(t, backbone.schedule.ts[-1]), x_t)
            if len(seen) <= self.zero_steps:
                seen.add(t)
            if len(seen) <= self.zero_steps:
                return x_t / (alpha + sigma)  # eps = x_0
            if not weak:
                return eps

            def velocity(eps):
                return ((alpha + sigma) * eps - x_t) / alpha

            v = velocity(eps)
            scaled = [(scale, project(v, velocity(eps_weak))) for scale, eps_weak in weak]
            return (alpha * weighted_sum(v, scaled) + x_t) / (alpha + sigma)

        return combine


def tcfg(eps: torch.Tensor, weak: Weak) -> torch.Tensor:
    """Tangential damping (TCFG, Kwon et al. 2025): the sum, with each weak prediction replaced by its part along the
    dominant right singular vector of the matrix of the two rows eps, eps_weak, per image."""
    damped = []
    for scale, eps_weak in weak:
        pair = torch.stack([eps.flatten(1), eps_weak.flatten(1)], dim=1)
        dominant = torch.linalg.svd(pair.to(torch.promote_types(eps.dtype, torch.float32)), full_matrices=False)[2]
        damped.append((scale, project(eps_weak, dominant[:, 0].view_as(eps).to(eps.dtype))))
    return weighted_sum(eps, damped)


@dataclass(frozen=True)
class FDG:
    """Frequency-decoupled guidance (Sadat et al. 2025): what the terms add is weighted by frequency,

        eps + sum_l f_l L_l,      L_0 ... L_n the Laplacian pyramid of sum_k s_k (eps − eps_weak_k).

    bands: f_0 (finest) to f_n (what is left below), at most as many as halve a side of x down to 4; ones are the plain
        sum. Published scales w_l are s f_l + 1: 10 and 5 are s = 9 with bands 1 and 4/9.
    """

    bands: Sequence[float] = (1.0, 0.5)

    def __post_init__(self):
        object.__setattr__(self, "bands", freeze(self.bands))
        check_options(self)
        if not self.bands:
            raise RestoreError("bands of fdg must be at least one number, got none")

    def __call__(self, eps: torch.Tensor, weak: Weak) -> torch.Tensor:
        """Raises RestoreError for what is no image, as the tokens of FLUX, and for one too small for the bands."""
        from kornia.geometry.transform import build_laplacian_pyramid, pyrup  # half a second, only here

        if eps.ndim != 4 or min(eps.shape[-2:]) < 4 * 2 ** (len(self.bands) - 1):
            limit = 4 * 2 ** (len(self.bands) - 1)
            raise RestoreError(f"{len(self.bands)} bands of fdg need images of {limit} cells, got {tuple(eps.shape)}")
        pyramid = build_laplacian_pyramid(weighted_sum(eps, weak) - eps, len(self.bands))
        added = self.bands[-1] * pyramid[-1]
        for factor, level in zip(self.bands[-2::-1], pyramid[-2::-1], strict=True):
            added = pyrup(added) + factor * level
        return eps + added[..., : eps.shape[-2], : eps.shape[-1]]  # a pyramid is padded to powers of two


def project(x: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
    """Return the part of x along `onto`, per image."""
    along = onto / _norm(onto)
    return (x * along).flatten(1).sum(1).view(-1, *[1] * (x.ndim - 1)) * along


def _norm(x: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(x.flatten(1), dim=1).clamp(min=torch.finfo(x.dtype).tiny)
    return norm.view(-1, *[1] * (x.ndim - 1))


COMBINATIONS: dict[str, Any] = {
    "sum": weighted_sum,
    "rescale": Rescale,
    "apg": APG,
    "zero_star": ZeroStar,
    "tcfg": tcfg,
    "fdg": FDG,
}


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
