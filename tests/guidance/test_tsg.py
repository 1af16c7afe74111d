"""TSG against a perturbed embedding and another time, in float64."""

from __future__ import annotations

import pytest
import torch
from weak_passes import relative, weak_of

from restore.guidance import TSG
from restore.guidance import targets as T


@pytest.mark.parametrize("s, alpha", [(2.0, 1.0), (0.5, 0.0), (3.0, 0.25)])
def test_tsg(model, x, s, alpha):
    t, n = 250, T.SeededDraw(3, 250)("normal", (1, model.network.time_embedding.linear_2.out_features)).double()

    def noisy(module, args, output):
        deviation = ((output - output.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True) / (output.shape[1] - 1)
        return output + s * (t / 999) ** alpha * deviation.sqrt() * n

    handle = model.network.time_embedding.register_forward_hook(noisy)
    with torch.no_grad():
        expected = model.predict(x, t).eps
    handle.remove()
    got = weak_of(TSG(1.0, s=s, alpha=alpha, noise=3), model, x, t)
    assert relative(got, expected) < 1e-12 and relative(got, model.predict(x, t).eps) > 1e-4


@pytest.mark.parametrize("shift", [40, -60.5, 2000])
def test_tsg_at_another_time(model, x, shift):
    with torch.no_grad():
        told = torch.tensor([min(250 + shift, 999.0)])
        expected = model.network(x, told).sample[:, :3]
    assert relative(weak_of(TSG(1.0, s=0, shift=shift), model, x, 250), expected) < 1e-12
