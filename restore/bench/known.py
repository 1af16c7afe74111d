"""Priors whose score and posterior are known in closed form: what a sampler gets wrong can be measured.

`python -m restore.bench.known` draws the table of docs/known-posteriors.md: every sampler on a Gaussian and on a
Gaussian mixture, against exact posterior samples (problems of the kind that Cardoso et al. 2023 and arXiv 2503.03007
propose).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import operators
from operators import RestoreError
from restore import samplers
from restore.backbones.base import Pixels, Prediction
from restore.backbones.schedule import Schedule
from restore.samplers.noise import ImageNoise

SHAPE = (3, 4, 4)


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
    """The two priors of the table: a Gaussian, and four Gaussians whose means differ in what a task does not see:
    by a chequerboard (lost in 2 x 2 means and nearly in the blur) and by the pixels that inpainting lacks."""
    g = torch.Generator().manual_seed(0)
    D = math.prod(SHAPE)
    gaussian = MixturePrior.gaussian(
        0.2 * torch.randn(D, generator=g, dtype=torch.float64), smooth_covariance(SHAPE, 0)
    )
    chequered = (torch.arange(4)[:, None] + torch.arange(4)) % 2 * 2.0 - 1
    hidden = (_holes() == 0).double().view(4, 4) * 2
    patterns = torch.stack([0.35 * (i * chequered + j * hidden) for i in (-1, 1) for j in (-1, 1)])
    means = patterns[:, None].expand(4, 3, 4, 4).reshape(4, D).double()
    covs = torch.stack([smooth_covariance(SHAPE, seed, 0.15) for seed in (1, 2, 3, 4)])
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    return {"Gaussian": gaussian, "mixture": MixturePrior(weights, means, covs)}


def _holes() -> torch.Tensor:
    return (torch.arange(16).view(1, 1, 4, 4) % 3 != 0).float()


def tasks(sigma: float) -> dict[str, operators.Operator]:
    """Half of the pixels, their 2 x 2 means, a blur; with Gaussian noise."""
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


def compare(
    prior: MixturePrior, operator, sampler, steps, parameters: Mapping[str, Any], *, n: int = 1000, seed: int = 0
) -> dict[str, float]:
    """One sampler on one problem.

    mean: ||mean − true|| over ||prior's mean − true||, 0 is right and 1 has learned nothing from y.
    variance: trace of the samples' covariance over the true one. distance: sliced Wasserstein distance to exact
    samples over that of the prior's own samples (0: the posterior). nfe: network evaluations, a backward counted apart
    by nobody.
    """
    sigma = operator.noise.sigma
    g = torch.Generator().manual_seed(1000 + seed)
    y = operator.A(prior.sample(1, g)) + 0.0
    y = y + sigma * torch.randn(y.shape, generator=g, dtype=torch.float64)
    truth = prior.posterior(operator, y, sigma)
    mean, cov = truth.moments()
    noise = ImageNoise([(seed, str(i), 0) for i in range(n)], dtype=torch.float64)
    before = prior.evaluations
    repeated = y.expand(n, *y.shape[1:]).contiguous()
    x = samplers.find(sampler)(prior, operator, repeated, noise=noise, steps=steps, **parameters).detach().flatten(1)
    evaluations = prior.evaluations - before
    exact, plain = truth.sample(n, g).flatten(1), prior.sample(n, g).flatten(1)
    floor = sliced_wasserstein(truth.sample(n, g).flatten(1), exact)
    start = sliced_wasserstein(plain, exact)
    return {
        "mean": float((x.mean(0) - mean).norm() / (prior.moments()[0] - mean).norm()),
        "variance": float(torch.cov(x.T).trace() / cov.trace()),
        "distance": sliced_wasserstein(x, exact) / start,
        "floor": floor / start,
        "nfe": evaluations,
    }


def table(settings: Mapping[str, Mapping[str, Any]], *, sigma: float = 0.1, n: int = 1000) -> str:
    """Markdown: a row for every sampler and budget, means over the three tasks.

    settings: name -> {"sampler", "parameters", "steps": {evaluations: what the sampler takes}}.
    """
    lines = ["prior | sampler | evaluations | error of the mean | variance x | distance (exact samples: floor)"]
    lines.append("---|---|---|---|---|---")
    for prior_name, prior in problems().items():
        for name, setting in settings.items():
            for steps in setting["steps"]:
                rows = []
                for operator in tasks(sigma).values():
                    try:
                        rows.append(compare(prior, operator, setting["sampler"], steps, setting["parameters"], n=n))
                    except RestoreError as error:
                        rows.append({"error": str(error)})
                good = [row for row in rows if "error" not in row]
                if not good:
                    lines.append(f"{prior_name} | {name} | {steps} | {rows[0]['error']} | | ")
                    continue
                mean = {key: sum(row[key] for row in good) / len(good) for key in good[0]}
                cells = [prior_name, name, f"{mean['nfe']:.0f}", f"{mean['mean']:.3f}", f"{mean['variance']:.2f}"]
                lines.append(" | ".join([*cells, f"{mean['distance']:.3f} ({mean['floor']:.3f})"]))
    return "\n".join(lines)
