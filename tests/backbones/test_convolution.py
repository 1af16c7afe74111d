"""Convolutions in fewer products are those of torch."""

import pytest
import torch
import torch.nn.functional as F

from restore.backbones import convolution


def make(batch, channels, height, width, out):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, height, width, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    return x, weight, torch.randn(out, generator=generator)


def assert_equal(found, expected, bound):
    assert found.shape == expected.shape and found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 5, 4, 12, 3), (3, 8, 16, 8, 6), (2, 96, 36, 32, 64)])  # several parts, too
def test_tiles(shape, has_bias):
    x, weight, bias = make(*shape)
    bias = bias if has_bias else None
    found = convolution.convolve_tiles(x, convolution.order_tiles(weight), bias)
    assert_equal(found, F.conv2d(x, weight, bias, padding=1), 2e-5)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 5, 3, 7, 2), (3, 8, 4, 1, 6)])
def test_enlarged(shape, has_bias):
    x, weight, bias = make(*shape)
    bias = bias if has_bias else None
    found = convolution.convolve_enlarged(x, convolution.order_enlarged(weight), bias)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    assert_equal(found, expected, 2e-6)


def test_tiles_only_where_they_fit_and_are_faster():
    for shape, out, expected in [
        ((1, 128, 16, 16), 128, True),
        ((1, 128, 18, 16), 128, False),
        ((1, 128, 8, 8), 128, False),
        ((4, 128, 8, 8), 128, True),
        ((1, 32, 64, 64), 32, False),
    ]:
        assert convolution.can_tile(torch.empty(shape), out) == expected
