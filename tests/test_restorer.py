"""The Python API on the embedded prior."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import operators
import restore
from restore.bench.baselines import baseline
from restore.images import io
from restore.metrics.single import psnr
from restore.paths import data_dir
from restore.restoration import measure_residual

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
    """With everything from the preset the measurement is explained, and the noise is reduced."""
    A = operators.Denoising(noise=operators.GaussianNoise(0.2))
    y = A(face, torch.Generator().manual_seed(0))
    result = restorer(y, A, steps=25)
    assert result.protocol["method"]["source"]
    assert float((result.samples[:, 0] - face).square().mean()) < 0.5 * float((y - face).square().mean())


def test_the_default_beats_the_linear_filters_on_the_shipped_face(restorer, face):
    """A prior that adds nothing would end at the baseline."""
    sigma = operators.GaussianNoise(0.05)
    for A, task, margin in (
        (operators.GaussianBlur(15, 1.5, noise=sigma), "gaussian-blur", 1.0),
        (operators.SuperResolution(4, noise=sigma), "sr4", 1.0),
    ):
        y = A(face, torch.Generator().manual_seed(0))
        result = restorer(y, A, task=task, quality="fast")
        gained = psnr(result.samples[:, 0], face) - psnr(baseline(y, A), face)
        assert float(gained) > margin, f"{task}: {float(gained):.2f} dB"
        assert 0.5 < float(result.residual_ratio) < 1.2


def test_defaults_apply_where_they_can(restorer):
    """Samplers for linear operators with Gaussian noise are not chosen for others."""
    linear, poisson = operators.SuperResolution(4), operators.SuperResolution(4, noise=operators.PoissonNoise(1.0))
    assert restorer.method(linear).sampler == "diffpir" and restorer.method(linear).guidance is None
    assert restorer.method(poisson).sampler == "dps" and restorer.method(operators.Clipping()).sampler == "fastdips"


def test_residual_of_holes(restorer, face):
    """The holes of a damaged photo hold no noise and are no part of m; those of a measurement made here are."""
    mask = operators.random_mask(64, fraction=(0.7, 0.7), seed=0)
    A = operators.Inpainting(mask, noise=operators.GaussianNoise(0.1))
    y = A(face, torch.Generator().manual_seed(0))
    for measured in (y, y * mask):
        _, ratio = measure_residual(face, measured, A)
        assert float(ratio) == pytest.approx(1, abs=0.03)


def test_region_goes_with_samplers_of_pixels_alone(restorer):
    """A norm over the whole of y, other orientations and guidance see what was not computed."""
    mask = torch.ones(1, 1, 64, 128)
    mask[..., 8:24, 8:24] = 0
    A = operators.Inpainting(mask, noise=operators.GaussianNoise(0.05))
    y = A(torch.zeros(1, 3, 64, 128), torch.Generator().manual_seed(0))
    options = {"sampler": "diffpir", "steps": "quad:3", "guidance": None}
    whole, part = (restorer(y, A, region=region, **options).samples for region in (None, 1 - mask))
    hole = (1 - mask).expand_as(whole[:, 0]) > 0
    assert torch.allclose(whole[:, 0][hole], part[:, 0][hole], atol=1e-3) and not torch.allclose(whole, part, atol=0.01)
    for changes in ({"sampler": "dps", "zeta": 1.0, "steps": 3}, {"guidance": restore.PAG(1.0, "m1")}):
        with pytest.raises(restore.RestoreError, match="region must be left out"):
            restorer(y, A, region=1 - mask, **options | changes)
    with pytest.raises(restore.RestoreError, match="region must be .* got"):
        restorer(y, A, region=torch.ones(1, 1, 64, 64), **options)


def test_what_keeps_pictures_goes_with_one_orientation(restorer, face):
    A = operators.Denoising(noise=operators.GaussianNoise(0.1))
    for guidance in (restore.PAG(1.0, "m1", every=2), restore.guidance.Guidance((restore.PAG(1.0, "m1"),), "apg")):
        with pytest.raises(restore.RestoreError, match="orientations must be 'one'"):
            restorer(A(face), A, sampler="dpir", steps=2, orientations="four", guidance=guidance)
        assert restorer(A(face), A, sampler="dpir", steps=2, guidance=guidance).samples.isfinite().all()


def test_noise_with_a_proximal_step_of_its_own_is_not_white(restorer, face):
    A = operators.JPEG(10)
    with pytest.raises(restore.RestoreError, match="pnpdm needs white noise, got JPEGNoise"):
        restorer(A(face), A, sampler="pnpdm", steps="karras:5", iterations=2, guidance=None)


def test_nonlinear_damage_on_latents(face):
    """The default runs; PSLD's glue, which needs a transpose, says so at once."""
    latent, A = restore.load("embedded-latent"), operators.Clipping(2.0, noise=operators.GaussianNoise(0.05))
    assert latent.method(A).sampler == "fastdips"
    assert latent(A(face), A, steps=2, admm_steps=1).samples.isfinite().all()
    with pytest.raises(restore.RestoreError, match="psld needs a linear operator unless gamma=0, got clipping"):
        latent(A(face), A, sampler="psld", steps=2, guidance=None)


NONLINEAR = [operators.Clipping, operators.PhaseRetrieval, operators.NonlinearBlur, operators.JPEGRounding]


@pytest.mark.parametrize("sampler", ["dps", "daps", "fastdips", "reddiff"])
@pytest.mark.parametrize("kind", NONLINEAR)
def test_presets_for_nonlinear_operators(restorer, face, kind, sampler):
    """None asks for the transpose or the pseudo-inverse that such an operator has not."""
    A = kind(noise=operators.GaussianNoise(0.05))
    result = restorer(A(face), A, sampler=sampler, guidance=None, steps=2)
    assert result.samples.isfinite().all()


def test_an_overexposed_face(restorer, face):
    """The default is ahead of what dividing by the gain would give, which DPS was not."""
    A = operators.Clipping(2.0, noise=operators.GaussianNoise(0.05))
    y = A(face, torch.Generator().manual_seed(0))
    result = restorer(y, A, quality="fast")
    assert float(psnr(result.samples[:, 0], face) - psnr(y / 2, face)) > 2.0


def test_one_estimate_for_a_photo_in_windows_and_samples_by_another_sampler(restorer):
    A = operators.Denoising(noise=operators.GaussianNoise(0.1))
    assert (
        restorer.method(A, size=(80, 64)).sampler == "dpir" and restorer.method(A, size=(64, 64)).sampler == "diffpir"
    )
    assert restorer.method(A, size=(80, 64), samples=2).sampler == "diffpir"
    y = A(torch.zeros(1, 3, 80, 64), torch.Generator().manual_seed(0))
    result = restorer(y, A)
    assert result.protocol["method"]["sampler"] == "dpir" and result.nfe == 4  # orientations
    assert float(result.samples.square().mean()) < 0.1 * float(y.square().mean())
    with pytest.raises(restore.RestoreError, match="samples must be 1 for the deterministic sampler dpir"):
        restorer(y, A, sampler="dpir", samples=2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_switched_off_outside(face, mode):
    """Habitual for users of diffusers: loading, measuring and restoring all inside the block."""
    A = operators.SuperResolution(4)
    expected = restore.load("embedded")(A.A(face), A, sampler="dps", steps=2).samples
    with mode():
        A = operators.Compose(operators.Inpainting(torch.eye(64).view(1, 1, 64, 64)), operators.SuperResolution(4))
        restorer = restore.load("embedded")
        y = A(io.read_image(FACE).pixels)
        assert restorer(y, A, sampler="dps", steps=2).samples.shape == (1, 1, 3, 64, 64)
        A = operators.SuperResolution(4)
        assert torch.equal(restorer(A.A(face), A, sampler="dps", steps=2).samples, expected)
        assert torch.equal(restorer.generate(1, steps=2), restore.load("embedded").generate(1, steps=2))


def test_a_sampler_of_ones_own(restorer, face):
    """A function of the contract needs no entry anywhere, and its name is written down so that it is found again."""

    def adjoint(prior, operator, y, *, noise, steps, guidance=None, condition=None, callback=None, gain=1.0):
        return gain * operator.A_adjoint(y)

    A = operators.Denoising()
    result = restorer(face, A, sampler=adjoint, steps=1, gain=0.5)
    assert torch.equal(result.samples[:, 0], 0.5 * face) and result.nfe == 0
    assert "adjoint" in result.protocol["method"]["sampler"]
    with pytest.raises(restore.RestoreError, match="has no parameter 'gian'; did you mean 'gain'"):
        restorer(face, A, sampler=adjoint, steps=1, gian=0.5)
    with pytest.raises(restore.RestoreError, match="steps must be given"):
        restorer(face, A, sampler=adjoint)


def test_a_method_is_resolved_once_and_run_as_it_is(restorer, face):
    A = operators.SuperResolution(4, noise=operators.GaussianNoise(0.05))
    y = A(face, torch.Generator().manual_seed(0))
    method = restorer.method(A, sampler="dps", task="sr4", steps=3, parameters={"zeta": 0.7}, guidance=None)
    assert isinstance(method, restore.Method) and (method.steps, method.parameters["zeta"]) == (3, 0.7)
    result = restorer(y, A, method, samples=2, seed=1)
    short = restorer(y, A, sampler="dps", task="sr4", steps=3, zeta=0.7, guidance=None, samples=2, seed=1)
    assert torch.equal(result.samples, short.samples) and result.protocol == short.protocol
    assert result.protocol["method"] == method.describe()
    for choice in ({"steps": 4}, {"zeta": 1.0}, {"guidance": None}, {"sampler": "ddrm"}):
        with pytest.raises(restore.RestoreError, match=f"{next(iter(choice))}= belongs to the method"):
            restorer(y, A, method, **choice)
    with pytest.raises(restore.RestoreError, match="deterministic sampler dpir"):
        restorer(y, A, restorer.method(A, sampler="dpir"), samples=2)


def test_a_samplers_parameter_may_have_the_name_of_a_keyword(restorer, face):
    """It travels in the method; as a keyword it would be swallowed, which is said."""

    def shifted(prior, operator, y, *, noise, steps, guidance=None, condition=None, callback=None, seed=0.0, label=1.0):
        return operator.A_adjoint(y) * label + seed

    A = operators.Denoising()
    method = restorer.method(A, sampler=shifted, steps=1, parameters={"seed": 0.25, "label": 0.5})
    assert torch.equal(restorer(face, A, method).samples[:, 0], 0.5 * face + 0.25)
    with pytest.raises(restore.RestoreError, match="seed= is a parameter of sampler .*shifted and a keyword"):
        restorer(face, A, sampler=shifted, steps=1)


def test_reference_is_what_the_samplers_file_says(restorer):
    """PSLD's block names the approximate transposes, DDNM's does not."""
    A = operators.SuperResolution(4)
    ddnm = restorer.method(A, sampler="ddnm", reference=True, steps=2)
    assert ddnm.parameters["travel_from"] == "x0" and ddnm.adjoint == "exact" and "adjoint" not in ddnm.describe()
    psld = restore.load("embedded-latent").method(A, sampler="psld", reference=True, steps=2)
    assert psld.adjoint == "reference" and psld.parameters["index_shift"] and psld.describe()["adjoint"] == "reference"
    assert restore.Method.from_config(psld.describe()) == psld
    with pytest.raises(restore.RestoreError, match="reference must be False for sampler dps"):
        restorer.method(A, sampler="dps", reference=True)


def test_protocol_holds_what_determines_the_result(restorer, face):
    A = operators.SuperResolution(2, noise=operators.GaussianNoise(0.05))
    wide = torch.cat([face, face], -1)
    found = restorer(A(wide), A, sampler="dps", steps=2, zeta=3.0, guidance=None).protocol
    assert found["precision"] == "float32" and found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads() and found["method"]["parameters"]["zeta"] == 3.0
    assert found["used"]["zeta"] == pytest.approx(3.0 * 2**0.5)
    assert found["weights"] == restore.load("embedded").weights_hash() and json.dumps(found)
    other = restore.load("embedded")
    with torch.no_grad():
        next(other.backbone.network.parameters()).view(-1)[0] += 1e-3
    assert other.weights_hash() != found["weights"]


def test_pil_in_pil_out(restorer):
    photo = Image.open(FACE).resize((16, 16))
    image = restorer(photo, operators.SuperResolution(4), steps=2).images[0]
    assert isinstance(image, Image.Image) and image.size == (64, 64)


def test_every_form_of_image_is_the_same_measurement(restorer, tmp_path):
    A = operators.SuperResolution(4)
    photo = Image.open(FACE).convert("RGB").resize((16, 16))
    photo.save(tmp_path / "small.png")
    pixels = np.asarray(photo)
    expected = restorer(photo, A, steps=2).samples
    whole = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    for same in (pixels, whole, whole.long(), whole / 127.5 - 1, [photo], tmp_path / "small.png", pixels[None]):
        assert relative(restorer(same, A, steps=2).samples, expected) < 1e-5, type(same)
    assert restorer([photo, photo], A, steps=2).samples.shape[0] == 2


def test_a_measurement_that_is_no_picture(restorer, face):
    """A vector, for an object with A and A_adjoint alone; NaN in it is refused as in pictures."""

    class Flat:
        def A(self, x):
            return 100 * x.flatten(1)

        def A_adjoint(self, y):
            return 100 * y.view(-1, 3, 64, 64)

    y = Flat().A(face)
    assert restorer(y, Flat(), sampler="dps", steps=2, zeta=0.01).samples.shape == (1, 1, 3, 64, 64)
    with pytest.raises(restore.RestoreError, match="NaN"):
        restorer(y.index_fill(1, torch.tensor([5]), float("nan")), Flat(), sampler="dps", steps=2, zeta=0.01)


def test_deepinv_physics_is_an_operator(restorer, face):
    dinv = pytest.importorskip("deepinv")
    physics = dinv.physics.Inpainting(
        img_size=(3, 64, 64), mask=(torch.rand(1, 64, 64) > 0.5).float(), noise_model=dinv.physics.GaussianNoise(0.05)
    )
    result = restorer(physics(face), physics, steps=2)
    assert result.samples.shape == (1, 1, 3, 64, 64) and torch.isfinite(result.residual).all()
    found = [restorer.method(physics).sampler, result.protocol["method"]["sampler"], result.protocol["noise"]]
    assert found == ["diffpir", "diffpir", "GaussianNoise(0.05)"] and result.residual_ratio is not None
    for sampler in ("diffpir", "pigdm"):  # sigma is the physics' own
        own = [
            restorer(face, physics, sampler=sampler, steps=2, **more)
            for more in ({}, {"sigma_y": float(physics.noise_model.sigma)})
        ]
        assert torch.equal(own[0].samples, own[1].samples)


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
        ({"sampler": "dps", "data_norm": "l1"}, "unknown data_norm"),
        ({"guidance": "none"}, "guidance"),
        ({"guidance": {}}, "guidance"),
        ({"guidance": 2.0}, "guidance"),
        ({"prompt": "a face"}, "no text encoder"),
        ({"sampler": "dsp"}, "did you mean 'dps'"),
        ({"samples": 0}, "at least 1"),
        ({"image_ids": ["a", "b"]}, "image_ids must be 1 different names"),
        ({"reference": True}, "reference must be False"),
        ({"steps": 0}, "steps must be .*got 0"),
        ({"guidance": restore.PAG(1.0, layers="i77")}, "i77"),
    ]:
        with pytest.raises(restore.RestoreError, match=message):
            restorer(y, A, **arguments)
    with pytest.raises(restore.RestoreError, match="NaN"):
        restorer(torch.full_like(y, float("nan")), A, steps=2)
    for images, operator, message in [
        (y[:0], A, "empty|no image"),
        (y, None, "A_adjoint"),
        (y, type("Only", (), {"A": A.A})(), "A_adjoint"),
        ((y + 1) * 127.5, A, r"\[-1, 1\]"),
    ]:
        with pytest.raises(restore.RestoreError, match=message):
            restorer(images, operator, steps=2)
    with pytest.raises(restore.RestoreError, match="batch_size"):
        restorer.generate(1, batch_size=0)
    with pytest.raises(restore.RestoreError, match="labels must be one for each"):
        restorer.generate(2, labels=[1])


def test_numpy_and_uint8_round_trip(face):
    pixels = np.asarray(Image.open(FACE).convert("RGB"))
    assert np.array_equal(io.to_uint8(io.to_tensor(pixels)[0]), pixels)
