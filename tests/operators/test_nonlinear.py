"""Nonlinear operators: their values, and errors for the methods of linear operators."""

import pytest
import torch

import operators
from operators.nonlinear import decode_srgb, encode_srgb


def image(size=(24, 17), dtype=torch.float64):
    return 2 * torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype) - 1


OPERATORS = {
    "clipping": operators.Clipping,
    "phase_retrieval": operators.PhaseRetrieval,
    "nonlinear_blur": lambda: operators.NonlinearBlur(5),
    "jpeg_rounding": lambda: operators.JPEGRounding(30),
    "compose": lambda: operators.Clipping() @ operators.GaussianBlur(5, 1.0),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_methods_of_linear_operators_are_errors(name):
    operator, x = OPERATORS[name](), image()
    y = operator.A(x)
    assert not operator.linear and operators.Denoising().linear
    calls = [
        ("A_adjoint", lambda: operator.A_adjoint(y)),
        ("A_dagger", lambda: operator.A_dagger(y)),
        ("prox_l2", lambda: operators.prox_l2(operator, x, y, 1.0)),
        ("regularised_inverse", lambda: operators.regularised_inverse(operator, y, 1.0)),
        ("svd", lambda: operators.svd(operator, x.shape)),
        ("A_adjoint", lambda: operators.check_operator(operator, x.shape)),
    ]
    for what, call in calls:
        with pytest.raises(operators.RestoreError, match=f"is not linear and has no {what}; .* such as DPS") as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_shapes_and_precisions(name, dtype):
    operator, x = OPERATORS[name](), image(dtype=dtype)
    y = operator.A(x)
    assert y.dtype == dtype and operators.image_shape(operator, y) == tuple(x.shape)
    # Rounding to 8 bits turns a small difference into a step.
    most = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert ((y - operator.A(x.double())).norm() / y.double().norm()).item() < (0.1 if name == "jpeg_rounding" else most)
    noisy = operators.build_operator({"name": "clipping", "noise": {"name": "gaussian", "sigma": 0.1}})(x)
    assert noisy.shape == x.shape and noisy.max() > 1  # the noise comes after the saturation


@pytest.mark.parametrize("name", ["clipping", "phase_retrieval", "nonlinear_blur"])
def test_gradient(name):
    """As DPS takes it, against finite differences."""
    operator, x = OPERATORS[name](), image((6, 5))
    x = x * 0.99 + 0.003  # no pixel on the edge of saturation
    assert torch.autograd.gradcheck(operator.A, x.requires_grad_(), eps=1e-7, atol=1e-5)
    zero = torch.zeros_like(x).requires_grad_()
    (gradient,) = torch.autograd.grad(operator.A(zero).sum(), zero)
    assert torch.isfinite(gradient).all()  # also where the magnitude is 0


def test_clipping():
    x = torch.tensor([-1.0, -0.6, -0.2, 0.0, 0.4, 0.5, 0.9]).view(1, 1, 1, -1)
    expected = torch.tensor([-1.0, -1.0, -0.4, 0.0, 0.8, 1.0, 1.0]).view(1, 1, 1, -1)
    assert torch.allclose(operators.Clipping(2.0).A(x), expected)
    assert operators.operator_options("clipping") == ["gain"]
    for gain in (0.0, -1.0, float("inf"), "high"):
        with pytest.raises(operators.RestoreError, match="gain"):
            operators.Clipping(gain)


@pytest.mark.parametrize("size", [(256, 256), (33, 20), (64, 41)], ids=str)
def test_phase_retrieval(size):
    """DPS pads 256 to 384; energy is kept; a half turn and a sign are invisible; the middle is the sum."""
    operator, x = operators.PhaseRetrieval(), image(size)
    y = operator.A(x)
    assert y.shape[2:] == tuple(side + 2 * int(side / 4) for side in size)
    assert abs(y.square().sum() - x.square().sum()) < 1e-9 * x.square().sum()
    assert torch.allclose(operator.A(-x), y) and torch.allclose(operator.A(x.flip((2, 3))), y)
    height, width = y.shape[2:]
    centre = y[..., height // 2, width // 2]
    assert torch.allclose(centre, x.sum((2, 3)).abs() / (height * width) ** 0.5)
    rows, columns = (height - size[0]) // 2, (width - size[1]) // 2
    larger = torch.nn.functional.pad(x, (columns, columns, rows, rows))
    assert torch.allclose(operators.PhaseRetrieval(0.0).A(larger), y)
    unit = operators.PhaseRetrieval(unit=True).A(2 * x - 1)
    assert torch.allclose(unit, y) and not torch.allclose(operators.PhaseRetrieval(unit=True).A(1 - 2 * x), y, rtol=0.1)
    assert operators.image_shape(operator, y) == tuple(x.shape)


def test_nonlinear_blur():
    """sRGB's curve at its published values; flat pictures stay; a bright spot outshines what it is moved over."""
    encoded = torch.tensor([-0.1, 0.0, 0.04045, 0.5, 1.0, 1.2], dtype=torch.float64)
    light = torch.tensor([-0.1 / 12.92, 0.0, 0.0031308, 0.21404114, 1.0, 1 + 0.2 * 2.4 / 1.055], dtype=torch.float64)
    assert torch.allclose(decode_srgb(encoded), light, atol=1e-6)
    assert torch.allclose(encode_srgb(decode_srgb(encoded)), encoded, atol=1e-6)
    operator, linear = operators.NonlinearBlur(5), operators.MotionBlur(5)
    for value in (-1.0, -0.3, 0.8):
        flat = torch.full((1, 3, 12, 12), value, dtype=torch.float64)
        assert torch.allclose(operator.A(flat), flat, atol=1e-6)
    spot = torch.full((1, 1, 13, 13), -1.0, dtype=torch.float64)
    spot[..., 6, 6] = 1.0
    got, kernel = operator.A(spot), linear.A(spot).add(1).div(2)
    assert torch.allclose(got, 2 * encode_srgb(kernel) - 1, atol=1e-9) and (got >= linear.A(spot) - 1e-9).all()
    seen = operators.NonlinearBlur(5, border="unknown")
    assert seen.A(image()).shape[2:] == tuple(n - 2 * m for n, m in zip((24, 17), seen.margin, strict=True))
    assert operators.image_shape(seen, seen.A(image())) == tuple(image().shape)
    (rows, columns), whole = seen.margin, operators.NonlinearBlur(5).A(image())
    assert torch.allclose(seen.A(image()), whole[..., rows : 24 - rows, columns : 17 - columns])


def test_jpeg_rounding():
    """What Pillow's file holds; the gradient is that of the identity, for JPEG's own is none."""
    x = image((24, 40), torch.float32)
    operator = operators.JPEGRounding(20, "4:4:4")
    x = x.requires_grad_()
    y = operator.A(x)
    assert torch.equal(y, operators.JPEGNoise(20, subsampling="4:4:4")(x)) and not torch.allclose(y, x, atol=0.05)
    (gradient,) = torch.autograd.grad((y * 3).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 3.0))
    assert "20" in repr(operator) and repr(operator) != repr(operators.JPEGRounding(21, "4:4:4"))
    with pytest.raises(operators.RestoreError, match="quality"):
        operators.JPEGRounding(0)


def test_phase_retrieval_errors():
    with pytest.raises(operators.RestoreError, match="y must have the sides .* got 4"):
        operators.image_shape(operators.PhaseRetrieval(), image((4, 24)))
    with pytest.raises(operators.RestoreError, match="oversample"):
        operators.PhaseRetrieval(-1.0)
