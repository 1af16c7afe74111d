"""Priors whose score and posterior are known in closed form: what a sampler gets wrong can be measured.

`python -m restore.bench.known docs/known-posteriors.md` measures the tables of that page anew (without a file it prints
them): every sampler on two Gaussians and on a Gaussian mixture, against exact posterior samples (problems of the kind
that Cardoso et al. 2023 and arXiv 2503.03007 propose). About five minutes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

import operators
from operators import RestoreError
from restore import disk, samplers
from restore.backbones.base import Pixels, Prediction
from restore.backbones.schedule import Schedule
from restore.samplers.noise import derive_seed

SHAPE = (3, 4, 4)
WHITE = 0.1  # variance of the white Gaussian's pixels


def linear_schedule(steps: int = 1000) -> Schedule:
    """DDPM's (Ho et al. 2020): beta from 1e-4 to 0.02."""
    return Schedule.from_config({"num_train_timesteps": steps})


class MixturePrior(Pixels):
    """x_0 ~ sum_k weights[k] N(means[k], covs[k]) as a backbone whose network is exact, for any noise levels.

    weights: (K,), means: (K, D), covs: (K, D, D), float64; shape: (C, H, W) of an image, D = C H W.
    kind: what the "network" predicts, as Prediction.of takes it. x_0 is not bounded.
    """

    network, attention, null_condition, bounded = None, {}, None, False

    def __init__(self, weights, means, covs, shape=SHAPE, schedule: Schedule | None = None, kind: str = "eps"):
        self.weights, self.means, self.covs = weights, means, covs
        self.values, self.vectors = torch.linalg.eigh(covs)
        self.shape, self.schedule, self.kind = tuple(shape), schedule or linear_schedule(), kind
        self.channels, self.resolution, self.multiple = shape[0], shape[-1], 1
        self.evaluations = 0

    @classmethod
    def gaussian(cls, mean: torch.Tensor, cov: torch.Tensor, *more, **options) -> MixturePrior:
        """The Gaussian N(mean, cov)."""
        return cls(torch.ones(1, dtype=mean.dtype), mean[None], cov[None], *more, **options)

    def predict(self, x_t: torch.Tensor, t: float, condition: Any = None) -> Prediction:
        """E[eps | x_t] = sigma sum_k p(k | x_t) (alpha² C_k + sigma² I)^-1 (x_t − alpha m_k)."""
        self.evaluations += 1
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        spread = a**2 * self.values + s**2  # (K, D), of x_t under each component
        whiten = s * (self.vectors / spread[:, None]) @ self.vectors.mT
        centred = x_t.flatten(1).double() - a * self.means[:, None]  # (K, B, D)
        each = centred @ whiten
        if len(each) == 1:
            eps = each[0]
        else:
            log_p = self.weights.log() - 0.5 * spread.log().sum(-1) - 0.5 * (centred * each).sum(-1).T / s
            eps = torch.einsum("bk,kbd->bd", torch.softmax(log_p, dim=1), each)
        eps = eps.view_as(x_t).to(x_t.dtype)
        x0 = (x_t - s * eps) / a
        output = {"eps": eps, "x0": x0, "v": a * eps - s * x0, "velocity": eps - x0}[self.kind]
        return Prediction.of(self.kind, output, x_t, a, s)

    def posterior(self, operator, y: torch.Tensor, sigma: float) -> MixturePrior:
        """The mixture p(x_0 | y) for y = A x_0 + sigma n, one measurement (1, ...), a linear operator."""
        D = self.means.shape[1]
        basis = torch.eye(D, dtype=torch.float64).view(D, *self.shape)
        matrix = operator.A(basis).flatten(1).T
        cov_y = matrix @ self.covs @ matrix.T + sigma**2 * torch.eye(len(matrix), dtype=torch.float64)
        gap = y.flatten().double() - self.means @ matrix.T
        solved = torch.linalg.solve(cov_y, torch.cat([gap[..., None], matrix @ self.covs], dim=-1))
        log_w = self.weights.log() - 0.5 * (gap * solved[..., 0]).sum(-1) - 0.5 * torch.logdet(cov_y)
        gain = (matrix @ self.covs).mT
        means = self.means + (gain @ solved[..., :1])[..., 0]
        covs = self.covs - gain @ solved[..., 1:]
        return MixturePrior(torch.softmax(log_w, 0), means, (covs + covs.mT) / 2, self.shape, self.schedule)

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """n exact samples (n, *shape), float64."""
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        scaled = self.vectors * self.values.clamp(min=0).sqrt()[:, None]
        return (self.means[chosen] + torch.einsum("bde,be->bd", scaled[chosen], z)).view(n, *self.shape)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (D,) and covariance (D, D) of the whole mixture."""
        mean = self.weights @ self.means
        centred = self.means - mean
        spread = torch.einsum("k,kd,ke->de", self.weights, centred, centred)
        return mean, (self.weights[:, None, None] * self.covs).sum(0) + spread


def smooth_covariance(shape: Sequence[int], seed: int, scale: float = 0.35) -> torch.Tensor:
    """A random covariance (D, D) with neighbouring pixels alike, as pictures have."""
    g = torch.Generator().manual_seed(seed)
    places = torch.stack(torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in shape), indexing="ij"), -1)
    places = places.reshape(-1, 3) * torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64)
    kernel = torch.exp(-0.5 * torch.cdist(places, places) ** 2 / 1.5**2)
    strength = 0.5 + torch.rand(len(places), generator=g, dtype=torch.float64)
    return scale**2 * (strength[:, None] * kernel * strength + 0.01 * torch.eye(len(places), dtype=torch.float64))


def problems() -> dict[str, MixturePrior]:
    """The priors of the tables: a Gaussian of independent pixels, one of smooth pictures, and four Gaussians whose
    means differ in what a task does not see: by a chequerboard (lost in 2 x 2 means and nearly in the blur) and by the
    pixels that inpainting lacks."""
    g = torch.Generator().manual_seed(0)
    D = math.prod(SHAPE)
    mean = 0.2 * torch.randn(D, generator=g, dtype=torch.float64)
    chequered = (torch.arange(4)[:, None] + torch.arange(4)) % 2 * 2.0 - 1
    hidden = (_holes() == 0).double().view(4, 4) * 2
    patterns = torch.stack([0.35 * (i * chequered + j * hidden) for i in (-1, 1) for j in (-1, 1)])
    means = patterns[:, None].expand(4, 3, 4, 4).reshape(4, D).double()
    # One covariance for all: with one each, what y tells about the noise of its pixels would give the mode away.
    covs = smooth_covariance(SHAPE, 1, 0.15).expand(4, D, D)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    return {
        "white Gaussian": MixturePrior.gaussian(mean, WHITE * torch.eye(D, dtype=torch.float64)),
        "smooth Gaussian": MixturePrior.gaussian(mean, smooth_covariance(SHAPE, 0)),
        "mixture": MixturePrior(weights, means, covs),
    }


def _holes() -> torch.Tensor:
    return (torch.arange(16).view(1, 1, 4, 4) % 3 != 0).float()


def tasks(sigma: float) -> dict[str, operators.Operator]:
    """Ten of sixteen pixels, 2 x 2 means, a blur; with Gaussian noise."""
    noise = operators.GaussianNoise(sigma)
    return {
        "inpainting": operators.Inpainting(_holes(), noise=noise),
        "SR x2": operators.SuperResolution(2, method="average", noise=noise),
        "blur": operators.GaussianBlur(5, 0.8, noise=noise),
    }


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, directions: int = 256) -> float:
    """Mean over random directions of the 1-D Wasserstein-2 distance of two equally large samples (n, D)."""
    u = torch.randn(a.shape[1], directions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = u / u.norm(dim=0)
    gap = (a.double() @ u).sort(dim=0).values - (b.double() @ u).sort(dim=0).values
    return float((gap**2).mean(0).sqrt().mean())


def problem(prior: MixturePrior, operator: operators.Operator, seed: int) -> tuple[torch.Tensor, MixturePrior]:
    """A measurement (1, ...) of one sample of the prior, and the exact posterior."""
    g = torch.Generator().manual_seed(1000 + seed)
    y = operator.A(prior.sample(1, g))
    y = y + operator.noise.sigma * torch.randn(y.shape, generator=g, dtype=torch.float64)
    return y, prior.posterior(operator, y, operator.noise.sigma)


def compare(prior: MixturePrior, y: torch.Tensor, truth: MixturePrior, sample: Callable, n: int = 1000, seed: int = 0):
    """n samples of p(x_0 | y) against the exact ones, as a mapping.

    sample: (y (n, ...), noise) -> images (n, 3, H, W); noise as samplers take it, a function of (seed, kind, k).
    mean: ||mean - true|| over ||prior's mean - true||, 0 is right and 1 has learned nothing from y.
    variance: trace of the samples' covariance over the true one. distance: sliced Wasserstein distance to exact
    samples over that of the prior's own samples; floor: that of other exact ones. nfe: network evaluations, a
    backward pass not counted.
    """

    def noise(k: int, shape: Sequence[int], kind: str = "latent") -> torch.Tensor:
        g = torch.Generator().manual_seed(derive_seed(seed, kind, k))
        return torch.randn(tuple(shape), generator=g, dtype=torch.float64)

    before = prior.evaluations
    x = sample(y.expand(n, *y.shape[1:]).contiguous(), noise).detach().flatten(1)
    nfe, g = prior.evaluations - before, torch.Generator().manual_seed(seed)
    exact, other, plain = (p.sample(n, g).flatten(1) for p in (truth, truth, prior))
    start, (mean, cov) = sliced_wasserstein(plain, exact), truth.moments()
    return {
        "mean": float((x.mean(0) - mean).norm() / (prior.moments()[0] - mean).norm()),
        "variance": float(torch.cov(x.T).trace() / cov.trace()),
        "distance": sliced_wasserstein(x, exact) / start,
        "floor": sliced_wasserstein(other, exact) / start,
        "nfe": nfe,
    }


@dataclass(frozen=True)
class Entry:
    """A sampler in the tables. budgets: evaluations -> steps and parameters that spend them. grid: values to try for
    each parameter; the best for a prior at TUNED evaluations, on other measurements, is the one that is shown."""

    sampler: str | Callable
    budgets: Mapping[int, Mapping[str, Any]]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def candidates(self, budget: int) -> list[dict[str, Any]]:
        fixed = {**self.parameters, **self.budgets[budget]}
        return [fixed | dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


BUDGETS, TUNED = (20, 50, 100, 1000), 100


def dps(prior, operator, y, *, steps: int, pull: float, **more) -> torch.Tensor:
    """DPS with zeta = pull / steps: as many small steps pull as far as few large ones."""
    return samplers.find_sampler("dps")(prior, operator, y, steps=steps, zeta=pull / steps, **more)


def _each(steps: str) -> dict[int, dict[str, Any]]:
    return {n: {"steps": steps.format(n)} for n in BUDGETS}


_DAPS = {"sigma_max": 10.0, "sigma_min": 0.05, "tau": None, "lr_min_ratio": 0.3}
SETTINGS = {
    "DPS": Entry(dps, {n: {"steps": n} for n in BUDGETS}, grid={"pull": (3, 10, 30, 100)}),
    "DDRM": Entry("ddrm", _each("ddim{}")),
    "DDNM+": Entry("ddnm", _each("ddim{}")),
    "DiffPIR": Entry("diffpir", _each("quad:{}"), grid={"lam": (1.0, 3.0), "zeta": (0.3, 1.0)}),
    "PiGDM, added": Entry("pigdm", _each("ddim{}"), grid={"prior_variance": (WHITE, 1.0)}),
    "PiGDM, score": Entry("pigdm", _each("karras:{}"), {"gradient": "score"}, {"prior_variance": (WHITE, 1.0)}),
    "DAPS": Entry(
        "daps",
        {
            n: {"steps": steps, "ode_steps": n // steps, "mcmc_steps": 50}
            for n, steps in ((20, 4), (50, 10), (100, 20), (1000, 100))
        },
        {**_DAPS, "lr": 1e-3},
    ),
    "DAPS, exact": Entry(
        "daps",
        {
            n: {"steps": steps, "ode_steps": 2, "mcmc_steps": mcmc}
            for n, steps, mcmc in ((20, 2, 8), (50, 5, 8), (100, 5, 18), (1000, 10, 98))
        },
        {**_DAPS, "conditional": "exact", "momentum": 0.9, "ode_sigma_min": 0.03},
        {"lr": (3e-4, 1e-3)},
    ),
    "RED-diff": Entry("reddiff", _each("ddim{}"), {"start": "adjoint", "lr": 0.1}, {"lam": (0.02, 0.1, 0.25)}),
    "PnP-DM": Entry(
        "pnpdm",
        {
            n: {"steps": steps, "iterations": iterations, "decay": decay}
            for n, steps, iterations, decay in (
                (20, "karras:20", 5, 0.4),
                (50, "karras:25", 10, 0.6),
                (100, "karras:25", 20, 0.8),
                (1000, "karras:50", 100, 0.95),
            )
        },
        {"rho_max": 1.0},
        {"rho_min": (0.05, 0.1, 0.2)},
    ),
}


def measure(prior: MixturePrior, sampler: str | Callable, options: Mapping[str, Any], sigma: float, n: int, seed: int):
    """The mean of `compare` over the tasks; infinite where the sampler diverges."""
    rows = []
    for operator in tasks(sigma).values():
        y, truth = problem(prior, operator, seed)
        run = partial(samplers.find_sampler(sampler), prior, operator, **options)
        try:
            rows.append(compare(prior, y, truth, lambda y, noise, run=run: run(y, noise=noise), n, seed))
        except RestoreError:
            return dict.fromkeys(("mean", "variance", "distance", "floor", "nfe"), math.inf)
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def table(prior: MixturePrior, settings: Mapping[str, Entry], *, sigma: float = 0.1, n: int = 1000) -> Iterator[str]:
    """Lines of Markdown: a row for every sampler and budget, means over the tasks."""
    yield "sampler | evaluations | error of the mean | variance × | distance (floor) | chosen"
    yield "---|---|---|---|---|---"
    for name, entry in settings.items():
        tried = []
        for options in entry.candidates(TUNED) if entry.grid else ():
            tried.append(measure(prior, entry.sampler, options, sigma, n // 5, 1)["distance"])
        best = tried.index(min(tried)) if tried else 0
        for budget in entry.budgets:
            options = entry.candidates(budget)[best]
            got = measure(prior, entry.sampler, options, sigma, n if budget <= TUNED else n // 4, 0)
            chosen = ", ".join(f"{key} {options[key]:g}" for key in entry.grid)
            shown = f"{got['nfe']:.0f} | {got['mean']:.3f} | {got['variance']:.2f} | {got['distance']:.3f}"
            yield f"{name} | {shown} ({got['floor']:.3f}) | {chosen}"


def main(page: str | None = None) -> None:
    """Print the tables, and put them in the place of those of `page`: what follows its line "## Tables"."""
    lines = []
    for title, prior in problems().items():
        for line in ("", f"### {title}", "", *table(prior, SETTINGS)):
            print(line, flush=True)
            lines.append(line)
    if page is not None:
        text, mark, _ = Path(page).read_text().partition("## Tables\n")
        if not mark:
            raise RestoreError(f"{page} has no line '## Tables'")
        disk.write_bytes(Path(page), "\n".join([text + mark.rstrip("\n"), *lines, ""]).encode())


if __name__ == "__main__":
    main(*sys.argv[1:2])
