"""The contract of an operator, for all of them from one list of names."""

import copy
import pickle

import pytest
import torch

import operators
from operators import factory

SIZES = [(40, 40), (33, 47), (64, 35), (49, 31)]
KERNEL = torch.rand(5, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

OPERATORS = {
    "inpainting_box": {},
    "inpainting_random": {},
    "inpainting_mask": {},
    "super_resolution": {"factor": 4},
    "super_resolution_8": {"factor": 8},
    "super_resolution_3": {"factor": 3},
    "super_resolution_average": {"factor": 5, "method": "average"},
    "gaussian_blur": {},
    "gaussian_blur_small": {"kernel_size": 9, "std": 1.5},
    "motion_blur": {"seed": 3},
    "blur": {"kernel": KERNEL, "normalize": True},
    "denoising": {},
    "colorization": {},
    "jpeg": {"quality": 40},
    "gaussian_blur_cut": {"kernel_size": 9, "std": 1.5, "border": "unknown"},
    "motion_blur_cut": {"kernel_size": 9, "seed": 3, "border": "unknown"},
    "compose": {"operators": [{"name": "gaussian_blur"}, {"name": "super_resolution", "factor": 2}]},
    "compose_deep": {
        "operators": [{"name": "inpainting_box"}, {"name": "super_resolution", "factor": 3}, {"name": "colorization"}]
    },
}


def make(name, size, **more):
    options = dict(OPERATORS[name])
    base = next(known for known in sorted(factory.OPERATORS, key=len, reverse=True) if name.startswith(known))
    if base == "inpainting_mask":
        options["mask"] = (torch.rand(size, generator=torch.Generator().manual_seed(1)) > 0.4).float()
    return operators.build_operator({"name": base, **options, **more}, image_size=size)


def image(size, batch=3, dtype=torch.float64, seed=0):
    x = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * x - 1).to(dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_every_known_name_is_in_the_list():
    linear = [name for name, maker in factory.OPERATORS.items() if getattr(maker, "linear", True)]
    assert all(any(name.startswith(known) for name in OPERATORS) for known in linear)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_adjoint_is_exact(name, size):
    operator = make(name, size)
    assert operators.check_operator(operator, (3, 3, *size)) <= 1e-10
    assert operators.check_operator(operator, (3, 3, *size), dtype=torch.float32) <= 1e-5
    assert operator.image_shape(operator.A(image(size))) == (3, 3, *size)


@pytest.mark.parametrize("name", OPERATORS)
def test_adjoint_equals_automatic_differentiation(name):
    operator = make(name, SIZES[1])
    y = torch.randn(operator.A(image(SIZES[1])).shape, dtype=torch.float64)
    expected = operators.Operator.A_adjoint(operator, y)
    assert relative(operator.A_adjoint(y), expected) < 1e-12


@pytest.mark.parametrize("name", OPERATORS)
def test_linear(name):
    operator, x, z = make(name, SIZES[1]), image(SIZES[1]), image(SIZES[1], seed=1)
    assert relative(operator.A(2 * x - 3 * z), 2 * operator.A(x) - 3 * operator.A(z)) < 1e-12


@pytest.mark.parametrize("name", OPERATORS)
def test_batch_equals_single_images(name):
    operator, x = make(name, SIZES[1]), image(SIZES[1], batch=8, dtype=torch.float32)
    y = operator.A(x)
    assert relative(y, torch.cat([operator.A(x[i : i + 1]) for i in range(8)])) < 1e-6
    back = operator.A_adjoint(y)
    assert relative(back, torch.cat([operator.A_adjoint(y[i : i + 1]) for i in range(8)])) < 1e-6
    if "blur" not in name and name != "compose":
        single = torch.cat([operator.A_dagger(y[i : i + 1]) for i in range(8)])
        assert relative(operator.A_dagger(y), single) < 1e-5


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precisions(name, dtype):
    operator, x = make(name, SIZES[2]), image(SIZES[2]).to(dtype)
    y = operator.A(x)
    assert y.dtype == dtype and operator.A_adjoint(y).dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert relative(y.double(), operator.A(x.double())) < tolerance
    assert relative(operator.A_adjoint(y).double(), operator.A_adjoint(y.double())) < tolerance


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_does_not_round_the_data_term(name):
    operator, x = make(name, SIZES[2]), image(SIZES[2], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = operator.A(x)
    assert relative(y, operator.A(x)) < 1e-6


@pytest.mark.parametrize("name", OPERATORS)
def test_gradient_of_the_residual(name):
    """grad 1/2 ||A x - y||^2 = A^T (A x - y), through A, and the same through A^T A (as PSLD needs it)."""
    operator, x = make(name, SIZES[3]), image(SIZES[3]).requires_grad_()
    y = torch.randn_like(operator.A(x).detach())
    (gradient,) = torch.autograd.grad(0.5 * (operator.A(x) - y).square().sum(), x)
    assert relative(gradient, operator.A_adjoint(operator.A(x.detach()) - y)) < 1e-12

    v = torch.randn_like(x)
    projected = operator.A_adjoint(operator.A(x))
    (gradient,) = torch.autograd.grad(projected, x, v)
    assert relative(gradient, operator.A_adjoint(operator.A(v))) < 1e-12
    derived = operators.Operator.A_adjoint(operator, operator.A(x))  # the derived adjoint is differentiable too
    (gradient,) = torch.autograd.grad(derived, x, v)
    assert relative(gradient, operator.A_adjoint(operator.A(v))) < 1e-12


@pytest.mark.parametrize("name", ["super_resolution", "gaussian_blur", "motion_blur", "colorization"])
def test_buffers_made_in_inference_mode_serve_a_later_backward(name):
    operator, x = make(name, SIZES[0]), image(SIZES[0])
    with torch.inference_mode():
        y = operator.A(x)
        derived = operators.Operator.A_adjoint(operator, y)
    x = x.requires_grad_()
    operator.A(x).sum().backward()
    assert torch.isfinite(x.grad).all() and relative(derived, operator.A_adjoint(y.clone())) < 1e-12


@pytest.mark.parametrize("name", OPERATORS)
def test_copies_and_pickles(name):
    operator, x = make(name, SIZES[0], noise={"name": "gaussian", "sigma": 0.05}), image(SIZES[0])
    y = operator.A(x)
    for twin in (copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
        assert torch.equal(twin.A(x), y) and getattr(twin.noise, "before", twin.noise).sigma == 0.05


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_follows_the_image_to_a_gpu(name):
    operator, x = make(name, SIZES[1]), image(SIZES[1], dtype=torch.float32)
    y = operator.A(x)
    on_gpu = operator.A(x.cuda())
    assert on_gpu.is_cuda and relative(on_gpu.cpu(), y) < 1e-5
    assert relative(operator.A_adjoint(on_gpu).cpu(), operator.A_adjoint(y)) < 1e-5
    assert torch.equal(operator.A(x), y)


@pytest.mark.parametrize("name", OPERATORS)
def test_wrong_images_are_errors(name):
    operator = make(name, SIZES[1])
    for bad in (image(SIZES[1])[0], image(SIZES[1]).round().long(), "photo.png"):
        with pytest.raises(operators.RestoreError, match=r"floating-point tensor \(B, C, H, W\)"):
            operator.A(bad)
    with pytest.raises(operators.RestoreError, match="30 x 41"):
        operator.A(image((30, 41)))
    broken = image(SIZES[1])
    broken[0, 0, 3, 3] = float("nan")
    with pytest.raises(operators.RestoreError, match="NaN"):
        operator(broken)


class Flip(operators.Operator):
    """An operator that implements only A."""

    def A(self, x):
        return 2 * x.flip(3)[..., ::2]

    def image_shape(self, y):
        return (*y.shape[:3], self.image_size[1])


def test_an_operator_that_only_has_A():
    operator = Flip(image_size=(20, 31), noise=operators.GaussianNoise(0.1))
    x = image((20, 31))
    assert operators.check_operator(operator, x.shape) < 1e-14
    y = operator.A(x)
    assert relative(operator.A_adjoint(y), 4 * x * (operator.A_adjoint(y) != 0)) < 1e-14
    assert relative(operator.A(operator.A_dagger(y)), y) < 1e-9
    assert operator(x, torch.Generator().manual_seed(0)).shape == y.shape
    with pytest.raises(operators.RestoreError, match="image_size of the original"):
        operator.A_adjoint(y[..., :10])


def test_check_finds_a_wrong_adjoint():
    class Wrong(operators.Denoising):
        def A_adjoint(self, y):
            return 1.01 * y

    assert operators.check_operator(Wrong(), (2, 3, 16, 16)) > 1e-5
    blur = operators.GaussianBlur(9, 1.5, adjoint="reference")
    assert operators.check_operator(blur, (2, 3, 16, 16)) > 1e-4


def test_reference_transposes():
    x = image((32, 40))
    mask = operators.random_mask((32, 40))
    identities = [
        operators.GaussianBlur(9, 1.5, adjoint="reference"),
        operators.MotionBlur(9, adjoint="reference"),
        operators.Inpainting(mask, adjoint="reference"),
        operators.Denoising(adjoint="reference"),
    ]
    assert all(torch.equal(operator.A_adjoint(x), x) for operator in identities)
    small = operators.SuperResolution(4, adjoint="reference")
    nearest = torch.nn.functional.interpolate(small.A(x), scale_factor=4, mode="nearest")
    assert torch.equal(small.A_adjoint(small.A(x)), nearest)
    assert (
        operators.build_operator({"name": "blur", "kernel": torch.ones(1, 1), "adjoint": "reference"}).adjoint
        == "reference"
    )
    with pytest.raises(operators.RestoreError, match="'exact' or 'reference'"):
        operators.Denoising(adjoint="transpose")
    with pytest.raises(operators.RestoreError, match="adjoint must be .* colorization"):
        operators.Colorization(adjoint="reference")


def test_composition():
    x = image((48, 36))
    blur, small = operators.GaussianBlur(9, 1.5), operators.SuperResolution(4, noise=operators.GaussianNoise(0.05))
    chain = small @ blur
    assert torch.equal(chain.A(x), small.A(blur.A(x)))
    assert torch.equal(operators.Compose(blur, small).A(x), chain.A(x))
    assert chain.noise.sigma == 0.05
    assert relative(chain.A_adjoint(chain.A(x)), blur.A_adjoint(small.A_adjoint(chain.A(x)))) == 0
    with pytest.raises(operators.RestoreError, match="last operator"):
        blur @ small
    with pytest.raises(operators.RestoreError, match="as_operator"):
        operators.Compose(blur, torch.nn.Identity())
    with pytest.raises(TypeError):
        blur @ 3
