"""|eps − eps_weak| of every step: in the callback of every sampler, and as a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import operators
import restore
from restore import samplers
from restore.app.trajectory import Trajectory
from restore.backbones.adm import ADM
from restore.guidance import PAG, TSG, Guidance, describe_guidance
from restore.restorer import Restorer


@pytest.fixture(scope="module")
def restorer(tiny_adm):
    return Restorer(ADM.load(tiny_adm))


@pytest.fixture(scope="module")
def noted():
    """What reaches the combination: (eps, weak predictions) of each guided step."""
    return []


@pytest.fixture(scope="module")
def guidance(noted):
    def combine(eps, weak):
        noted.append((eps, [eps_weak for _, eps_weak in weak]))
        return restore.guidance.combine.weighted_sum(eps, weak)

    return Guidance((PAG(1.0, "m1"), TSG(0.5, interval=(600, 0)), PAG(0.0, "m1")), combine)


def expected_signals(eps, weak):
    first = (eps - weak[0]).abs().mean(1, keepdim=True)
    return [first, (eps - weak[1]).abs().mean(1, keepdim=True) if len(weak) > 1 else None, None]


def same(signals, expected):
    return len(signals) == len(expected) and all(
        a is b is None or torch.equal(a, b) for a, b in zip(signals, expected, strict=True)
    )


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_callback_gets_them(restorer, guidance, noted, batch_size):
    operator = operators.SuperResolution(2, noise=operators.GaussianNoise(0.05))
    y = operator.A(torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16))
    options = {"sampler": "dps", "steps": 4, "zeta": 0.3, "batch_size": batch_size}
    steps, options = [], {**options, "guidance": guidance}
    noted.clear()
    result = restorer(y, operator, callback=steps.append, **options)
    seen = list(noted)
    assert len(steps) == len(seen) == 4 * 2 // batch_size
    for step, (eps, weak) in zip(steps, seen, strict=True):
        assert same(step["signals"], expected_signals(eps, weak))
        assert step["signals"][0].shape == (batch_size, 1, 16, 16)
        assert (step["signals"][1] is None) == (step["t"] > 600)
    assert {step["t"] > 600 for step in steps} == {True, False}
    plain = restorer(y, operator, **options)
    assert torch.equal(plain.samples, result.samples) and plain.nfe == result.nfe

    steps.clear()
    noted.clear()
    restorer.generate(1, guidance=guidance, steps=3, callback=steps.append)
    assert all(same(step["signals"], expected_signals(*note)) for step, note in zip(steps, noted, strict=True))
    steps.clear()
    restorer.generate(1, steps=2, callback=steps.append)
    assert all("signals" not in step for step in steps)


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_every_sampler_can_be_pictured(restorer, name):
    """A row for each term that was on, a column for each step, on paper that is white between them."""
    operator = operators.SuperResolution(2, noise=operators.GaussianNoise(0.05))
    y = operator.A(torch.zeros(1, 3, 16, 16))
    trajectory, guidance = Trajectory(), PAG(1.0, "m1") + TSG(0.5) + PAG(1.0, "m1", interval=(-1, -1))
    try:
        few = {"iterations": 2} if name == "pnpdm" else {}
        restorer(y, operator, sampler=name, steps=3, guidance=guidance, callback=trajectory, **few)
    except restore.RestoreError as error:
        assert "latent" in str(error) or "decoded" in str(error), error
        return
    assert trajectory.guided
    picture = trajectory.guidance(describe_guidance(guidance))
    columns = len(trajectory.steps)
    height = picture.height / 2
    assert picture.width > columns * 128 and 128 < height < 256 and picture.width > trajectory.estimates().width
    for _, _, signals in trajectory.steps:
        assert signals[0].shape == (16, 16) and signals[2] is None


def test_the_picture_shows_the_signal():
    """Each row from black, 0, to white, its largest value, in square roots."""
    trajectory = Trajectory()
    for k, largest in enumerate((0.9, 2.0)):
        signal = torch.linspace(0, largest, 64).view(1, 1, 8, 8)
        step = {"step": k, "steps": 2, "t": 10 - k, "first": 0, "x0_hat": torch.zeros(1, 3, 8, 8)}
        trajectory({**step, "signals": [signal, None if k == 0 else 10 * signal]})
    picture = trajectory.guidance(describe_guidance(PAG(2.0, ["i5", "m1"]) + TSG(1.0)))
    greys = np.asarray(picture.convert("L")).astype(int)
    assert picture.width > 2 * 128 and picture.height > 2 * 128
    # Each of a cell's 64 values fills 16 x 16 pixels: the first step reaches 0.9 of its row's largest, 2, and no other
    # value is as grey; three cells begin with 0, and the fourth is empty.
    assert int((greys == round(255 * 0.45**0.5)).sum()) in range(256, 300)
    assert 3 * 256 <= int((greys == 0).sum()) < 4 * 256
