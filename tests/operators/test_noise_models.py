"""Noise: its level on [-1, 1], and that the noise of an image depends on neither batch size nor order."""

import pytest
import torch

import operators
from operators import GaussianNoise, PoissonNoise


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def image(size=64, batch=4):
    return 2 * torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) - 1


@pytest.mark.parametrize(
    "name, options",
    [
        ("denoising", {}),
        ("gaussian_blur", {"kernel_size": 9, "std": 1.5}),
        ("super_resolution", {"factor": 2}),
        ("inpainting_box", {}),
    ],
)
def test_sigma_is_the_std_on_the_range_minus_one_to_one(name, options):
    """std(y - A x) = sigma, within 4 standard errors sigma / sqrt(2 m)."""
    sigma, x = 0.05, image(128)
    operator = operators.build_operator(
        {"name": name, **options, "noise": {"name": "gaussian", "sigma": sigma}}, image_size=128
    )
    residual = operator(x, torch.Generator().manual_seed(1)) - operator.A(x)
    error = sigma / (2 * residual.numel()) ** 0.5
    assert abs(residual.std().item() - sigma) < 4 * error < 0.02 * sigma
    assert abs(residual.mean().item()) < 4 * sigma / residual.numel() ** 0.5
    assert operator.noise.std(residual).unique().item() == pytest.approx(sigma)


@pytest.mark.parametrize("rate", [0.2, 1.0, 10.0])
def test_poisson_mean_and_variance(rate):
    """Mean y and variance 2 (y + 1) / (255 rate) at each level, within 4.5 standard errors; unclipped."""
    noise, m = PoissonNoise(rate, clip=False), 200_000
    for level in (-0.9, -0.3, 0.0, 0.8, 1.0):
        noisy = noise(torch.full((1, 1, 1, m), level), torch.Generator().manual_seed(3)).double()
        variance = 2 * (level + 1) / (255 * rate)
        assert abs(noisy.mean().item() - level) < 4.5 * (variance / m) ** 0.5 + 1e-7
        assert noisy.var().item() == pytest.approx(variance, rel=0.03)
        assert noise.std(noisy.new_full((1,), level)).item() ** 2 == pytest.approx(variance, rel=1e-6)


def test_poisson_counts_are_integers_and_clipped():
    y = image()
    noisy = PoissonNoise(0.5, clip=False)(y, torch.Generator().manual_seed(0))
    counts = (noisy.double() + 1) / 2 * 255 * 0.5
    assert (counts - counts.round()).abs().max() < 1e-3 and noisy.max() > 1
    clipped = PoissonNoise(0.5)(y, torch.Generator().manual_seed(0))
    assert torch.equal(clipped, noisy.clamp(-1, 1))
    dark = PoissonNoise(1.0)(torch.full((1, 3, 8, 8), -1.5), torch.Generator().manual_seed(0))
    assert (dark == -1).all()  # nothing is counted where there is no light


@pytest.mark.parametrize("noise", [GaussianNoise(0.05), PoissonNoise(1.0)], ids=str)
def test_an_images_noise_is_its_own(noise):
    """Neither batch size nor order matters with one generator per image."""
    y = image()
    together = noise(y, generators([5, 0, 7, 8]))
    single = torch.cat([noise(y[i : i + 1], generators([seed])) for i, seed in enumerate([5, 0, 7, 8])])
    assert torch.equal(together, single)
    order = [2, 0, 3, 1]
    assert torch.equal(noise(y[order], generators([7, 5, 8, 0])), together[order])
    assert torch.equal(noise(y, generators([5, 0, 7, 8])), together)
    assert not torch.equal(noise(y, generators([6, 0, 7, 8]))[0], together[0])


@pytest.mark.parametrize("noise", [GaussianNoise(0.05), PoissonNoise(1.0)], ids=str)
def test_deterministic_and_the_same_in_every_precision(noise):
    y = image(16)
    torch.manual_seed(0)
    first = noise(y, torch.Generator().manual_seed(0))
    torch.manual_seed(9)
    assert torch.equal(first, noise(y, torch.Generator().manual_seed(0)))
    assert torch.equal(first, noise(y, generators([0, 1, 2, 3]))) is False
    assert not torch.equal(first, noise(y, torch.Generator().manual_seed(1)))
    torch.manual_seed(4)
    from_global = noise(y)
    torch.manual_seed(4)
    assert torch.equal(from_global, noise(y))
    wide = noise(y.double(), torch.Generator().manual_seed(0))
    assert wide.dtype == torch.float64 and (wide - first).abs().max() < 1e-6
    assert noise(y.half(), torch.Generator().manual_seed(0)).dtype == torch.float16


def test_gradient_flows_through_gaussian_noise():
    y = image(8).requires_grad_()
    GaussianNoise(0.05)(y, torch.Generator().manual_seed(0)).sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))


def test_no_noise():
    x = image(16)
    assert torch.equal(operators.Denoising()(x), x)
    assert torch.equal(GaussianNoise(0)(x, torch.Generator().manual_seed(0)), x)


def test_bad_noise():
    for value in (-0.1, float("nan"), float("inf"), "0.05", None, True):
        with pytest.raises(operators.RestoreError, match="sigma must"):
            GaussianNoise(value)
    for value in (0, -1.0, float("nan"), "1"):
        with pytest.raises(operators.RestoreError, match="rate must"):
            PoissonNoise(value)
    with pytest.raises(operators.RestoreError, match="each of the 4 images, got 3"):
        GaussianNoise(0.05)(image(8), generators([0, 1, 2]))
    with pytest.raises(operators.RestoreError, match="each of the 4 images, got int"):
        GaussianNoise(0.05)(image(8), 7)
    with pytest.raises(operators.RestoreError, match="noise model"):
        operators.Denoising(noise=0.05)
