"""Outputs of the DPS repository's own operators (tests/golden/operators.*: side-car with every tensor's source)."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import operators
from operators import kernels, separable

GOLDEN = Path(__file__).parents[1] / "golden"
MOTION = ["motion61_0.5_s51", "motion61_0.5_s52", "motion121_0.5_s53"]


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "operators.safetensors")


@pytest.fixture(scope="module")
def synth(golden):
    return (golden["synth_u8"].float() / 255 - 0.5) / 0.5


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("factor", [4, 8])
def test_super_resolution(golden, synth, factor):
    y, expected = operators.SuperResolution(factor).A(synth), golden[f"sr{factor}_96.y"]
    assert relative(y, expected) <= 1e-5
    for edge in (np.s_[..., 0, :], np.s_[..., -1, :], np.s_[..., :, 0], np.s_[..., :, -1]):
        assert relative(y[edge], expected[edge]) <= 1e-5


def test_gaussian_blur(golden, synth):
    operator = operators.GaussianBlur(61, 3.0)
    assert relative(operator.A(synth), golden["gauss61_3.0.synth_y"]) <= 1e-5
    assert relative(operators.Blur(golden["gauss61_3.0.kernel"]).A(synth), golden["gauss61_3.0.synth_y"]) <= 1e-5
    assert relative(operators.gaussian_kernel(61, 3.0)[30], golden["gauss61_3.0.kernel_f64_row"]) <= 1e-12
    assert (operators.gaussian_kernel(61, 3.0)[30] > 0).sum() == 25


@pytest.mark.parametrize("name", MOTION)
def test_motion_kernels_of_dps(golden, name):
    """Path and kernel of the package that DPS draws from, of which its operator uses the second."""
    size, seed = (int(part) for part in re.fullmatch(r"motion(\d+)_0.5_s(\d+)", name).groups())
    random = np.random.RandomState(seed)
    first, path = (kernels.draw_dps_path(random, size, 0.5) for _ in range(2))
    np.testing.assert_allclose(path, golden[f"{name}.path_xy"], atol=1e-4)
    expected = golden[f"{name}.kernel"].double()
    torch.testing.assert_close(kernels.render_dps_path(path, size), expected, rtol=0, atol=1e-8)
    kernel = operators.MotionBlur(size, 0.5, seed, law="dps").kernel
    assert torch.equal(kernel, kernels.render_dps_path(first, size))


@pytest.mark.parametrize("intensity", [0.0, 0.5, 1.0])
def test_small_motion_kernels_of_dps_are_not_empty(intensity):
    """Below a size of 54 the package draws a line of no width, and divides by zero."""
    for size in (3, 9, 31):
        kernel = operators.MotionBlur(size, intensity, 4, law="dps").kernel
        assert abs(float(kernel.sum()) - 1) < 1e-12 and kernel.min() >= 0


@pytest.mark.parametrize("name", MOTION)
def test_blur_by_a_reference_kernel(golden, synth, name):
    """Against a plain double-precision loop over the taps, on the reference's kernels (not flipped, reflected)."""
    kernel = golden[f"{name}.kernel"]
    radius = kernel.shape[0] // 2
    padded = torch.nn.functional.pad(synth.double(), (radius,) * 4, mode="reflect")
    expected = torch.zeros_like(synth, dtype=torch.float64)
    for i, j in kernel.nonzero().tolist():
        expected += kernel[i, j].double() * padded[..., i : i + 96, j : j + 96]
    assert relative(operators.Blur(kernel).A(synth), expected) <= 1e-5
    assert relative(operators.Blur(kernel).A(synth.double()), expected) <= 1e-12


def test_box_mask(golden):
    assert torch.equal(operators.box_mask(256, size=128, margin=16, seed=71), golden["mask_box"].float())
    assert torch.equal(operators.box_mask(256, seed=71), golden["mask_box"].float())
    assert torch.equal(operators.box_mask(256, size=128, top=61, left=27), golden["mask_box"].float())


def test_random_mask_follows_the_same_law(golden):
    holes = int((golden["mask_random"] == 0).sum())
    fraction = (holes + 0.5) / 256**2
    mask = operators.random_mask(256, fraction=fraction, seed=0)
    assert int((mask == 0).sum()) == holes == int(256**2 * fraction)


@pytest.mark.parametrize("name", ["sr", "gauss", "inpaint"])
def test_conditioning_step(golden, synth, name):
    """The measurement, the residual's norm and the DPS update -0.7 d||y - A x|| / dx."""
    operator = {
        "sr": operators.SuperResolution(8),
        "gauss": operators.GaussianBlur(61, 3.0),
        "inpaint": operators.Inpainting(golden["cond.inpaint.mask"]),
    }[name]
    y = operator.A(synth[..., :48, :48]) + 0.05 * golden[f"cond.{name}.noise"]
    assert relative(y, golden[f"cond.{name}.y"]) <= 1e-5
    x = golden["cond.x0_hat"].clone().requires_grad_()
    norm = (golden[f"cond.{name}.y"] - operator.A(x)).norm()
    assert relative(norm, golden[f"cond.{name}.norm"]) <= 1e-5
    (gradient,) = torch.autograd.grad(norm, x)
    assert relative(-0.7 * gradient, golden[f"cond.{name}.update"]) <= 1e-5
    residual = operator.A(x.detach()) - golden[f"cond.{name}.y"]
    assert relative(-0.7 * operator.A_adjoint(residual) / residual.norm(), golden[f"cond.{name}.update"]) <= 1e-5


def test_photograph():
    """The tensors made from a photograph that is not shipped: set RESTORE_GOLDEN to the folder that has them."""
    folder = os.environ.get("RESTORE_GOLDEN")
    if not folder:
        pytest.skip("set RESTORE_GOLDEN to the folder of the complete golden tensors")
    golden = load_file(Path(folder) / "operators.safetensors")
    image = (golden["image256_u8"].float() / 255 - 0.5) / 0.5

    def corners(y, name, tolerance=1e-5):
        assert relative(y[..., :64, :64], golden[f"{name}_tl"]) <= tolerance
        assert relative(y[..., -24:, -24:], golden[f"{name}_br"]) <= tolerance

    for factor in (4, 8):
        operator, name = operators.SuperResolution(factor), f"sr{factor}_256"
        assert relative(operator.A(image), golden[f"{name}.y"]) <= 1e-5
        corners(operator.A_adjoint(golden[f"{name}.cotangent"].float()), f"{name}.vjp")
        taps, matrix = golden[f"{name}.field_of_view"].long(), torch.zeros(256 // factor, 256)
        matrix.scatter_add_(1, taps.T, golden[f"{name}.weights"].T)
        assert relative(separable.downsampling_matrix(256, factor, "bicubic"), matrix) <= 1e-6
    corners(operators.GaussianBlur(61, 3.0).A(image), "gauss61_3.0.y")
    for name in MOTION:
        corners(operators.Blur(golden[f"{name}.kernel"]).A(image), f"{name}.y")
    corners(operators.Inpainting(golden["mask_box"]).A(image), "inpaint_box.y", tolerance=1e-3)  # stored in float16
