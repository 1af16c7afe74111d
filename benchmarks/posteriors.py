"""Priors whose score and posterior are known in closed form, to measure what a sampler gets wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

import operators
from restore.backbones.base import Pixels, Prediction
from restore.backbones.schedule import Schedule
from restore.samplers.noise import derive_seed

SHAPE = (3, 4, 4)
WHITE = 0.1  # variance of the white Gaussian's pixels


def linear_schedule(steps: int = 1000) -> Schedule:
    """Return DDPM's schedule (Ho et al. 2020): beta from 1e-4 to 0.02."""
    return Schedule.from_config({"num_train_timesteps": steps})


class MixturePrior(Pixels):
    """The prior x_0 ~ sum_k weights[k] N(means[k], covs[k]), a backbone whose predictions are exact at any noise level.

    weights: (K,), means: (K, D), covs: (K, D, D), float64; shape: (C, H, W) of an image, D = C H W.
    kind: what predict() starts from, as Prediction.of takes it. x_0 is not bounded.
    """

    network, attention, null_condition, bounded = None, {}, None, False

    def __init__(self, weights, means, covs, shape=SHAPE, schedule: Schedule | None = None, kind: str = "eps"):
        self.weights, self.means, self.covs = weights, means, covs
        self.values, self.vectors = torch.linalg.eigh(covs)
        self.shape, self.schedule, self.kind = tuple(shape), schedule or linear_schedule(), kind
        self.channels, self.resolution, self.multiple = shape[0], shape[-1], 1
        self.evaluations = 0

    @classmethod
    def gaussian(cls, mean: torch.Tensor, cov: torch.Tensor, *args, **options) -> MixturePrior:
        """Return the Gaussian N(mean, cov)."""
        return cls(torch.ones(1, dtype=mean.dtype), mean[None], cov[None], *args, **options)

    def predict(self, x_t: torch.Tensor, t: float, condition: Any = None) -> Prediction:
        """Return E[eps | x_t] = sigma sum_k p(k | x_t) (alpha² C_k + sigma² I)^-1 (x_t − alpha m_k)."""
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
        """Return the mixture p(x_0 | y) for y = A x_0 + sigma n: one measurement (1, ...), a linear operator."""
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

    def log_density(self, x: torch.Tensor) -> torch.Tensor:
        """Return log p(x_0) + a constant (B,) of images (B, ...)."""
        turned = torch.einsum("kbd,kde->kbe", x.flatten(1).double() - self.means[:, None], self.vectors)
        squares = (turned.square() / self.values[:, None]).sum(-1) + self.values.log().sum(-1)[:, None]
        return torch.logsumexp(self.weights.log()[:, None] - squares / 2, dim=0)

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Return n exact samples (n, *shape), float64."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        scaled = self.vectors * self.values.clamp(min=0).sqrt()[:, None]
        return (self.means[component] + torch.einsum("bde,be->bd", scaled[component], z)).view(n, *self.shape)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean (D,) and covariance (D, D) of the whole mixture."""
        mean = self.weights @ self.means
        centred = self.means - mean
        spread = torch.einsum("k,kd,ke->de", self.weights, centred, centred)
        return mean, (self.weights[:, None, None] * self.covs).sum(0) + spread


def smooth_covariance(shape: Sequence[int], seed: int, scale: float = 0.35) -> torch.Tensor:
    """Return a random covariance (D, D) whose neighbouring pixels are correlated, as those of photos."""
    g = torch.Generator().manual_seed(seed)
    places = torch.stack(torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in shape), indexing="ij"), -1)
    places = places.reshape(-1, 3) * torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64)
    kernel = torch.exp(-0.5 * torch.cdist(places, places) ** 2 / 1.5**2)
    strength = 0.5 + torch.rand(len(places), generator=g, dtype=torch.float64)
    return scale**2 * (strength[:, None] * kernel * strength + 0.01 * torch.eye(len(places), dtype=torch.float64))


def example_priors() -> dict[str, MixturePrior]:
    """Return a Gaussian of independent pixels, one of smooth images, and a mixture of four Gaussians.

    The mixture's means differ in what a measurement loses: by a chequerboard (lost in 2 x 2 means and nearly so in the
    blur) and by the pixels that are missing in inpainting.
    """
    g = torch.Generator().manual_seed(0)
    D = math.prod(SHAPE)
    mean = 0.2 * torch.randn(D, generator=g, dtype=torch.float64)
    chequered = (torch.arange(4)[:, None] + torch.arange(4)) % 2 * 2.0 - 1
    hidden = (_holes() == 0).double().view(4, 4) * 2
    patterns = torch.stack([0.35 * (i * chequered + j * hidden) for i in (-1, 1) for j in (-1, 1)])
    means = patterns[:, None].expand(4, 3, 4, 4).reshape(4, D).double()
    # One covariance for all: if they differed, the noise of the pixels in y would give the mode away.
    covs = smooth_covariance(SHAPE, 1, 0.15).expand(4, D, D)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    return {
        "white Gaussian": MixturePrior.gaussian(mean, WHITE * torch.eye(D, dtype=torch.float64)),
        "smooth Gaussian": MixturePrior.gaussian(mean, smooth_covariance(SHAPE, 0)),
        "mixture": MixturePrior(weights, means, covs),
    }


def _holes() -> torch.Tensor:
    return (torch.arange(16).view(1, 1, 4, 4) % 3 != 0).float()


def example_operators(sigma: float) -> dict[str, operators.Operator]:
    """Return inpainting of six of sixteen pixels, 2 x 2 means and a blur, with Gaussian noise of this deviation."""
    noise = operators.GaussianNoise(sigma)
    return {
        "inpainting": operators.Inpainting(_holes(), noise=noise),
        "SR x2": operators.SuperResolution(2, method="average", noise=noise),
        "blur": operators.GaussianBlur(5, 0.8, noise=noise),
    }


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, directions: int = 256) -> float:
    """Return the 1-D Wasserstein-2 distance of two equally large samples (n, D), averaged over random directions."""
    u = torch.randn(a.shape[1], directions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = u / u.norm(dim=0)
    gap = (a.double() @ u).sort(dim=0).values - (b.double() @ u).sort(dim=0).values
    return float((gap**2).mean(0).sqrt().mean())


def draw_measurement(prior: MixturePrior, operator: operators.Operator, seed: int) -> tuple[torch.Tensor, MixturePrior]:
    """Return a measurement (1, ...) of one sample of the prior, and the exact posterior."""
    g = torch.Generator().manual_seed(1000 + seed)
    y = operator.A(prior.sample(1, g))
    y = y + operator.noise.sigma * torch.randn(y.shape, generator=g, dtype=torch.float64)
    return y, prior.posterior(operator, y, operator.noise.sigma)


def draw_noise(seed: int) -> Callable:
    """Return noise(k, shape, kind), as samplers take it, of one generator for each step of a whole batch."""

    def noise(k: int, shape: Sequence[int], kind: str = "latent") -> torch.Tensor:
        g = torch.Generator().manual_seed(derive_seed(seed, kind, k))
        return torch.randn(tuple(shape), generator=g, dtype=torch.float64)

    return noise


def compare_with_posterior(
    prior: MixturePrior, y: torch.Tensor, posterior: MixturePrior, sample: Callable, n: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Compare n samples of a sampler with exact ones of p(x_0 | y).

    sample: (y (n, ...), noise) -> images (n, 3, H, W), with noise as samplers take it. Returns
    mean: ||mean - true|| / ||prior's mean - true||: 0 is right, at 1 nothing was learned from y;
    variance: trace of the samples' covariance over the true one;
    distance: sliced Wasserstein distance to exact samples, over that of the prior's own samples; floor: the same of
        other exact samples;
    nfe: network evaluations, backward passes not counted.
    """

    before = prior.evaluations
    x = sample(y.expand(n, *y.shape[1:]).contiguous(), draw_noise(seed)).detach().flatten(1)
    nfe, g = prior.evaluations - before, torch.Generator().manual_seed(seed)
    exact, other, plain = (p.sample(n, g).flatten(1) for p in (posterior, posterior, prior))
    start, (mean, cov) = sliced_wasserstein(plain, exact), posterior.moments()
    return {
        "mean": float((x.mean(0) - mean).norm() / (prior.moments()[0] - mean).norm()),
        "variance": float(torch.cov(x.T).trace() / cov.trace()),
        "distance": sliced_wasserstein(x, exact) / start,
        "floor": sliced_wasserstein(other, exact) / start,
        "nfe": nfe,
    }
