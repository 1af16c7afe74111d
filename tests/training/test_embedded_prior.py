"""The released weights in data/embedded."""

import math

import pytest
import torch

import operators
import restore
from restore.bench.baselines import baseline
from restore.images import io
from restore.metrics.single import psnr
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


@pytest.mark.parametrize("label", ["photo", None])
def test_a_photo_is_denoised_in_one_step(label):
    """The posterior mean of a cup of coffee, against the Wiener filter."""
    photo = io.read_image(data_dir() / "photos" / "coffee.jpg").pixels[..., 100:292, 200:392]
    A = operators.Denoising(noise=operators.GaussianNoise(0.2))
    y = A(photo, torch.Generator().manual_seed(0))
    result = restore.load("embedded")(y, A, task="denoise", label=label)
    gained = float(psnr(result.samples[:, 0], photo) - psnr(baseline(y, A), photo))
    assert result.nfe == 4 and gained > 3, f"{gained:.2f} dB"


def test_a_photo_is_sharpened_and_enlarged_without_seams():
    photo = io.read_image(data_dir() / "photos" / "coffee.jpg").pixels[..., 100:228, 200:328]
    restorer, noise = restore.load("embedded", overlap=0.25), operators.GaussianNoise(0.05)
    for A in (operators.GaussianBlur(15, 1.5, noise=noise), operators.SuperResolution(2, noise=noise)):
        y = A(photo, torch.Generator().manual_seed(0))
        x = restorer(y, A, label="photo").samples[:, 0]
        gained = float(psnr(x, photo) - psnr(baseline(y, A), photo))
        assert gained > 1, f"{A.name}: {gained:.2f} dB"
        # A seam would be a larger error at the borders of the windows (at 32, 64 and 96) than elsewhere.
        error = (x - photo).square().mean(dim=(0, 1))
        for profile in (error.mean(0), error.mean(1)):
            borders = torch.cat([profile[i - 1 : i + 1] for i in (32, 64, 96)])
            assert float(borders.mean()) < 1.5 * float(profile.mean())
