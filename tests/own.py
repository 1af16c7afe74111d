"""What users might add in a module of their own: a sampler, an operator, a metric, a guidance term and its parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from operators import Operator
from restore.guidance import Term, WeakPass, estimator
from restore.guidance.attention import observe_attention


def one_step(prior, operator, y, *, noise, steps, guidance=None, condition=None, callback=None, gain=1.0):
    """A sampler: the prior's guided estimate of A^T y, as if that were the image at the middle noise level."""
    t = prior.schedule.timesteps(3)[1]
    alpha, sigma = prior.schedule.alpha(t), prior.schedule.sigma(t)
    x_t = alpha * gain * operator.A_adjoint(y) + sigma * noise(0, (len(y), *prior.shape), "start")
    with torch.no_grad(), estimator(prior, guidance) as estimate:
        _, eps = estimate(x_t, t, condition)
    return prior.decode((x_t - sigma * eps) / alpha)


class Mirrored(Operator):
    """An operator: the picture and its mirror image, averaged."""

    name = "mirrored"

    def __init__(self, share: float = 0.5, *, noise=None, image_size=None, adjoint="exact"):
        super().__init__(noise=noise, image_size=image_size, adjoint=adjoint)
        self.share = share

    def A(self, x):
        return (1 - self.share) * x + self.share * x.flip(-1)


def brightness_error(result, truth):
    """Difference of the mean brightness on [-1, 1]."""
    return (result.mean(dim=(1, 2, 3)) - truth.mean(dim=(1, 2, 3))).abs()


def reversed_values(a):
    """A target: every token gets the value of its mirror image, row by row of the grid."""
    h, w = a.grid
    rows = a.v.unflatten(-2, (h, w)).flip(-1)
    return rows.flatten(-3, -2)


def late(t):
    return 0.0 if t > 500 else 2.0


def furthest(eps, weak):
    """A combination: only the term that differs most."""
    scale, far = max(weak, key=lambda item: float((eps - item[1]).norm()))
    return eps + scale * (eps - far)


@dataclass(frozen=True)
class Attended(Term):
    """Darkens what the middle block attends to most: a term that observes the strong pass."""

    by: float = 0.5

    def bind(self, backbone):
        layers = [layer for layer in backbone.attention.values() if layer.short == "m1"]
        seen = []

        def record(layer, a):
            assert not torch.is_grad_enabled() and not a.q.requires_grad
            seen.append((a.grid, a.map().mean(dim=1).sum(dim=1)))  # (B, tokens): attention that each key receives

        def observe():
            seen.clear()
            return observe_attention(layers, record, backbone.network)

        def eps(x_t, t, condition, strong):
            ((grid, weight),) = seen
            mask = (weight > 1).view(-1, 1, *grid).to(x_t)
            mask = torch.nn.functional.interpolate(mask, size=x_t.shape[-2:])
            return backbone.predict(x_t * (1 - self.by * mask), t, condition).eps

        return WeakPass(eps, observe=observe)
