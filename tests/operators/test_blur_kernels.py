"""Blur kernels, and blurring by matrices and by FFT."""

import numpy as np
import pytest
import scipy.ndimage
import torch

import operators
from operators import blur as blur_module


def image(size, dtype=torch.float64, seed=0):
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * x - 1).to(dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (5, 9), (4, 4), (1, 6), (31, 2)], ids=str)
def test_any_kernel_is_scipys_correlation(shape):
    """scipy calls our reflection 'mirror' and anchors a kernel of n taps at n // 2, as we do."""
    kernel = np.random.RandomState(0).rand(*shape)
    kernel /= kernel.sum()
    x = image((33, 40))
    expected = np.stack([scipy.ndimage.correlate(c, kernel, mode="mirror") for c in x.flatten(0, 1).numpy()])
    y = operators.Blur(kernel).A(x)
    assert relative(y.flatten(0, 1), torch.from_numpy(expected)) < 1e-12


@pytest.mark.parametrize("size", [(blur_module.SEPARABLE_LIMIT, 32), (blur_module.SEPARABLE_LIMIT + 1, 32)], ids=str)
def test_both_paths_of_the_gaussian_agree(size):
    gaussian = operators.GaussianBlur(61, 3.0)
    dense, x = operators.Blur(gaussian.kernel), image(size)
    assert relative(gaussian.A(x), dense.A(x)) < 1e-12
    assert relative(gaussian.A_adjoint(x), dense.A_adjoint(x)) < 1e-12
    assert relative(gaussian.A(x.float()), dense.A(x.float())) < 1e-5
    assert operators.check_operator(gaussian, (1, 3, *size)) <= 1e-10


def test_even_gaussian():
    gaussian = operators.GaussianBlur(8, 1.0)
    assert (
        relative(gaussian.A(image((20, 21))), operators.Blur(operators.gaussian_kernel(8, 1.0)).A(image((20, 21))))
        < 1e-12
    )


def test_constant_images_are_kept():
    for operator in (operators.GaussianBlur(), operators.MotionBlur(seed=1), operators.SuperResolution(3)):
        y = operator.A(torch.full((1, 3, 33, 48), 0.7, dtype=torch.float64))
        assert (y - 0.7).abs().max() < 1e-12


def test_radius_may_reach_but_not_exceed_the_image():
    operators.GaussianBlur(61).A(image((31, 40)))
    operators.MotionBlur(61).A(image((31, 31)))
    for make in (operators.GaussianBlur, operators.MotionBlur):
        with pytest.raises(operators.RestoreError, match=r"radius 30.*30 x 64.*smaller kernel_size"):
            make(61, image_size=(30, 64))
        with pytest.raises(operators.RestoreError, match=r"radius 30.*64 x 30"):
            make(61).A(image((64, 30)))
        with pytest.raises(operators.RestoreError, match="radius 30"):
            make(61).A_adjoint(image((64, 30)))


def test_bad_kernels():
    cases = [
        (torch.ones(3, 3), "kernel must sum to one, got a sum of 9.*normalize=True"),
        (torch.zeros(3, 3), "sum of 0"),
        (torch.full((3, 3), float("nan")), "NaN"),
        (torch.ones(3), "2-D"),
        (torch.ones(2, 2, 3, 3), "2-D"),
        (torch.ones(0, 3), "not empty"),
        ("motion.png", "kernel must be a tensor or array, got str"),
        (None, "kernel must be a tensor or array"),
    ]
    for kernel, message in cases:
        with pytest.raises(operators.RestoreError, match=message):
            operators.Blur(kernel)
    with pytest.raises(operators.RestoreError, match="sum of 0"):
        operators.Blur(torch.zeros(3, 3), normalize=True)
    x = image((9, 9))
    assert (
        relative(operators.Blur(torch.ones(3, 3), normalize=True).A(x), operators.Blur(np.full((3, 3), 1 / 9)).A(x))
        < 1e-12
    )
    assert operators.Blur(torch.full((1, 1, 3, 3), 1 / 9)).kernel.shape == (3, 3)


def test_bad_options():
    for options, message in [
        ({"kernel_size": 0}, "kernel_size"),
        ({"kernel_size": 6.5}, "kernel_size"),
        ({"std": 0.0}, "std must be positive"),
        ({"std": -1.0}, "std must be positive"),
        ({"std": float("nan")}, "finite"),
    ]:
        with pytest.raises(operators.RestoreError, match=message):
            operators.GaussianBlur(**options)
    for options, message in [
        ({"intensity": 1.5}, r"intensity must lie in \[0, 1\]"),
        ({"intensity": "strong"}, "finite number"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
    ]:
        with pytest.raises(operators.RestoreError, match=message):
            operators.MotionBlur(**options)


def moments(kernel):
    """Centre of mass relative to pixel size // 2, and the larger and smaller standard deviation."""
    kernel, size = kernel.numpy(), len(kernel)
    grid = np.stack(np.meshgrid(*[np.arange(size) - size // 2] * 2, indexing="ij")).reshape(2, -1)
    mean = grid @ kernel.ravel()
    covariance = np.cov(grid, aweights=kernel.ravel(), bias=True)
    small, large = np.sqrt(np.linalg.eigvalsh(covariance).clip(0))
    return mean, large, small


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9, 16, 33, 53, 61, 121])
@pytest.mark.parametrize("intensity", [0.0, 0.5, 1.0])
def test_motion_kernels_of_any_size(size, intensity):
    """The reference yields NaN below 54 pixels."""
    for seed in range(4):
        kernel = operators.motion_kernel(size, intensity, seed)
        assert kernel.shape == (size, size) and (kernel >= 0).all() and abs(kernel.sum().item() - 1) < 1e-12
        assert np.abs(moments(kernel)[0]).max() < 1e-9


def test_motion_kernel_depends_only_on_its_seed():
    torch.manual_seed(1)
    np.random.seed(1)
    first = operators.motion_kernel(61, 0.5, 0)
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(first, operators.motion_kernel(61, 0.5, 0))
    others = [operators.motion_kernel(61, 0.5, seed) for seed in range(1, 6)]
    assert all((first - other).abs().sum() > 0.5 for other in others)
    assert torch.equal(operators.MotionBlur(61, 0.5, seed=0).kernel, first)


def test_motion_kernel_is_pinned():
    """Measurements of a seed stay the same between versions: large and small width, largest weight."""
    kernel = operators.motion_kernel(61, 0.5, 0)
    _, large, small = moments(kernel)
    assert (large, small, kernel.max().item()) == pytest.approx((8.216111754, 2.536778310, 0.03112910558), rel=1e-6)


def test_intensity_bends_the_path():
    """0 is a straight line (as thin as a pixel); more shake makes it wider relative to its length."""

    def bend(intensity):
        shapes = [moments(operators.motion_kernel(61, intensity, seed)) for seed in range(20)]
        return np.mean([small / large for _, large, small in shapes])

    straight = [moments(operators.motion_kernel(61, 0.0, seed))[2] for seed in range(20)]
    assert max(straight) < 0.6
    assert bend(0.0) < 0.12 < bend(0.3) < bend(1.0) < 0.9


def test_gaussian_kernel_width():
    _, large, small = moments(operators.gaussian_kernel(61, 3.0))
    assert large == pytest.approx(small, rel=1e-6) and 2.95 < large < 3.0  # the tails are cut at 4 std
