"""deepinv physics and scipy linear operators, with the real packages."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

import operators
from operators import as_linear_operator, as_operator, to_deepinv

SIZE = (24, 32)


def image(dtype=torch.float32):
    x = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (2 * x - 1).to(dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def physics():
    dinv = pytest.importorskip("deepinv").physics
    kernel = operators.gaussian_kernel(9, 1.5)[None, None].float()
    kernel = torch.roll(kernel, 1, dims=2)  # not symmetric, so that a conjugated or flipped kernel shows
    mask = (torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(1)) > 0.4).float()
    return {
        "inpainting": dinv.Inpainting((3, *SIZE), mask=mask, noise_model=dinv.GaussianNoise(0.05)),
        "blur": dinv.Blur(filter=kernel, padding="reflect"),
        "blur_fft": dinv.BlurFFT((3, *SIZE), filter=kernel),
        "downsampling": dinv.Downsampling((3, *SIZE), filter="bicubic", factor=2),
    }


@pytest.mark.parametrize("name", ["inpainting", "blur", "blur_fft", "downsampling"])
def test_a_physics_is_an_operator(physics, name):
    original, x = physics[name], image()
    operator = as_operator(original)
    assert relative(operator.A(x), original.A(x)) < 1e-6
    assert relative(operator.A(x.double()).float(), original.A(x)) < 1e-5  # follows the dtype, module untouched
    assert next(original.buffers()).dtype in (torch.float32, torch.complex64, torch.int64)
    assert operators.check_operator(operator, x.shape) <= 1e-10
    y = operator.A(x.double())
    assert operator.image_shape(y) == tuple(x.shape) == tuple(operator.A_adjoint(y).shape)
    assert relative(operator.A(operator.A_dagger(y)), y) < 0.01
    residual = operator(x, torch.Generator().manual_seed(0)) - operator.A(x)
    assert abs(residual.std().item() - (0.05 if name == "inpainting" else 0.0)) < 0.003
    if operator.noise is None:
        assert operators.check_operator(operators.GaussianBlur(5, 1.0) @ operator, x.shape) <= 1e-10


def test_the_noise_of_a_physics(physics):
    dinv = pytest.importorskip("deepinv").physics
    assert as_operator(physics["inpainting"]).noise.sigma == pytest.approx(0.05)
    assert as_operator(physics["blur"]).noise is None
    assert as_operator(physics["blur"], noise=operators.GaussianNoise(0.2)).noise.sigma == 0.2
    poisson = dinv.Blur(filter=torch.ones(1, 1, 1, 1), noise_model=dinv.PoissonNoise(0.1))
    with pytest.raises(operators.RestoreError, match="PoissonNoise.*noise="):
        as_operator(poisson)
    assert as_operator(poisson, noise=operators.PoissonNoise(1.0)).noise.rate == 1.0


def test_as_operator_takes_and_refuses():
    operator = operators.Denoising()
    assert as_operator(operator) is operator
    with pytest.raises(operators.RestoreError, match="carries its own noise"):
        as_operator(operator, noise=operators.GaussianNoise(0.1))
    for bad in (torch.nn.Identity(), 3, None):
        with pytest.raises(operators.RestoreError, match=r"A\(x\) and A_adjoint\(y\)"):
            as_operator(bad)

    class Plain:
        def A(self, x):
            return 2 * x

        def A_adjoint(self, y):
            return 2 * y

    assert relative(as_operator(Plain()).A_dagger(image()), image() / 2) < 1e-6


@pytest.mark.parametrize("name", ["super_resolution", "motion_blur", "inpainting_random"])
def test_an_operator_is_a_physics(name):
    pytest.importorskip("deepinv")
    mapping = {"name": name, "noise": {"name": "gaussian", "sigma": 0.05}}
    mapping.update({"super_resolution": {"factor": 4}, "motion_blur": {"kernel_size": 9}}.get(name, {}))
    operator, x = operators.build_operator(mapping, image_size=SIZE), image()
    physics = to_deepinv(operator)
    assert torch.equal(physics.A(x), operator.A(x))
    assert abs(physics.adjointness_test(x).item()) < 1e-3
    residual = physics(x) - operator.A(x)
    assert residual.std().item() == pytest.approx(0.05, rel=0.2)
    assert relative(physics.A(physics.A_dagger(operator.A(x))), operator.A(x)) < 0.02
    again = as_operator(physics)
    assert torch.equal(again.A(x), operator.A(x)) and again.noise.sigma == pytest.approx(0.05)


def test_noise_that_deepinv_cannot_express():
    pytest.importorskip("deepinv")
    with pytest.raises(operators.RestoreError, match="PoissonNoise"):
        to_deepinv(operators.Denoising(noise=operators.PoissonNoise(1.0)))
    assert torch.equal(to_deepinv(operators.Denoising())(image()), image())


@pytest.mark.parametrize(
    "operator",
    [
        operators.SuperResolution(4, image_size=(13, 10)),
        operators.Blur([[0.05, 0.1], [0.15, 0.7]]),
        operators.Colorization(),
        operators.Inpainting(operators.random_mask((13, 10))),
    ],
    ids=lambda operator: type(operator).__name__,
)
def test_scipy(operator):
    """lsqr gives A_dagger, svds the norm, and the matrix is A applied to unit vectors."""
    x = torch.rand(1, 3, 13, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    linear = as_linear_operator(operator, (3, 13, 10))
    y = operator.A(x)
    assert linear.shape == (y.numel(), x.numel()) and linear.dtype == np.float64
    np.testing.assert_allclose(linear @ x.numpy().ravel(), y.numpy().ravel(), rtol=1e-12, atol=1e-12)
    matrix = linear @ np.eye(x.numel())
    np.testing.assert_allclose(linear.H @ np.eye(y.numel()), matrix.T, rtol=1e-10, atol=1e-12)
    solution = scipy.sparse.linalg.lsqr(linear, y.numpy().ravel(), atol=1e-13, btol=1e-13, iter_lim=2000)[0]
    assert relative(torch.from_numpy(solution), operator.A_dagger(y).ravel()) < 1e-6
    top = scipy.sparse.linalg.svds(linear, k=1, return_singular_vectors=False, v0=np.ones(min(linear.shape)))
    assert top[0] == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-6)
    np.testing.assert_allclose(
        operator.A_dagger(y).ravel().numpy(), np.linalg.pinv(matrix) @ y.numpy().ravel(), rtol=1e-6, atol=1e-7
    )


def test_scipy_refuses_a_batch():
    with pytest.raises(operators.RestoreError, match=r"\(channels, height, width\)"):
        as_linear_operator(operators.Denoising(), (1, 3, 8, 8))


def linear_physics():
    """A linear physics of deepinv for colour images of SIZE, of every kind that has them."""
    dinv, size = pytest.importorskip("deepinv").physics, (3, *SIZE)
    kernel = torch.full((1, 1, 3, 3), 1 / 9)
    single = torch.ones(1, 1, *SIZE)
    yield dinv.Denoising()
    yield dinv.Inpainting(size, mask=0.5)
    yield dinv.Blur(filter=kernel, padding="reflect")
    yield dinv.BlurFFT(size, filter=kernel)
    yield dinv.Downsampling(size, filter="bicubic", factor=2)
    yield dinv.DownsamplingMatlab(factor=2)
    yield dinv.Upsampling((3, 48, 64), filter="bilinear", factor=2)
    yield dinv.Decolorize()
    yield dinv.Demosaicing(SIZE)
    yield dinv.SpaceVaryingBlur(filters=kernel[:, :, None], multipliers=single[:, :, None], padding="reflect")
    yield dinv.CompressedSensing(m=50, img_size=size)
    yield dinv.LinearPhysics(A=lambda x, **_: 2 * x, A_adjoint=lambda y, **_: 2 * y)


def test_all_linear_physics_have_their_noise_without_wrapping():
    dinv = pytest.importorskip("deepinv").physics
    for physics in linear_physics():
        physics.noise_model = dinv.GaussianNoise(0.05)
        assert operators.find_noise(physics).sigma == pytest.approx(0.05) and operators.is_linear(physics), physics
        y = physics.A(image())
        assert operators.image_shape(physics, y) == image().shape, physics
        assert operators.check_operator(physics, image().shape, dtype=torch.float32) < 1e-3, physics
        x = operators.prox_l2(physics, image(), y + 0.1, 2.0)
        gradient = 2 * physics.A_adjoint(physics.A(x) - y - 0.1) + x - image()
        assert gradient.norm() < 0.02 * image().norm(), physics
        physics.noise_model = dinv.PoissonNoise(0.1)
        with pytest.raises(operators.RestoreError, match="noise_model.*PoissonNoise.*noise="):
            operators.find_noise(physics)
    assert not operators.is_linear(dinv.Haze()) and operators.find_noise(operators.Denoising()) is None


def test_an_updated_physics_computes_with_what_it_says(physics):
    dinv = pytest.importorskip("deepinv").physics
    original = dinv.Inpainting((3, *SIZE), mask=torch.ones(1, 3, *SIZE), noise_model=dinv.GaussianNoise(0.05))
    wrapped, x = as_operator(original), image()
    texts = [(operators.describe(original), repr(wrapped))]
    for value in (x, x.double()):
        assert torch.equal(wrapped.A(value), value)
    mask = (torch.rand(1, 3, *SIZE) > 0.5).float()
    original.update(mask=mask, sigma=torch.tensor(0.2))
    for value in (x, x.double()):
        assert torch.equal(wrapped.A(value), mask * value)
    assert wrapped.noise.sigma == pytest.approx(0.2)
    texts.append((operators.describe(original), repr(wrapped)))
    original.mask[..., 0] = 0  # in place
    assert not wrapped.A(x)[..., 0].any() and not wrapped.A(x.double())[..., 0].any()
    texts.append((operators.describe(original), repr(wrapped)))
    assert all(len(set(column)) == 3 for column in zip(*texts, strict=True))
