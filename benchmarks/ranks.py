"""Ranks of truths among a sampler's samples, on priors whose posterior is known.

A truth is drawn from the prior and measured; a sampler draws SAMPLES samples given the measurement y. If these are of
the posterior, truth and samples are draws of the same distribution, so that the truth's rank among them is uniform, for
any function (simulation-based calibration, Talts et al. 2018, arXiv 1804.06788). Given y, other truths are draws of the
exact posterior, and TWINS of them take the place of the one: the same mean with a tenth of its error.

Coverage of the samples' region of highest density (HPD): the share of truths whose posterior density is above that of
the last of c of the samples. The density is known up to a constant of each y, so nothing is estimated in 48 dimensions,
and values along which the posterior is narrow count as much as the wide ones (Modrak et al. 2023). Below the nominal
level the samples are more probable than truths are: too narrow; above it less probable, by a bias or leftover noise.

Intervals: the share of true pixels within the samples' central interval, which is what a picture of the spread shows.
The rank histogram is that of the pixels; its chi² takes one pixel of each truth, whose ranks are independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from scipy.stats import chi2

from benchmarks.posteriors import MixturePrior, draw_noise, example_operators, example_priors
from operators import Operator
from restore.calibration import LEVELS
from restore.samplers.noise import derive_seed

SIGMA, SAMPLES = 0.1, 39  # so that 50, 80 and 95 %, and a half of what is left, are whole numbers of the 40 ranks
PRIORS, TASKS = ("smooth Gaussian", "mixture"), ("inpainting", "SR x2")
TWINS, BINS = 200, 5  # exact samples in place of each truth; bins of the chi²


@dataclass(frozen=True)
class Problem:
    """N truths x (N, ...) of a prior, a measurement y (N, ...) of each, and the posterior of each."""

    prior: MixturePrior
    operator: Operator
    x: torch.Tensor
    y: torch.Tensor
    posteriors: Sequence[MixturePrior]
    seed: int

    def log_density(self, x: torch.Tensor) -> torch.Tensor:
        """Return log p(x | y) + a constant of each y, (N, K), of images x (N, K, ...)."""
        n, k = x.shape[:2]
        gap = (self.y[:, None] - self.operator.A(x.flatten(0, 1)).view(n, k, *self.y.shape[1:])).flatten(2)
        prior = self.prior.log_density(x.flatten(0, 1)).view(n, k)
        return prior - gap.square().sum(2) / (2 * self.operator.noise.sigma**2)


def draw_problem(prior: MixturePrior, operator: Operator, n: int, seed: int) -> Problem:
    """Draw n truths and their measurements."""
    g = torch.Generator().manual_seed(seed)
    x = prior.sample(n, g)
    y = operator.A(x)
    y = y + operator.noise.sigma * torch.randn(y.shape, generator=g, dtype=y.dtype)
    return Problem(
        prior, operator, x, y, [prior.posterior(operator, one[None], operator.noise.sigma) for one in y], seed
    )


def draw_problems(n: int, seed: int) -> list[Problem]:
    """Draw n truths of each of PRIORS and TASKS."""
    priors, tasks = example_priors(), example_operators(SIGMA)
    pairs = product(PRIORS, TASKS)
    return [draw_problem(priors[p], tasks[t], n, derive_seed(seed, p, t) % 2**31) for p, t in pairs]


def draw_exact(problem: Problem, y: torch.Tensor, noise: Callable) -> torch.Tensor:
    """Return exact samples of the posteriors, as a sampler: the positive control."""
    g = torch.Generator().manual_seed(problem.seed + 1)
    return torch.cat([p.sample(len(y) // len(problem.x), g) for p in problem.posteriors])


def repeat_mean(problem: Problem, y: torch.Tensor, noise: Callable) -> torch.Tensor:
    """Return the posterior's mean as every sample: the negative control."""
    means = torch.stack([p.moments()[0] for p in problem.posteriors]).view_as(problem.x)
    return means.repeat_interleave(len(y) // len(means), dim=0)


def draw_samples(problem: Problem, sample: Callable) -> tuple[torch.Tensor, int]:
    """Return SAMPLES samples of every posterior, (N, SAMPLES, ...), and the network evaluations of one."""
    before, y = problem.prior.evaluations, problem.y.repeat_interleave(SAMPLES, dim=0)
    x = sample(problem, y, noise=draw_noise(problem.seed)).detach()
    return x.view(len(problem.x), SAMPLES, *x.shape[1:]), problem.prior.evaluations - before


def rank_truths(problem: Problem, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return numbers, a row for each y, of its samples x (N, K, ...):

    pixel: (N,), above how many samples a pixel of the truth is. coverage, intervals: (N, 3), the share of TWINS within
    the HPD region, and of their pixels within the central interval, of LEVELS. histogram: (N, K + 1), the share of
    their pixels with each rank. spread_error: (N,), the mean over pixels of log(samples' deviation / root mean square
    error of their mean); spread: over the posterior's deviation instead. score: the continuous ranked probability score
    of the truth (Gneiting and Raftery 2007).
    """
    truth, k = problem.x.flatten(1), x.shape[1]
    flat, g = x.flatten(2), torch.Generator().manual_seed(problem.seed)
    twins = torch.stack([posterior.sample(TWINS, g) for posterior in problem.posteriors])
    pixel = torch.randint(truth.shape[1], (len(truth),), generator=g)
    moments = [posterior.moments() for posterior in problem.posteriors]
    mean, variance = torch.stack([m for m, _ in moments]), torch.stack([c.diagonal() for _, c in moments])
    out = [round((1 - level / 100) * (k + 1)) for level in LEVELS]  # ranks outside of the region
    least = problem.log_density(x).sort(dim=1).values[:, [n - 1 for n in out]]
    ordered = flat.sort(dim=1).values.mT.contiguous()  # (N, D, K)
    ranks = torch.searchsorted(ordered, twins.flatten(2).mT.contiguous()).flatten(1)
    within = [((ranks >= n // 2) & (ranks <= k - n // 2)).double().mean(1) for n in out]
    between = torch.stack([(flat[:, i : i + 1] - flat).abs().mean(2).sum(1) for i in range(k)]).sum(0) / (k * (k - 1))
    at = torch.arange(len(truth))
    return {
        "pixel": (flat[at, :, pixel] < truth[at, pixel][:, None]).sum(1),
        "coverage": (problem.log_density(twins)[:, :, None] > least[:, None]).double().mean(1),
        "intervals": torch.stack(within, dim=1),
        "histogram": torch.stack([(ranks == n).double().mean(1) for n in range(k + 1)], dim=1),
        "spread_error": ((1 + 1 / k) * flat.var(1) / ((flat.mean(1) - mean).square() + variance)).log().mean(1) / 2,
        "spread": (flat.var(1) / variance).log().mean(1) / 2,
        "score": (flat - truth[:, None]).abs().mean((1, 2)) - between / 2,
    }


def summarise(numbers: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return what a row says, of the numbers of all y.

    coverage: of the HPD regions of LEVELS; intervals: of the pixels' central intervals; spread_error: 1 if the spread
    is as large as the error, spread: as the posterior's, both of a typical pixel (the geometric mean); histogram: of
    the pixels' ranks, 1 everywhere if uniform; uniform: the p-value of the chi² of one pixel's rank of each truth.
    """
    n = len(numbers["pixel"])
    counts = torch.bincount(numbers["pixel"] * BINS // (SAMPLES + 1), minlength=BINS)
    statistic = float((counts - n / BINS).square().sum() / (n / BINS))
    means = {key: numbers[key].mean(0) for key in ("coverage", "intervals", "histogram")}
    return {
        "truths": n,
        **{key: dict(zip(map(str, LEVELS), _round(means[key]), strict=True)) for key in ("coverage", "intervals")},
        **{key: round(math.exp(float(numbers[key].mean())), 3) for key in ("spread_error", "spread")},
        "uniform": float(f"{chi2.sf(statistic, BINS - 1):.2g}"),
        "histogram": _round(means["histogram"] * (SAMPLES + 1)),
    }


def _round(values: torch.Tensor) -> list[float]:
    return [round(value, 3) for value in values.tolist()]


def measure(sample: Callable, problems: Sequence[Problem]) -> tuple[dict[str, Any], float]:
    """Return the row of a sampler (problem, y, noise) -> samples on the problems, with `evaluations`, and its score.

    Raises RestoreError if it diverges.
    """
    rows, evaluations = [], []
    for problem in problems:
        x, spent = draw_samples(problem, sample)
        rows.append(rank_truths(problem, x))
        evaluations.append(spent)
    numbers = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    found = {"evaluations": round(sum(evaluations) / len(evaluations))}
    return found | summarise(numbers), float(numbers["score"].mean())
