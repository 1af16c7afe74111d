"""The released weights in data/embedded-latent: reconstruction, denoising, restoration, size of the files."""

import math

import pytest
import torch

import operators
import restore
from restore.bench.baselines import baseline
from restore.guidance import PAG
from restore.images import io
from restore.metrics.single import psnr
from restore.paths import data_dir
from restore.samplers.noise import measurement_generator

FACES = ("astronaut-face-128.png", "generated-face-128-1.png", "generated-face-128-2.png")
NOISE = operators.GaussianNoise(0.05)


@pytest.fixture(scope="module")
def restorer():
    return restore.load("embedded-latent", device="cpu")


@pytest.fixture(scope="module")
def faces():
    return torch.cat([io.read_image(data_dir() / "photos" / name).pixels for name in FACES])


def test_the_files_are_small_enough_for_the_repository():
    weights = list((data_dir() / "embedded-latent").rglob("*.safetensors"))
    assert len(weights) == 2 and sum(path.stat().st_size for path in weights) <= 40e6


def test_the_autoencoder_keeps_a_real_face(restorer, faces):
    with torch.no_grad():
        x_hat = restorer.backbone.decode(restorer.backbone.encode(faces[:1])).clamp(-1, 1)
    assert x_hat.shape == (1, 3, 128, 128) and float(psnr(x_hat, faces[:1])[0]) > 26


@pytest.mark.parametrize("t", [100, 300, 600])
def test_the_prior_knows_more_than_the_spread_of_latents(restorer, faces, t):
    """Compared with the best linear estimate from each channel's mean and variance, over many draws of noise."""
    backbone = restorer.backbone
    with torch.no_grad():
        z = backbone.encode(faces)
        noise = torch.randn(4, *z.shape, generator=torch.Generator().manual_seed(0))
        a = backbone.schedule.alpha_bar(t)
        z_t = math.sqrt(a) * z + math.sqrt(1 - a) * noise
        found = torch.stack([backbone.predict(each, t).eps for each in z_t])
    mean, variance = z.mean(dim=(0, 2, 3), keepdim=True), z.var(dim=(0, 2, 3), keepdim=True)
    z0_linear = mean + math.sqrt(a) * variance / (a * variance + 1 - a) * (z_t - math.sqrt(a) * mean)
    linear = (z_t - math.sqrt(a) * z0_linear) / math.sqrt(1 - a)
    error, trivial = (float((eps - noise).square().mean()) for eps in (found, linear))
    assert error < 0.8 * trivial


def test_every_level_attends(restorer):
    assert {layer.downsampling for layer in restorer.backbone.attention.values()} == {1, 2, 4}


def test_samples_are_different_faces_in_natural_colours(restorer):
    """The middle of a face is skin of any shade: more red than green, more green than blue."""
    images = restorer.generate(8, steps=20, batch_size=8, ddim_eta=0.0, seed=1)
    assert images.shape == (8, 3, 128, 128) and torch.isfinite(images).all()
    red, green, blue = images[..., 48:80, 48:80].mean(dim=(-2, -1)).unbind(1)
    assert ((red > green + 0.03) & (green > blue + 0.03)).sum() >= 7
    assert images.std(dim=0).mean() > 0.1


def test_a_hole_is_filled_better_than_by_interpolation(restorer, faces):
    operator = operators.Inpainting(operators.box_mask(128, size=64, margin=8, seed=0), noise=NOISE)
    y = operator(faces, [measurement_generator(0, name) for name in FACES])
    result = restorer(y, operator, batch_size=3)
    assert result.protocol["method"]["sampler"] == "diffpir"
    gain = psnr(result.samples[:, 0], faces) - psnr(baseline(y, operator), faces)
    assert float(gain.mean()) > 0.5


def test_psld_restores_a_real_face(restorer, faces):
    """The residual is small up to the autoencoder's error, and the face is nearer than another one."""
    operator = operators.SuperResolution(4, noise=NOISE)
    y = operator(faces[:1], [measurement_generator(0, FACES[0])])
    result = restorer(y, operator, sampler="psld", guidance=None, steps=40)
    assert float(result.residual_ratio.mean()) < 3
    others = psnr(faces[1:], faces[:1].expand_as(faces[1:]))
    assert float(psnr(result.samples[:, 0], faces[:1])[0]) > float(others.max()) + 6


def test_any_size_and_guidance(restorer):
    operator = operators.SuperResolution(2, noise=NOISE)
    y = operator.A(torch.rand(1, 3, 90, 150, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    plain = restorer(y, operator, sampler="psld", steps=2, guidance=None).samples
    guided = restorer(y, operator, sampler="psld", steps=2, guidance=PAG(1.0, layers="m1")).samples
    assert plain.shape == guided.shape == (1, 1, 3, 90, 150) and not torch.equal(plain, guided)
