"""Random targets: what they draw depends on the run's seed, the time and the layer, and on nothing else."""

from __future__ import annotations

import pytest
import torch
from weak_passes import double_adm, relative, weak_of

from restore.backbones.sizes import Sized
from restore.guidance import PAG, TPG, TSG, estimator

RANDOM = ["random_mask", "random_mask_off_diagonal", "random_drop", "noise"]
TERMS = {
    **{target: PAG(1.0, "i7,m1", target=target, noise=3) for target in RANDOM},
    "heads": PAG(1.0, "i7,m1:0", target="noise", strength={"i7": 0.5, "m1": {0: 1.0}}),
    "tpg": TPG(1.0, "m1", noise=3),
    "tsg": TSG(1.0, noise=3),
}


@pytest.fixture(scope="module")
def prior():
    return double_adm(resolution=32)


@pytest.mark.parametrize("name", TERMS)
def test_windows_in_a_call_change_nothing(prior, name):
    """32 x 48 in windows of 32, two or one in a call, and images together or alone."""
    x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [weak_of(TERMS[name], Sized(prior, 32, 48, max_windows=n), x, 300.5) for n in (4, 2)]
    alone = weak_of(TERMS[name], Sized(prior, 32, 48, max_windows=1), x[1:], 300.5)
    with torch.no_grad():
        plain = Sized(prior, 32, 48).predict(x, 300.5).eps
    assert relative(found[1], found[0]) < 1e-10
    assert relative(alone, found[0][1:]) < 1e-10
    assert relative(found[0], plain) > 1e-4


def test_a_window_draws_what_an_image_of_its_size_draws(prior):
    """In every window the map is perturbed like that of a small image: the whole is the windows' blend."""
    x = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sized = Sized(prior, 32, 48, max_windows=1)
    got = weak_of(TERMS["noise"], sized, x, 300)
    _, places, weights = sized._windows(32, 48, torch.float32, torch.device("cpu"))
    expected = torch.zeros_like(x)
    for place, (row, column) in zip(places, weights, strict=True):
        expected[place] += weak_of(TERMS["noise"], prior, x[place], 300) * (row[:, None] * column)
    assert len(places) > 1 and relative(got, expected) < 1e-6  # the windows' weights are float32


def test_layers_and_times_draw_different_noise(prior):
    """The second layer's noise is not the first's, nor is that of another time."""
    seen = {}

    def target(a):
        seen.setdefault(len(seen), a.draw("normal", (1, 1, 4, 4)))
        return a.v

    x = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad(), estimator(prior, PAG(1.0, "i7,m1", target=target)) as estimate:
        for t in (300, 299):
            estimate(x, t)
    assert len(seen) == 4 and len({tuple(draw.flatten().tolist()) for draw in seen.values()}) == 4
