"""Any image size: padding, windows, latents."""

import pytest
import torch
from tiny_sd import SCHEDULER, tiny_unet, tiny_vae

import operators
from restore.backbones.base import Backbone, Pixels, Prediction
from restore.backbones.schedule import Schedule
from restore.backbones.sizes import Sized, default_overlap, make_blend_weights, place_windows
from restore.backbones.stable_diffusion import StableDiffusion
from restore.guidance import PAG
from restore.samplers.noise import ImageNoise
from restore.samplers.psld import psld


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


class Position(Pixels):
    """A 'network' whose output tells which pixel it saw: any error of cutting or blending shows."""

    network, schedule, attention, null_condition = torch.nn.Identity(), Schedule.from_config({}), {}, None
    channels, resolution, multiple = 3, 16, 4

    def predict(self, x_t, t, condition=None):
        assert max(x_t.shape[-2:]) <= 16 and not any(side % 4 for side in x_t.shape[-2:])
        return Prediction(2 * x_t + 1, -x_t)


@pytest.mark.parametrize("size", [(16, 16), (16, 40), (37, 53), (9, 16), (3, 5), (100, 16)])
@pytest.mark.parametrize("recompute_windows", [False, True])
def test_windows_are_invisible_for_a_local_network(size, recompute_windows):
    any_size = Sized(Position(), *size, max_windows=5, recompute_windows=recompute_windows)
    x = torch.randn(2, 3, *size, requires_grad=True)
    prediction = any_size.predict(x, 3)
    assert any_size.shape == (3, *size) and any_size.evaluations == 1
    assert relative(prediction.eps, 2 * x + 1) < 1e-6 and relative(prediction.variance, -x) < 1e-6
    with torch.no_grad():
        assert torch.equal(any_size.predict(x, 3).eps, prediction.eps)
    (grad,) = torch.autograd.grad(prediction.eps.sum(), x)
    assert relative(grad, torch.full_like(x, 2)) < 1e-6


def test_window_geometry():
    for length in range(16, 90):
        starts = place_windows(length, 16, 8)
        assert starts[0] == 0 and starts[-1] == max(0, length - 16)
        assert all(0 < b - a <= 8 for a, b in zip(starts, starts[1:], strict=False))
        total = torch.zeros(length)
        for start, weight in zip(starts, make_blend_weights(starts, 16, length), strict=True):
            total[start : start + 16] += weight
        assert torch.allclose(total, torch.ones(length), atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (37, 50), (5, 9)])
def test_latents_of_any_image_size(size):
    null = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    inner = StableDiffusion(tiny_unet(), tiny_vae(), Schedule.from_config(SCHEDULER), null)
    sized = Sized(inner, *size)
    assert isinstance(sized, Backbone)
    shape = (2, *sized.shape)
    assert all(side % inner.multiple == 0 for side in shape[2:])
    # no side could be one step smaller
    assert all((side - inner.multiple) * inner.downscale < pixels for side, pixels in zip(shape[2:], size, strict=True))
    assert all(side * inner.downscale >= pixels for side, pixels in zip(shape[2:], size, strict=True))
    noise = ImageNoise([(0, "a", 0), (0, "b", 0)])
    z = noise(0, shape, "start")
    image = sized.decode(z)
    assert image.shape == (2, 3, *size) and torch.equal(image, inner.decode(z)[..., : size[0], : size[1]])
    assert sized.encode(image).shape == shape
    if size == (32, 32):
        assert torch.equal(sized.encode(image), inner.encode(image))
    mask = torch.ones(1, 1, *size)
    mask[..., :3, :4] = 0
    operator = operators.Inpainting(mask)
    options = {"steps": [601, 301, 1], "eta": 0.1, "gamma": 0.01, "noise": noise}
    x = psld(sized, operator, operator.A(image), guidance=PAG(2.0, layers="i5"), **options)
    assert x.shape == image.shape and x.isfinite().all()


def test_windows_of_a_network_without_attention_overlap_by_a_quarter():
    plain, attending = Position(), Position()
    attending.attention = {"mid_block.attentions.0": None}
    assert (default_overlap(plain), default_overlap(attending)) == (0.25, 0.5)
    assert (Sized(plain, 99, 99).overlap, Sized(plain, 99, 99, overlap=0.0).overlap) == (0.25, 0.0)


def test_windows_outside_of_the_region_are_not_computed():
    """In the region the prediction is that of all windows, to the byte; elsewhere nothing is predicted."""

    class Counted(Position):
        windows = 0

        def predict(self, x_t, t, condition=None):
            self.windows += len(x_t)
            return super().predict(x_t, t, condition)

    size, x = (37, 53), torch.randn(1, 3, 37, 53, generator=torch.Generator().manual_seed(0))
    region = torch.zeros(1, 1, *size)
    region[..., 30:37, 4:9] = 1
    whole, part = Counted(), Counted()
    expected = Sized(whole, *size).predict(x, 3)
    sized = Sized(part, *size, region=region)
    found = sized.predict(x, 3)
    inside = region.expand_as(x) > 0
    assert torch.equal(found.eps[inside], expected.eps[inside])
    assert not found.eps[..., 30:].any() and 0 < 3 * part.windows < whole.windows
    assert torch.equal(sized.predict(x[..., :16, :40], 3).eps, Sized(whole, 16, 40).predict(x[..., :16, :40], 3).eps)
