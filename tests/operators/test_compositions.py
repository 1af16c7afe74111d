"""Operators one after the other: their sizes, their mappings, and what of y is known."""

import pytest
import torch

import operators
from operators import RestoreError
from restore.bench.config import load_config
from restore.restoration import measure_residual
from restore.task import load_task

NOISE = {"noise": operators.GaussianNoise(0.1)}


def unknown(size=5):
    return operators.GaussianBlur(size, 1.0, border="unknown")


def test_a_nested_composition_has_the_scale_of_its_parts():
    first, last = operators.SuperResolution(2), unknown()
    flat = operators.Compose(first, operators.Denoising(), last)
    for nested in (last @ (operators.Denoising() @ first), (last @ operators.Denoising()) @ first):
        assert nested.margin == flat.margin == (4, 4)
        assert repr(nested) == repr(flat)
    noisy = operators.Compose(first, operators.Compose(operators.Denoising(), last, **NOISE))
    assert noisy.noise is NOISE["noise"]
    with pytest.raises(RestoreError, match="on the last operator"):
        operators.Compose(operators.Compose(first, last, **NOISE), operators.Denoising())


def test_the_size_of_a_composition_is_that_of_its_first_operator():
    x = torch.zeros(1, 3, 65, 65)
    chain = operators.Compose(operators.SuperResolution(4, image_size=(65, 65)), operators.Denoising())
    assert chain.image_shape(chain.A(x)) == x.shape and chain.A_adjoint(chain.A(x)).shape == x.shape
    with pytest.raises(TypeError):
        operators.Compose(operators.SuperResolution(4), image_size=(65, 65))  # its parts would not know it


@pytest.mark.parametrize("last", ["compose", "nested"])
def test_the_residual_counts_the_known_pixels_of_a_mask_that_comes_last(last):
    torch.manual_seed(0)
    mask = (torch.rand(64, 64) > 0.5).float()
    inpainting = operators.Inpainting(mask, **NOISE)
    chain = operators.Compose(operators.GaussianBlur(9, 1.0), inpainting)
    chain = operators.Compose(operators.Denoising(), chain) if last == "nested" else chain
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    y = chain(x) * mask  # a photo's holes have no noise
    assert measure_residual(x, y, chain)[1] == pytest.approx([1, 1], abs=0.03)
    assert measure_residual(x, chain(x), chain)[1] == pytest.approx([1, 1], abs=0.03)


@pytest.mark.parametrize(
    "parts, sentence",
    [
        (None, "operators of compose must be a list"),
        ("gaussian_blur", "operators of compose must be a list"),
        (["gaussian_blur", {"name": "denoising"}], "must be a mapping with a 'name', got 'gaussian_blur'"),
        ([{"factor": 2}], "must be a mapping with a 'name'"),
        ([{"name": "super_resolution"}], "needs the option 'factor'"),
        ([{"name": "super_resolution", "factor": 0.5}], "factor must be an integer"),
    ],
)
def test_a_wrong_composition_is_one_sentence(parts, sentence, tmp_path):
    mapping = {"name": "compose"} | ({} if parts is None else {"operators": parts})
    with pytest.raises(RestoreError, match=sentence):
        operators.read_extent(mapping)
    with pytest.raises(RestoreError, match=sentence if parts else "operators"):
        operators.build_operator(mapping)
    if "factor" not in sentence:
        with pytest.raises(RestoreError, match=sentence):
            operators.forget_border(mapping)
    methods = {"m": {"sampler": "bicubic"}}
    config = {"name": "x", "backbone": "embedded", "data": {"folder": str(tmp_path)}, "out": str(tmp_path / "out")}
    with pytest.raises(RestoreError, match=sentence):
        load_config(config | {"tasks": {"t": {"operator": mapping}}, "methods": methods})


class Dim(operators.Operator):
    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = factor

    def A(self, x):
        return x / self.factor


class Halve(operators.Operator):
    enlarges = True

    def __init__(self, factor=2, image_size=None):
        super().__init__(image_size=image_size)
        self.factor = factor

    def A(self, x):
        return x[..., :: self.factor, :: self.factor]

    def image_shape(self, y):
        return (*y.shape[:2], *(side * self.factor for side in y.shape[2:]))


def test_the_factor_of_a_users_operator_is_a_scale_only_if_it_says_so():
    name = f"{__name__}:"
    assert operators.read_extent({"name": f"{name}Dim", "factor": 0.5}) == (1, (0, 0))
    assert operators.read_extent({"name": f"{name}Halve"}) == (2, (0, 0))
    assert operators.read_extent({"name": f"{name}Halve", "factor": 3}) == (3, (0, 0))
    assert operators.Compose(Dim(), unknown()).margin == (2, 2)
    assert operators.Compose(Halve(), unknown()).margin == (4, 4)


@pytest.mark.parametrize("gamma", [float("inf"), torch.tensor([float("inf"), 2.0])])
@pytest.mark.parametrize("kind", ["blur", "jpeg"])
def test_the_nearest_point_that_fits_is_finite_where_a_blur_removes_frequencies(kind, gamma):
    torch.manual_seed(0)
    grid = torch.arange(25.0, dtype=torch.float64) - 12
    oblique = torch.exp(-((grid[:, None] + grid) ** 2) / 18 - ((grid[:, None] - grid) ** 2) / 32)
    blur = operators.Blur(oblique, normalize=True, border="unknown" if kind == "blur" else "reflect")
    chain = blur if kind == "blur" else operators.Compose(operators.GaussianBlur(9, 1.5), operators.JPEG(20))
    x = torch.rand(2, 3, 96, 96) * 2 - 1
    y = chain.A(x)
    nearest = chain.prox_l2(torch.zeros_like(x), y, gamma)
    assert torch.isfinite(nearest).all()
    if kind == "blur":
        assert (chain.A(nearest) - y)[0].norm() < 0.05 * y[0].norm()
        assert torch.isfinite(chain.regularised_inverse(y, 0.0)).all()


def test_a_kernel_as_large_as_the_image_with_a_circular_border():
    for side in (7, 8):
        x = torch.rand(1, 1, side, side)
        y = operators.Blur(torch.ones(side, side) / side**2, border="circular").A(x)
        assert torch.allclose(y, x.mean().expand_as(x), atol=1e-6)
    with pytest.raises(RestoreError, match="must not exceed the image"):
        operators.Blur(torch.ones(9, 9) / 81, border="circular").A(torch.rand(1, 1, 8, 8))


def test_a_repr_tells_noise_that_is_not_clipped():
    assert repr(operators.PoissonNoise(1, clip=False)) != repr(operators.PoissonNoise(1))


def test_a_kernel_from_a_file_does_not_make_a_nonlinear_blur_linear(tmp_path):
    (tmp_path / "k.txt").write_text("0.25 0.75")
    with pytest.raises(RestoreError, match="does not apply to task nonlinear-blur"):
        load_task("nonlinear-blur", kernel=tmp_path / "k.txt")
    assert load_task("motion-blur", kernel=tmp_path / "k.txt").config["name"] == "blur"


def test_a_kernel_from_a_file_keeps_the_other_options_of_a_blur(tmp_path):
    (tmp_path / "k.txt").write_text("0.25 0.75")
    task = load_task("{name: blur, border: circular, noise: null}", kernel=tmp_path / "k.txt")
    assert task.build(16, 16).border == "circular"
    task = load_task("{name: blur, adjoint: reference, noise: null}", kernel=tmp_path / "k.txt")
    assert task.build(16, 16).adjoint == "reference"
