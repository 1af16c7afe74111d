"""A_dagger: the Moore-Penrose equations, and how conjugate gradients end."""

import numpy as np
import pytest
import torch

import operators

CLOSED = {
    "mask": lambda: operators.Inpainting(operators.random_mask((24, 20), seed=3)),
    "bicubic": lambda: operators.SuperResolution(4),
    "average": lambda: operators.SuperResolution(2, method="average"),
    "odd": lambda: operators.SuperResolution(3, image_size=(24, 20)),
    "denoising": operators.Denoising,
    "grey": operators.Colorization,
}


def image(dtype=torch.float64, seed=0, size=(24, 20), batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def inner(a, b):
    return (a * b).sum().item()


@pytest.mark.parametrize("solver", ["A_dagger", "least_squares"])
@pytest.mark.parametrize("name", CLOSED)
def test_moore_penrose(name, solver):
    """A A+ A = A, A+ A A+ = A+, and A A+ and A+ A are symmetric; conjugate gradients agree."""
    operator = CLOSED[name]()
    A = operator.A

    def dagger(y):
        return operator.A_dagger(y) if solver == "A_dagger" else operators.least_squares(operator, y)

    x, z = image(), image(seed=1)
    y = torch.randn_like(A(x))
    w = torch.randn_like(y)
    assert relative(A(dagger(A(x))), A(x)) < 1e-8
    assert relative(dagger(A(dagger(y))), dagger(y)) < 1e-8
    assert abs(inner(A(dagger(y)), w) - inner(y, A(dagger(w)))) < 1e-8 * y.norm() * w.norm()
    assert abs(inner(dagger(A(x)), z) - inner(x, dagger(A(z)))) < 1e-8 * x.norm() * z.norm()


@pytest.mark.parametrize("name", CLOSED)
def test_float32_agrees_with_float64(name):
    operator, x = CLOSED[name](), image()
    y = operator.A(x)
    assert relative(operator.A_dagger(y.float()).double(), operator.A_dagger(y)) < 1e-5
    assert operator.A_dagger(y.float()).dtype == torch.float32
    assert relative(operators.least_squares(operator, y.float()).double(), operator.A_dagger(y)) < 1e-4


def test_well_conditioned_blur_is_inverted():
    operator, x = operators.Blur([[0.0, 0.1, 0.0], [0.1, 0.6, 0.1], [0.0, 0.1, 0.0]]), image()
    assert relative(operator.A_dagger(operator.A(x)), x) < 1e-8
    assert relative(operator.A_dagger(operator.A(x).float()).double(), x) < 1e-3


@pytest.mark.parametrize("adjoint", ["exact", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ill_conditioned_blur_fits_the_measurement(dtype, adjoint):
    """The Gaussian has singular values down to 1e-10: x is not found, but A x = y to 0.5 %."""
    operator = operators.GaussianBlur(25, 3.0, adjoint=adjoint)
    y = operator.A(image(dtype, size=(32, 40)))
    x = operator.A_dagger(y)
    assert torch.isfinite(x).all() and relative(operator.A(x), y) < 5e-3


def test_damping_is_the_tikhonov_solution():
    operator, damping = operators.Blur(np.full((3, 3), 1 / 9)), 0.01
    matrix = operators.as_linear_operator(operator, (1, 9, 8)) @ np.eye(72)
    y = operator.A(image(size=(9, 8)))[:, :1]
    expected = np.linalg.solve(matrix.T @ matrix + damping * np.eye(72), matrix.T @ y.reshape(2, -1).numpy().T)
    found = operators.least_squares(operator, y, damping=damping)
    assert relative(found.reshape(2, -1), torch.from_numpy(expected.T)) < 1e-8


def test_images_stop_by_themselves():
    """An easy image beside a hard one, and an image of zeros, change nothing."""
    operator = operators.Blur([[0.0, 0.1, 0.0], [0.1, 0.6, 0.1], [0.0, 0.1, 0.0]])
    y = torch.stack([torch.full((3, 24, 20), 0.3), operator.A(image())[0].float(), torch.zeros(3, 24, 20)]).double()
    together = operator.A_dagger(y)
    for i in range(2):
        assert relative(together[i : i + 1], operator.A_dagger(y[i : i + 1])) < 1e-12
    assert torch.equal(together[2], torch.zeros_like(together[2]))
    assert relative(together[0], y[0]) < 1e-8


def test_stops_at_the_tolerance_and_at_the_limit():
    calls = []

    class Counting(operators.GaussianBlur):
        def A(self, x):
            calls.append(1)
            return super().A(x)

    operator = Counting(9, 1.0)
    y = operator.A(image())

    def iterations(**options):
        calls.clear()
        operators.least_squares(operator, y, **options)
        return len(calls)

    assert iterations(max_iterations=7) == 7
    assert (
        0 < iterations(tolerance=1e-1) < iterations(tolerance=1e-3) < iterations(tolerance=1e-3, max_iterations=500) + 1
    )
    assert iterations() == 200
    with pytest.raises(operators.RestoreError, match="max_iterations"):
        iterations(max_iterations=0)
    with pytest.raises(operators.RestoreError, match="NaN"):
        operator.A_dagger(y * float("nan"))
    with pytest.raises(operators.RestoreError, match="damping"):
        iterations(damping=-1.0)


def test_gradient_flows_through_the_pseudo_inverse():
    for operator in (operators.SuperResolution(4), operators.Blur(np.full((3, 3), 1 / 9))):
        y = operator.A(image()).requires_grad_()
        operator.A_dagger(y).square().sum().backward()
        assert torch.isfinite(y.grad).all() and y.grad.norm() > 0
