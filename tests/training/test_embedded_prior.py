"""The released weights in data/embedded."""

import math

import pytest
import torch

import restore
from restore.images import io
from restore.paths import data_dir

PHOTOS = ("astronaut-face-64.png", "chelsea-face-64.png", "coffee-64.png")


@pytest.mark.parametrize("t", [800, 950])
def test_the_mean_colour_of_the_noise_is_seen(t):
    """A network whose last normalisation has one channel a group erases it, and always answers about 0."""
    backbone = restore.load("embedded").backbone
    photos = torch.cat([io.read_image(data_dir() / "photos" / name).pixels for name in PHOTOS])
    noise = torch.randn(16, *photos.shape, generator=torch.Generator().manual_seed(0))
    a = backbone.schedule.alpha_bar(t)
    with torch.no_grad():
        errors = [backbone.predict(math.sqrt(a) * photos + math.sqrt(1 - a) * n, t).eps - n for n in noise]
    error = torch.stack(errors).mean(dim=(-2, -1)).square().mean()
    trivial = noise.mean(dim=(-2, -1)).square().mean()
    assert float(error / trivial) < 0.5
