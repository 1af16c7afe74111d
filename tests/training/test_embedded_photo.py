"""The released weights in data/embedded-photo."""

import pytest
import torch

import operators
import restore
from restore.bench.baselines import baseline
from restore.images import io
from restore.metrics.single import psnr
from restore.paths import data_dir


@pytest.fixture(scope="module")
def restorer():
    return restore.load("embedded-photo")


def crop(name, top, left, side=160):
    return io.read_image(data_dir() / "photos" / name).pixels[..., top : top + side, left : left + side]


def test_what_it_is(restorer):
    backbone = restorer.backbone
    assert (backbone.resolution, backbone.patch, backbone.classes, dict(backbone.attention)) == (128, 2, None, {})
    assert 2e6 < sum(p.numel() for p in backbone.network.parameters()) < 8e6


@pytest.mark.parametrize("sigma", [15 / 127.5, 25 / 127.5, 50 / 127.5])
@pytest.mark.parametrize("photo", [("coffee.jpg", 100, 200), ("astronaut.jpg", 20, 150), ("chelsea.jpg", 60, 120)])
def test_a_photo_is_denoised_in_one_step(restorer, photo, sigma):
    """The mean over four orientations, against the Wiener filter; one orientation is a little worse."""
    x = crop(*photo)
    A = operators.Denoising(noise=operators.GaussianNoise(sigma))
    y = A(x, torch.Generator().manual_seed(0))
    result, fast = (restorer(y, A, task="denoise", quality=quality) for quality in ("balanced", "fast"))
    gained, lost = (
        float(psnr(result.samples[:, 0], x) - psnr(other, x)) for other in (baseline(y, A), fast.samples[:, 0])
    )
    assert (result.nfe, fast.nfe) == (4, 1) and gained > 1.5 and 0 < lost < 0.5, (gained, lost)


def test_a_photo_is_sharpened_and_enlarged(restorer):
    x, noise = crop("coffee.jpg", 100, 200, 256), operators.GaussianNoise(0.05)
    for A in (operators.GaussianBlur(15, 1.5, noise=noise), operators.SuperResolution(2, noise=noise)):
        y = A(x, torch.Generator().manual_seed(0))
        gained = float(psnr(restorer(y, A).samples[:, 0], x) - psnr(baseline(y, A), x))
        assert gained > 1, f"{A.name}: {gained:.2f} dB"
