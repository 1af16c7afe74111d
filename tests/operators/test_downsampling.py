"""Super-resolution at sizes the factor divides and does not divide; colorization."""

import math

import pytest
import torch
import torch.nn.functional as F

import operators
from operators.separable import downsampling_matrix


def image(size, seed=0):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("factor", [1, 2, 3, 5, 8])
def test_average_is_pooling(factor):
    x = image((6 * factor, 4 * factor))
    assert relative(operators.SuperResolution(factor, method="average").A(x), F.avg_pool2d(x, factor)) < 1e-12


@pytest.mark.parametrize("factor", [2, 4, 7])
def test_bicubic_interior_is_torchs_antialiased_cubic(factor):
    """torch's antialiased bicubic has the same kernel and another border: equal from 2 pixels inside."""
    x = image((12 * factor, 9 * factor))
    y = operators.SuperResolution(factor).A(x)
    expected = F.interpolate(x, size=y.shape[2:], mode="bicubic", antialias=True)
    assert relative(y[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2]) < 1e-6
    assert relative(y, expected) > 1e-4


@pytest.mark.parametrize("method", ["bicubic", "average"])
@pytest.mark.parametrize("size, factor", [(33, 4), (35, 8), (7, 5), (64, 3), (8, 8), (5, 5)])
def test_matrix_is_concentric_and_normalised(size, factor, method):
    matrix = downsampling_matrix(size, factor, method)
    assert matrix.shape == (math.ceil(size / factor), size)
    assert (matrix.sum(1) - 1).abs().max() < 1e-12
    assert (matrix - matrix.flip(0, 1)).abs().max() < 1e-12  # mirrored image, mirrored measurement
    if method == "bicubic" and size >= 8 * factor:  # a ramp stays a ramp away from the border
        slope = (matrix @ torch.arange(size, dtype=torch.float64)).diff()[2:-2]
        assert (slope - factor).abs().max() < 1e-9


def test_factor_one_is_the_identity():
    x = image((9, 7))
    assert relative(operators.SuperResolution(1).A(x), x) < 1e-12


def test_image_size_is_used_if_the_factor_does_not_divide_it():
    x = image((33, 47))
    operator = operators.SuperResolution(4, image_size=(33, 47))
    y = operator.A(x)
    assert y.shape[2:] == (9, 12) and operator.A_adjoint(y).shape == x.shape == operator.A_dagger(y).shape
    assert relative(operator.A(operator.A_dagger(y)), y) < 1e-10
    free = operators.SuperResolution(4)
    assert torch.equal(free.A(x), y) and free.A_adjoint(y).shape[2:] == (36, 48)
    reference = operators.SuperResolution(4, image_size=(33, 47), adjoint="reference")
    assert reference.A_adjoint(y).shape == x.shape
    with pytest.raises(operators.RestoreError, match=r"y must be 9 x 12.*33 x 47 downsampled by 4, got 8 x 12"):
        operator.A_adjoint(y[..., :8, :])
    with pytest.raises(operators.RestoreError, match="33 x 47"):
        operator.A(image((36, 48)))


def test_bad_factors():
    for factor in (0, -2, 2.5, "8", None, True):
        with pytest.raises(operators.RestoreError, match="factor must be an integer"):
            operators.SuperResolution(factor)
    with pytest.raises(operators.RestoreError, match="factor must be at most .*32 x 15, got 16"):
        operators.SuperResolution(16).A(image((32, 15)))
    with pytest.raises(operators.RestoreError, match="factor must be at most .*32 x 15, got 16"):
        operators.SuperResolution(16, image_size=(32, 15))
    with pytest.raises(operators.RestoreError, match="'bicubic' or 'average'"):
        operators.SuperResolution(4, method="nearest")


def test_colorization():
    x = image((8, 9))
    operator = operators.Colorization()
    expected = (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]
    assert relative(operator.A(x), expected) < 1e-14
    grey = torch.rand(2, 1, 8, 9, dtype=torch.float64)
    assert relative(operator.A(grey.expand(2, 3, 8, 9)), grey) < 1e-14
    assert relative(operator.A(operator.A_dagger(grey)), grey) < 1e-14
    mean = operators.Colorization(weights=[1 / 3] * 3)
    assert relative(mean.A(x), x.mean(1, keepdim=True)) < 1e-14
    for weights in ([1, 1, 1], [0.5, 0.5], [float("nan"), 0.5, 0.5]):
        with pytest.raises(operators.RestoreError, match="weights"):
            operators.Colorization(weights=weights)
    with pytest.raises(operators.RestoreError, match="3 channels, got 1"):
        operator.A(grey)
    with pytest.raises(operators.RestoreError, match="1 channels, got 3"):
        operator.A_adjoint(x)
