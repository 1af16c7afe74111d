"""LiveBytes counts what can be counted by hand."""

import pytest
import torch

from restore.memory.count import LiveBytes


def test_live_bytes_are_those_of_the_tensors_alive():
    x = torch.ones(1000)
    with LiveBytes(known=[x]) as live:
        y = x * 2  # 4000 bytes
        z = y.view(10, 100).exp()  # 4000 more; the view is free
        assert live.now == live.peak == 8000
        del y
        assert (live.now, live.peak) == (4000, 8000)
        z.add_(1)
        assert live.now == 4000
        x.view(10, 100)
        assert live.now == 4000


def test_live_bytes_see_what_autograd_saves():
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes(known=[x]) as live:
        y = x * 3
        z = y.exp()  # saves its output
        loss = z.sum()
        del y, z
        assert live.now == pytest.approx(4000, abs=100)
        torch.autograd.grad(loss, x)
    assert live.peak == pytest.approx(8000, abs=100)
