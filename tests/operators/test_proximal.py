"""prox_l2, regularised_inverse and svd against dense matrices, at odd and non-square sizes."""

import numpy as np
import pytest
import torch

import operators
from operators import spectral

SIZE = (13, 10)
MASKS = torch.stack([operators.random_mask(SIZE, seed=seed)[0] for seed in (1, 2)])


def kernel(*shape, seed=0):
    weights = np.random.RandomState(seed).rand(*shape) + 0.05
    return weights / weights.sum(axis=(-2, -1), keepdims=True)


LINE = np.outer([0.1, 0.2, 0.7], [0.3, 0.1, 0.2, 0.15, 0.25])
CLOSED = {
    "denoising": operators.Denoising,
    "grey": operators.Colorization,
    "mask": lambda: operators.Inpainting(MASKS[:1]),
    "masks": lambda: operators.Inpainting(MASKS),
    "bicubic": lambda: operators.SuperResolution(3, image_size=SIZE),
    "average": lambda: operators.SuperResolution(4, method="average", image_size=SIZE),
    "gauss": lambda: operators.GaussianBlur(9, 0.8),
    "gauss_even": lambda: operators.GaussianBlur(6, 0.6),
    "rank_one": lambda: operators.Blur(LINE),
    "circular": lambda: operators.Blur(kernel(5, 4), border="circular"),
    "circular_kernels": lambda: operators.Blur(kernel(2, 3, 5), border="circular"),
    "circular_gauss": lambda: operators.GaussianBlur(9, 0.8, border="circular"),
    "blur_then_sr": lambda: (
        operators.SuperResolution(2, image_size=SIZE) @ operators.GaussianBlur(5, 0.7, image_size=SIZE)
    ),
    "sr_then_grey": lambda: operators.Colorization() @ operators.SuperResolution(5, image_size=SIZE),
}
ITERATIVE = {
    "reflected": lambda: operators.Blur(kernel(5, 4)),
    "reflected_kernels": lambda: operators.Blur(kernel(2, 3, 5)),
    "motion": lambda: operators.MotionBlur(7, seed=1),
    "mask_then_sr": lambda: operators.SuperResolution(3, image_size=SIZE) @ operators.Inpainting(MASKS),
}


def image(dtype=torch.float64, seed=0, batch=2):
    x = torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype)


def measurement(operator, seed=5):
    y = operator.A(image())
    return y + 0.3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def dense(operator, row):
    """A of image `row` of the batch as a matrix, from unit vectors."""
    return torch.from_numpy(operators.as_linear_operator(operator[[row]], (3, *SIZE)) @ np.eye(3 * SIZE[0] * SIZE[1]))


def dense_prox(operator, z, y, gamma):
    rows = []
    for i in range(len(z)):
        A = dense(operator, i)
        left = gamma[i] * A.mT @ A + torch.eye(A.shape[1], dtype=torch.float64)
        rows.append(torch.linalg.solve(left, gamma[i] * A.mT @ y[i].flatten() + z[i].flatten()))
    return torch.stack(rows).view_as(z)


def dense_inverse(operator, v, r):
    rows = []
    for i in range(len(v)):
        A = dense(operator, i)
        rows.append(torch.linalg.solve(A @ A.mT + r[i] * torch.eye(len(A), dtype=torch.float64), v[i].flatten()))
    return torch.stack(rows).view_as(v)


@pytest.mark.parametrize("name", [*CLOSED, *ITERATIVE])
def test_against_dense_matrices(name):
    """Closed forms to 1e-10; conjugate gradients to what their tolerance 1e-10 on the gradient leaves."""
    operator = {**CLOSED, **ITERATIVE}[name]()
    bound = 1e-10 if name in CLOSED else 1e-7
    z, y = image(seed=1), measurement(operator)
    v = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for gamma in (1e-4, 1.0, 300.0):
        x = operators.prox_l2(operator, z, y, gamma)
        assert relative(x, dense_prox(operator, z, y, [gamma, gamma])) <= bound
        u = operators.regularised_inverse(operator, v, 1 / gamma)
        assert relative(u, dense_inverse(operator, v, [1 / gamma, 1 / gamma])) <= bound
    each = torch.tensor([0.1, 50.0])
    assert relative(operator.prox_l2(z, y, each), dense_prox(operator, z, y, each.double())) <= bound
    assert relative(operator.regularised_inverse(v, each), dense_inverse(operator, v, each.double())) <= bound


@pytest.mark.parametrize("name", [*CLOSED, *ITERATIVE])
def test_single_images_equal_the_batch(name):
    operator = {**CLOSED, **ITERATIVE}[name]()
    z, y, gamma = image(seed=1), measurement(operator), torch.tensor([0.5, 20.0])
    x = operator.prox_l2(z, y, gamma)
    for i in range(2):
        single = operators.select_rows(operator, [i]).prox_l2(z[i : i + 1], y[i : i + 1], gamma[i].item())
        assert relative(single, x[i : i + 1]) < 1e-9


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("gamma", [0.0, 1e-12, 1e-3, 1.0, 1e6, 1e12, float("inf")])
def test_float32_and_extreme_gamma(name, gamma):
    """In float32 the result is that of float64, rounded, even if it is large."""
    operator = CLOSED[name]()
    z, y = image(torch.float32, seed=1), operator.A(image(torch.float32))
    x = operator.prox_l2(z, y, gamma)
    assert x.dtype == torch.float32 and torch.isfinite(x).all()
    assert relative(x, operator.prox_l2(z.double(), y.double(), gamma)) < 1e-6
    u = operator.regularised_inverse(y, gamma)
    if gamma < float("inf"):
        assert torch.isfinite(u).all() and relative(u, operator.regularised_inverse(y.double(), gamma)) < 1e-6
    else:
        assert (u == 0).all()
    if gamma == 0:
        assert torch.equal(x, z)


@pytest.mark.parametrize("name", ["denoising", "grey", "mask", "masks", "bicubic", "average", "sr_then_grey"])
def test_infinite_gamma_is_the_projection(name):
    """x = z - A^+ (A z - y), and r = 0 is the pseudo-inverse of A A^T: A^+ = A^T (A A^T)^+."""
    operator = CLOSED[name]()
    z, y = image(seed=1), operator.A(image())
    expected = z + operators.least_squares(operator, y - operator.A(z), tolerance=1e-13)
    assert relative(operator.prox_l2(z, y, float("inf")), expected) < 1e-8
    dagger = operator.A_adjoint(operator.regularised_inverse(y, 0.0))
    assert relative(dagger, operators.least_squares(operator, y, tolerance=1e-13)) < 1e-8


def test_half_precision():
    operator = operators.SuperResolution(3, image_size=SIZE)
    z, y = image(seed=1), measurement(operator)
    x = operator.prox_l2(z.bfloat16(), y.bfloat16(), 2.0)
    assert x.dtype == torch.bfloat16 and relative(x, operator.prox_l2(z, y, 2.0)) < 1e-2


def test_conjugate_gradients_in_float32_and_at_gamma_zero():
    operator = ITERATIVE["reflected"]()
    z, y = image(seed=1), measurement(operator)
    for gamma in (1e-3, 1.0, 30.0):
        assert relative(operator.prox_l2(z.float(), y.float(), gamma), operator.prox_l2(z, y, gamma)) < 1e-4
    mixed = operator.prox_l2(z, y, torch.tensor([0.0, 3.0]))
    assert torch.equal(mixed[0], z[0]) and relative(mixed[1:], operator.prox_l2(z, y, 3.0)[1:]) < 1e-9


@pytest.mark.parametrize("name", CLOSED)
def test_svd(name):
    """A = U S V^T with orthogonal U and V, coordinate by coordinate, and the singular values of the dense matrix."""
    operator, x = CLOSED[name](), image(seed=3)
    y = measurement(operator)
    svd = operator.svd(operators.image_shape(operator, y), torch.float64)
    s = svd.singular
    assert s.shape[1:] == x.shape[1:] and len(s) in (1, 2)
    measured, coordinates = svd.U_adjoint(operator.A(x)), svd.V_adjoint(x)
    assert measured.shape == coordinates.shape == x.shape
    assert relative(measured, s * coordinates) < 1e-10
    assert relative(svd.U(s * coordinates), operator.A(x)) < 1e-10
    assert relative(svd.V(svd.V_adjoint(x)), x) < 1e-10 and relative(svd.V_adjoint(svd.V(x)), x) < 1e-10
    assert abs(svd.V(x).norm() - x.norm()) < 1e-10 * x.norm()
    assert relative(svd.U(svd.U_adjoint(y)), y) < 1e-10 and abs(svd.U_adjoint(y).norm() - y.norm()) < 1e-10 * y.norm()
    for i in range(len(s)):
        expected = torch.linalg.svdvals(dense(operator, i))
        found = s[i].flatten().sort(descending=True).values
        assert (found[: len(expected)] - expected).abs().max() < 1e-10 and (found[len(expected) :] == 0).all()


@pytest.mark.parametrize("name", CLOSED)
def test_svd_in_float32(name):
    operator, x = CLOSED[name](), image(torch.float32)
    svd = operator.svd(x.shape)
    assert svd.singular.dtype == torch.float32 and svd.V(x).dtype == torch.float32
    assert relative(svd.U(svd.singular * svd.V_adjoint(x)), operator.A(x.double())) < 1e-5


def test_no_svd():
    for name in ITERATIVE:
        with pytest.raises(operators.RestoreError, match="no closed-form singular value decomposition.*DPS"):
            ITERATIVE[name]().svd((1, 3, *SIZE))
    with pytest.raises(operators.RestoreError, match="singular value decomposition, got Plain"):
        operators.svd(Plain(), (1, 3, *SIZE))


def test_beyond_the_limit_conjugate_gradients_take_over(monkeypatch):
    z = image(seed=1)
    y = operators.GaussianBlur(9, 0.8).A(image())
    expected = operators.GaussianBlur(9, 0.8).prox_l2(z, y, 5.0)
    monkeypatch.setattr(spectral, "LIMIT", 12)
    operator = operators.GaussianBlur(9, 0.8)
    assert relative(operator.prox_l2(z, y, 5.0), expected) < 1e-8
    with pytest.raises(operators.RestoreError, match="no closed-form"):
        operator.svd(z.shape)


def test_decomposed_once(monkeypatch):
    """The sampler calls it in every step; a copy with the reference transpose shares the work."""
    calls, original = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or original(*a, **k))
    for make in (CLOSED["bicubic"], CLOSED["gauss"], CLOSED["blur_then_sr"]):
        operator, z = make(), image()
        y = operator.A(z)
        calls.clear()
        for gamma in (1.0, 2.0, 3.0):
            operator.prox_l2(z, y, gamma)
            operator.regularised_inverse(y, gamma)
            operator.with_adjoint("reference").prox_l2(z, y, gamma)
        assert len(calls) == 2  # rows and columns


@pytest.mark.parametrize("name", ["gauss", "bicubic", "mask", "reflected", "blur_then_sr"])
def test_the_reference_transpose_does_not_reach_the_solvers(name):
    operator = {**CLOSED, **ITERATIVE}[name]()
    z, y = image(seed=1), measurement(operator)
    reference = operator.with_adjoint("reference")
    assert torch.equal(reference.prox_l2(z, y, 2.0), operator.prox_l2(z, y, 2.0))
    assert torch.equal(reference.regularised_inverse(y, 0.5), operator.regularised_inverse(y, 0.5))


@pytest.mark.parametrize("name", ["gauss", "masks", "circular", "grey"])
def test_made_in_inference_mode_and_differentiable(name):
    operator, z = CLOSED[name](), image()
    y = operator.A(z)
    with torch.inference_mode():
        operator.prox_l2(z, y, 2.0)
    z = z.requires_grad_()
    v = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(operator.prox_l2(z, y, 2.0), z, torch.ones_like(z))
    assert torch.isfinite(gradient).all() and gradient.norm() > 0
    v.requires_grad_()
    (gradient,) = torch.autograd.grad(operator.regularised_inverse(v, 2.0).sum(), v)
    assert relative(gradient, operator.regularised_inverse(torch.ones_like(y), 2.0)) < 1e-12  # it is symmetric


def test_bad_gamma():
    operator, x = operators.Denoising(), image()
    for bad in (-1.0, float("nan"), None, "strong", torch.ones(3), torch.tensor([1.0, -1.0])):
        with pytest.raises(operators.RestoreError, match="gamma must be a number >= 0, or one for each of the 2"):
            operator.prox_l2(x, x, bad)
        with pytest.raises(operators.RestoreError, match="r must be a number >= 0"):
            operator.regularised_inverse(x, bad)


class Plain:
    """An operator of another library with only A and A_adjoint."""

    matrix = torch.randn(3 * 13, 3 * 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 6

    def A(self, x):
        return (x.flatten(1, 2).mT @ self.matrix.to(x.dtype)).mT.reshape(x.shape)

    def A_adjoint(self, y):
        return (y.flatten(1, 2).mT @ self.matrix.mT.to(y.dtype)).mT.reshape(y.shape)


class OwnProx(Plain):
    def prox_l2(self, z, y, gamma):
        return z * 0 + torch.as_tensor(gamma)


def test_foreign_operators():
    z, y = image(seed=1), image(seed=2)
    for operator in (Plain(), operators.as_operator(Plain())):
        matrix = torch.from_numpy(operators.as_linear_operator(operator, (3, *SIZE)) @ np.eye(390))
        x = operators.prox_l2(operator, z, y, torch.tensor([0.5, 4.0]))
        for i, gamma in enumerate((0.5, 4.0)):
            left = gamma * matrix.mT @ matrix + torch.eye(390, dtype=torch.float64)
            expected = torch.linalg.solve(left, gamma * matrix.mT @ y[i].flatten() + z[i].flatten())
            assert relative(x[i].flatten(), expected) < 1e-8
        expected = torch.linalg.solve(matrix @ matrix.mT + 0.3 * torch.eye(390, dtype=torch.float64), y.flatten(1).mT)
        assert relative(operators.regularised_inverse(operator, y, 0.3).flatten(1), expected.mT) < 1e-8
    assert torch.equal(operators.prox_l2(OwnProx(), z, y, 3.0), torch.full_like(z, 3.0))
    assert torch.equal(operators.prox_l2(operators.as_operator(OwnProx()), z, y, 3.0), torch.full_like(z, 3.0))
    assert operators.prox_l2(OwnProx(), z, y, torch.tensor([1.0, 2.0]))[1].unique().item() == 2.0


@pytest.mark.parametrize("kind", ["mask", "blur", "fft"])
def test_deepinv_agrees(kind):
    """Our prox_l2 has deepinv's name and scaling, and its physics' own is used."""
    dinv = pytest.importorskip("deepinv").physics
    z, y = image(seed=1), image(seed=2)
    weights = torch.from_numpy(kernel(3, 3))
    if kind == "mask":
        physics = dinv.Inpainting((3, *SIZE), mask=MASKS[0].double())
        ours = operators.Inpainting(MASKS[:1])
    else:  # deepinv convolves, we correlate
        turned = weights.flip((0, 1))[None, None]
        blur = (
            dinv.Blur(filter=turned, padding="circular") if kind == "blur" else dinv.BlurFFT((3, *SIZE), filter=turned)
        )
        physics, ours = blur.double() if kind == "blur" else blur, operators.Blur(weights, border="circular")
    if kind == "fft":
        z, y = z.float(), y.float()
    assert relative(physics.A(z), ours.A(z).double()) < 1e-6
    for gamma in (0.5, torch.tensor([0.2, 3.0])):
        assert relative(operators.prox_l2(physics, z, y, gamma), ours.prox_l2(z, y, gamma).double()) < 1e-3
        u = operators.regularised_inverse(physics, y, gamma)
        assert relative(u, ours.regularised_inverse(y, gamma).double()) < 1e-4


@pytest.mark.parametrize("name", [*CLOSED, *ITERATIVE])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(name):
    operator = {**CLOSED, **ITERATIVE}[name]()
    z, y = image(seed=1).float(), measurement(operator).float()
    gamma = torch.tensor([0.5, 20.0])
    for given in (gamma, gamma.cuda(), 2.0):
        x = operator.prox_l2(z.cuda(), y.cuda(), given)
        expected = operator.prox_l2(z, y, 2.0 if isinstance(given, float) else gamma)
        assert x.is_cuda and relative(x.cpu(), expected.double()) < 1e-4
    u = operator.regularised_inverse(y.cuda(), gamma)
    assert relative(u.cpu(), operator.regularised_inverse(y, gamma).double()) < 1e-4
    if name in CLOSED:
        svd = operator.svd(z.shape, device="cuda")
        assert svd.U(svd.singular * svd.V_adjoint(z.cuda())).is_cuda


def test_a_rough_step_saves_iterations_without_a_closed_form():
    """Close to the exact one if y determines much, and never further from y than the start."""
    generator = torch.Generator().manual_seed(0)
    operator = operators.MotionBlur(9, 0.5)
    x = torch.rand(2, 3, 21, 18, generator=generator) * 2 - 1
    z, y = x + 0.3 * torch.randn(x.shape, generator=generator), operator.A(x)
    calls, A = 0, operator.A

    def counted(v):
        nonlocal calls
        calls += 1
        return A(v)

    operator.A = counted
    exact, calls_exact = operators.prox_l2(operator, z, y, 30.0), calls
    calls = 0
    rough = operators.prox_l2(operator, z, y, 30.0, rough=True)
    assert calls < 0.7 * calls_exact
    assert relative(rough - z, exact - z) < 0.05
    extreme = operators.prox_l2(operator, z, y, 1e8, rough=True)
    assert (A(extreme) - y).norm() < 0.2 * (A(z) - y).norm()


def test_a_rough_step_uses_the_closed_form():
    operator, z = operators.GaussianBlur(5, 1.0), torch.rand(1, 3, 12, 10)
    assert torch.equal(operators.prox_l2(operator, z, z, 9.0, rough=True), operators.prox_l2(operator, z, z, 9.0))
