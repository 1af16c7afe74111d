"""What a user might bring from a module of their own: a sampler, an operator, a metric, a weak branch and its parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from operators import Operator
from restore.guidance import estimator
from restore.guidance.attention import observed


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
    """A combination: the term that differs most, alone."""
    scale, far = max(weak, key=lambda item: float((eps - item[1]).norm()))
    return eps + scale * (eps - far)


@dataclass(frozen=True)
class Attended:
    """Darkens what the middle block attends to most: a branch that observes the strong pass."""

    by: float = 0.5

    def bind(self, backbone):
        return AttendedPass(backbone, self.by)


class AttendedPass:
    modules: tuple = ()

    def __init__(self, backbone, by):
        self.backbone, self.by, self.seen = backbone, by, []
        self.layers = [layer for layer in backbone.attention.values() if layer.short == "m1"]

    def observing(self):
        self.seen.clear()
        return observed(self.layers, self.see, self.backbone.network)

    def see(self, layer, a):
        assert not torch.is_grad_enabled() and not a.q.requires_grad
        self.seen.append((a.grid, a.map().mean(dim=1).sum(dim=1)))  # (B, tokens): how much each key is looked at

    def eps(self, x_t, t, condition, strong):
        ((grid, weight),) = self.seen
        mask = (weight > 1).view(-1, 1, *grid).to(x_t)
        mask = torch.nn.functional.interpolate(mask, size=x_t.shape[-2:])
        return self.backbone.predict(x_t * (1 - self.by * mask), t, condition).eps
