"""decoder_sigma: y corrects the last image of a latent prior, given the decoder's error."""

import pytest
import torch

import operators
import restore

SIGMA = 0.05


@pytest.fixture(scope="module")
def latents():
    return restore.load("embedded-latent", device="cpu")


def known_mask(height=128, width=128):
    mask = torch.ones(1, 1, height, width)
    mask[..., 32:96, 40:104] = 0
    return mask


@pytest.mark.parametrize("sampler", ["psld", "diffpir"])
@pytest.mark.parametrize("sigma", [SIGMA, 0.0])
def test_known_pixels_are_the_mean_of_both(latents, sampler, sigma):
    """Weighted by their precisions; y itself without noise. The hole is the decoder's."""
    mask = known_mask()
    A = operators.Inpainting(mask, noise=operators.GaussianNoise(sigma) if sigma else None)
    y = A(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    options = {"sampler": sampler, "steps": 3, "guidance": None, "seed": 1}
    plain = latents(y, A, decoder_sigma=0.0, **options).samples[:, 0]
    found = latents(y, A, decoder_sigma=0.1, **options).samples[:, 0]
    weight = 1 / (1 + (sigma / 0.1) ** 2)
    expected = torch.where(mask > 0, weight * y + (1 - weight) * plain, plain)
    assert (plain - y)[..., :32, :].abs().mean() > 0.1
    assert torch.allclose(found.clamp(-1, 1), expected.clamp(-1, 1), atol=1e-3)  # samplers assume some noise


def test_priors_and_operators_that_it_does_not_apply_to(latents):
    """Before anything is sampled."""

    def never(step):
        raise AssertionError("sampling began")

    y = torch.zeros(1, 3, 128, 128)
    with pytest.raises(restore.RestoreError, match="psld with decoder_sigma needs a linear operator"):
        latents(y, operators.Clipping(2.0), sampler="psld", steps=2, decoder_sigma=0.1)
    with pytest.raises(restore.RestoreError, match="decoder_sigma must be a finite number >= 0"):
        latents(y, operators.Denoising(), sampler="diffpir", steps=2, decoder_sigma=-1.0)
    pixels = restore.load("embedded", device="cpu")
    with pytest.raises(restore.RestoreError, match="decoder_sigma.*pixel prior"):
        pixels(y[..., :64, :64], operators.Denoising(), sampler="diffpir", steps=2, decoder_sigma=0.1, callback=never)
