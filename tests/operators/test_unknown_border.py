"""Blurs whose border is unknown: y = crop(blur(x)) of a larger x, against dense matrices, and in files."""

import numpy as np
import pytest
import torch

import operators
import restore
from operators import proximal
from restore.images import io
from restore.metrics.single import psnr
from restore.paths import data_dir
from restore.task import Task, load_task, measure_photo

SIZE = (14, 18)


def kernel(*shape):
    weights = np.random.RandomState(0).rand(*shape) + 0.05
    return weights / weights.sum(axis=(-2, -1), keepdims=True)


CASES = {
    "gauss": lambda: operators.GaussianBlur(9, 0.7, border="unknown"),
    "kernel": lambda: operators.Blur(kernel(5, 4), border="unknown"),
    "kernels": lambda: operators.Blur(kernel(2, 3, 5), border="unknown"),
    "motion": lambda: operators.MotionBlur(7, seed=1, border="unknown"),
    "blur_then_sr": lambda: operators.Compose(
        operators.Blur(kernel(5, 5), border="unknown"), operators.SuperResolution(2)
    ),
}


def images(seed=0):
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_against_dense_matrices(name):
    operator, z = CASES[name](), images(1)
    y = operator.A(images()) + 0.1
    assert operators.check_operator(operator, z.shape) < 1e-15
    assert operators.image_shape(operator, y) == z.shape
    for i in range(2):
        single = operators.select_rows(operator, [i])
        A = torch.from_numpy(operators.as_linear_operator(single, (3, *SIZE)) @ np.eye(3 * SIZE[0] * SIZE[1]))
        for gamma in (0.0, 1e-3, 1.0, 1e4):
            left = gamma * A.mT @ A + torch.eye(A.shape[1], dtype=torch.float64)
            expected = torch.linalg.solve(left, gamma * A.mT @ y[i].flatten() + z[i].flatten()).view(3, *SIZE)
            found = operators.prox_l2(operator, z, y, gamma)[i]
            assert (found - expected).norm() <= 1e-7 * expected.norm()
        v = torch.linalg.solve(A @ A.mT + 0.1 * torch.eye(len(A), dtype=torch.float64), y[i].flatten())
        found = operators.regularised_inverse(operator, y, 0.1)[i].flatten()
        assert (found - v).norm() <= 1e-7 * v.norm()


def test_y_is_the_inside_of_the_blurred_picture():
    """Where nothing beyond the border reaches, the border does not matter; zeros of the kernel take no margin."""
    x = images()
    for make in (operators.GaussianBlur, operators.MotionBlur):
        whole, cut = make(9, 0.6), make(9, 0.6, border="unknown")
        rows, columns = cut.margin
        assert 0 < rows <= 4 and 0 < columns <= 4
        assert torch.allclose(cut.A(x), operators.cut_margin(cut, whole.A(x)), atol=1e-12)
    assert operators.GaussianBlur(61, 1.5, border="unknown").margin == (6, 6)
    back = operators.cut_margin(cut, operators.continue_margin(cut, x))
    assert torch.equal(back, x)


def test_a_few_iterations_suffice():
    """12 rough ones of a sampler's step: on a picture with strong weights of the data, where plain CG is far off."""
    x = io.read_image("data/photos/chelsea-face-64.png").pixels
    operator = operators.MotionBlur(15, 0.5, 3, border="unknown")
    y = operator.A(x)
    z = operators.continue_margin(operator, y)
    exact = operators.prox_l2(operator, z.double(), y.double(), 500.0)
    rough = operators.prox_l2(operator, z, y, 500.0, rough=True)
    plain = z + proximal._cgls(
        operator.A, operator.A_adjoint, y - operator.A(z), None, torch.tensor([1 / 500]), 1e-2, 12
    )
    error, other = ((found - exact).norm() / (exact - z).norm() for found in (rough, plain))
    assert error < 0.03 and error < other / 3, (error, other)


@pytest.mark.parametrize("operator", ["gaussian_blur", "motion_blur"])
def test_a_file_was_cut_from_the_world(tmp_path, operator):
    """The restored picture of a file has the file's size, and its border is unknown; one that is degraded here has
    the border of the task."""
    photo = "data/photos/chelsea-face-64.png"
    task = load_task(operator, settings := {"kernel_size": 9, "sigma": 0.02})
    assert not settings
    mine = task.for_photo(photo)
    assert mine.config["border"] == "unknown" and "border" not in task.for_photo(photo, degrade=True).config
    measured = measure_photo(photo, mine, image_id="a")
    rows, columns = measured.operator.margin
    assert measured.y.shape == (1, 3, 64, 64) and rows > 0
    assert operators.image_shape(measured.operator, measured.y) == (1, 3, 64 + 2 * rows, 64 + 2 * columns)
    cut = Task(task.name, task.config | {"border": "unknown"})
    measured = measure_photo(photo, cut, image_id="a", degrade=True)
    assert measured.y.shape == measured.clean.shape == (1, 3, 64 - 2 * rows, 64 - 2 * columns)


def test_extents_of_chains():
    chain = {
        "name": "compose",
        "operators": [
            {"name": "gaussian_blur", "std": 1.0, "kernel_size": 9},
            {"name": "super_resolution", "factor": 2},
            {"name": "blur", "kernel": kernel(3, 3)},
            {"name": "super_resolution", "factor": 3},
        ],
    }
    assert operators.read_extent(chain) == (6, (0, 0))
    cut = operators.forget_border(chain)
    assert operators.read_extent(cut) == (6, (6, 6)) and operators.build_operator(cut).margin == (6, 6)
    task = Task("compose", cut | {"noise": {"name": "gaussian", "sigma": "auto"}})
    assert task.factor == 6 and task.extend((10, 20)) == (72, 132)
    y = torch.zeros(1, 3, 10, 20)
    assert operators.image_shape(operators.build_operator(cut, image_size=(72, 132)), y) == (1, 3, 72, 132)


def test_a_few_iterations_do_not_follow_the_border_where_there_is_little_noise():
    """15.0 dB if the preconditioner inverts what the motion nearly removes."""
    face = io.read_image(data_dir() / "photos" / "astronaut-face-64.png").pixels
    blur = operators.MotionBlur(25, 0.5, seed=1, noise=operators.GaussianNoise(0.005), border="unknown")
    y, (rows, columns) = blur(face, torch.Generator().manual_seed(0)), blur.margin
    shown = face[:, :, rows : 64 - rows, columns : 64 - columns]
    assert psnr(restore.load("embedded")(y, blur, sampler="diffpir", steps=5).samples[:, 0], shown) > 18
