"""The Python API on the embedded prior."""

import numpy as np
import pytest
import torch
from PIL import Image

import operators
import restore
from restore import method
from restore.backbones.base import Prediction
from restore.backbones.sizes import AnySize, blend_weights, window_starts
from restore.images import io
from restore.paths import configs_dir, data_dir

FACE = data_dir() / "photos" / "astronaut-face-64.png"


@pytest.fixture(scope="module")
def restorer():
    return restore.load("embedded", device="cpu")


@pytest.fixture(scope="module")
def face():
    return io.read_image(FACE).pixels


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


def test_result_holds_what_it_promises(restorer, face):
    A = operators.SuperResolution(4, noise=operators.GaussianNoise(0.05))
    y = A(face, torch.Generator().manual_seed(0))
    result = restorer(y, A, sampler="dps", guidance=restore.PAG(scale=1.0, layers="m1"), steps=4, samples=2, seed=0)
    assert result.samples.shape == (1, 2, 3, 64, 64) and result.samples.abs().max() <= 1
    assert [image.size for image in result.images] == [(64, 64)]
    assert result.mean.shape == result.spread.shape == (1, 3, 64, 64) and result.spread.max() > 0
    assert result.nfe == 8 and result.seconds > 0
    assert result.protocol["seed"] == 0 and "SuperResolution(" in result.protocol["operator"]
    expected = torch.linalg.vector_norm(y - A.A(result.samples[:, 0]))  # nothing was clamped much in four steps
    assert result.residual.shape == (1, 2) and float(result.residual[0, 0]) == pytest.approx(float(expected), rel=0.3)
    assert torch.allclose(result.residual_ratio, result.residual / (0.05 * y.numel() ** 0.5))


def test_no_hyper_parameter_is_needed(restorer, face):
    """With everything from the preset a restoration beats its own start: the measurement is explained."""
    A = operators.Denoising(noise=operators.GaussianNoise(0.2))
    y = A(face, torch.Generator().manual_seed(0))
    result = restorer(y, A, steps=25)
    assert result.protocol["preset_source"] and result.protocol["parameters"]["zeta"] > 0


def test_batches_ids_and_samples_do_not_change_a_result(restorer, face):
    A = operators.SuperResolution(4, noise=operators.GaussianNoise(0.05))
    faces = torch.cat([face, face.flip(-1), face.roll(5, -1)])
    y = A(faces, torch.Generator().manual_seed(0))
    options = {"steps": 12, "seed": 7, "guidance": restore.PAG(1.0, layers="m1"), "zeta": 0.1}
    together = restorer(y, A, image_ids=["a", "b", "c"], **options).samples
    batched = restorer(y, A, image_ids=["a", "b", "c"], batch_size=3, **options).samples
    assert relative(batched, together) < 1e-5
    reordered = restorer(y[[2, 0, 1]], A, image_ids=["c", "a", "b"], **options).samples
    assert torch.equal(reordered, together[[2, 0, 1]])
    alone = restorer(y[1:2], A, image_ids=["b"], samples=2, **options).samples
    assert torch.equal(alone[0, 0], together[1, 0]) and not torch.equal(alone[0, 0], alone[0, 1])
    again = restorer(y[1:2], A, image_ids=["other"], **options).samples
    assert not torch.equal(again[0, 0], together[1, 0])


def test_pil_in_pil_out(restorer):
    photo = Image.open(FACE).resize((16, 16))
    image = restorer(photo, operators.SuperResolution(4), steps=2).images[0]
    assert isinstance(image, Image.Image) and image.size == (64, 64)


def test_deepinv_physics_is_an_operator(restorer, face):
    dinv = pytest.importorskip("deepinv")
    physics = dinv.physics.Inpainting(
        img_size=(3, 64, 64), mask=(torch.rand(1, 64, 64) > 0.5).float(), noise_model=dinv.physics.GaussianNoise(0.05)
    )
    result = restorer(physics(face), physics, steps=2)
    assert result.samples.shape == (1, 1, 3, 64, 64) and torch.isfinite(result.residual).all()


@pytest.mark.parametrize("size", [(64, 64), (50, 37), (90, 61), (64, 131)])
def test_any_size(restorer, size):
    A = operators.GaussianBlur(5, 1.0)
    y = A(torch.zeros(1, 3, *size))
    result = restorer(y, A, steps=2)
    assert result.samples.shape[-2:] == size


def test_conditions_that_are_refused(restorer, face):
    A = operators.SuperResolution(4)
    y = A.A(face)
    for arguments, message in [
        ({"zetta": 1}, "did you mean 'zeta'"),
        ({"data_norm": "l1"}, "unknown data_norm"),
        ({"samples": 0}, "at least 1"),
        ({"image_ids": ["a", "b"]}, "different image_ids"),
        ({"sampler": "psld"}, "pixel backbone"),
        ({"reference": True}, "no reference preset"),
        ({"steps": 0}, "steps=0"),
        ({"guidance": restore.PAG(1.0, layers="i77")}, "i77"),
    ]:
        with pytest.raises(restore.RestoreError, match=message):
            restorer(y, A, **arguments)
    with pytest.raises(restore.RestoreError, match="NaN"):
        restorer(torch.full_like(y, float("nan")), A, steps=2)
    with pytest.raises(restore.RestoreError, match="batch_size"):
        restorer.generate(1, batch_size=0)
    with pytest.raises(restore.RestoreError, match="class labels"):
        restorer.generate(2, labels=[1])


def test_generation_depends_on_seed_and_index_alone(restorer):
    # Few steps divide by a tiny sqrt(alpha_bar) and magnify rounding: twelve are enough for the comparison.
    three = restorer.generate(3, steps=12, seed=3)
    assert torch.equal(three[:2], restorer.generate(2, steps=12, seed=3))
    assert relative(restorer.generate(3, steps=12, seed=3, batch_size=3), three) < 1e-5
    assert not torch.equal(three[0], three[1])
    assert restorer.generate(1, steps=2, size=(40, 72)).shape == (1, 3, 40, 72)


class Position:
    """A 'network' whose output tells which pixel it saw: any error of cutting or blending shows."""

    network, alphas_cumprod, attention, null_condition = torch.nn.Identity(), torch.ones(10), {}, None
    channels, resolution, multiple = 3, 16, 4

    def predict(self, x_t, t, condition=None):
        assert max(x_t.shape[-2:]) <= 16 and not any(side % 4 for side in x_t.shape[-2:])
        return Prediction(2 * x_t + 1, -x_t)


@pytest.mark.parametrize("size", [(16, 16), (16, 40), (37, 53), (9, 16), (3, 5), (100, 16)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_windows_are_invisible_for_a_local_network(size, checkpointing):
    any_size = AnySize(Position(), max_windows=5, checkpointing=checkpointing)
    x = torch.randn(2, 3, *size, requires_grad=True)
    prediction = any_size.predict(x, 3)
    assert relative(prediction.eps, 2 * x + 1) < 1e-6 and relative(prediction.variance, -x) < 1e-6
    (grad,) = torch.autograd.grad(prediction.eps.sum(), x)
    assert relative(grad, torch.full_like(x, 2)) < 1e-6


def test_window_geometry():
    for length in range(16, 90):
        starts = window_starts(length, 16, 8)
        assert starts[0] == 0 and starts[-1] == max(0, length - 16)
        assert all(0 < b - a <= 8 for a, b in zip(starts, starts[1:], strict=False))
        total = torch.zeros(length)
        for start, weight in zip(starts, blend_weights(starts, 16, length), strict=True):
            total[start : start + 16] += weight
        assert torch.allclose(total, torch.ones(length), atol=1e-6)


def test_zeta_keeps_its_strength_at_other_sizes(restorer, monkeypatch):
    from restore import restorer as module

    seen = []
    monkeypatch.setattr(module, "dps", lambda *a, **k: seen.append(k["zeta"]) or torch.zeros_like(k["x_T"]))
    module_dps = module.dps
    for side in (64, 128):
        y = torch.zeros(1, 3, side, side)
        noise_parameters = {"zeta": 0.5}
        restorer._sample(module_dps, y, operators.Denoising(), [(0, "a", 0)], 2, None, None, None, noise_parameters)
    assert seen == pytest.approx([0.5, 1.0])


def test_presets():
    ffhq = method.find("adm-ffhq-256", "super_resolution", "dps")
    assert ffhq.parameters == {"zeta": 1.0} and ffhq.guidance["pag"]["scale"] == 1.0 and "Table 7" in ffhq.source
    sd = method.find("sd-1.5", "motion_blur", "psld")
    assert sd.parameters == {"eta": 0.15, "gamma": 0.015}
    assert method.find("sd-1.5", "motion_blur", "psld", "imagenet").parameters == {"eta": 0.3, "gamma": 0.03}
    assert sd.parameters_for(None) == {"eta": 1.0, "gamma": 0.1}
    assert sd.parameters_for(method.build_guidance(sd.guidance)) == sd.parameters
    assert method.find("someone's.pt", "inpainting", "dps").parameters == {"zeta": 0.5}
    with pytest.raises(restore.RestoreError, match="unknown guidance"):
        method.build_guidance({"sag": {}})
    for file in (configs_dir() / "method").glob("*.yaml"):
        assert all(entry["source"] for entry in method._entries()), file


def test_numpy_and_uint8_round_trip(face):
    pixels = np.asarray(Image.open(FACE).convert("RGB"))
    assert np.array_equal(io.to_uint8(io.to_tensor(pixels)[0]), pixels)
