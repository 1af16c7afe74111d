"""The functions for any operator: rows of a batch, the image's shape, the reference transpose, errors."""

import copy

import numpy as np
import pytest
import torch

import operators

SIZE = (17, 12)


def image(batch=3, dtype=torch.float64, size=SIZE):
    return (
        2 * torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype) - 1
    )


def kernels(batch=3, shape=(5, 4)):
    weights = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return weights / weights.sum((-2, -1), keepdim=True)


def masks(batch=3):
    return torch.cat([operators.random_mask(SIZE, seed=seed) for seed in range(batch)])


class Foreign:
    def A(self, x):
        return 2 * x[..., ::2]

    def A_adjoint(self, y):
        return torch.stack([2 * y, 0 * y], dim=-1).flatten(-2)


PER_IMAGE = {
    "masks": lambda: operators.Inpainting(masks()),
    "kernels": lambda: operators.Blur(kernels()),
    "circular": lambda: operators.Blur(kernels(), border="circular"),
    "composed": lambda: operators.SuperResolution(3, image_size=SIZE) @ operators.Inpainting(masks()),
}


@pytest.mark.parametrize("name", PER_IMAGE)
@pytest.mark.parametrize(
    "rows", [[1], [0, 0, 1], torch.tensor([2, 0]), slice(1, 3), range(2), 2, np.array([1, 1])], ids=str
)
def test_rows_of_a_batch(name, rows):
    """The operator of selected images acts on them as the whole does, in every map, and leaves the whole unchanged."""
    operator, x = PER_IMAGE[name](), image()
    y = operator.A(x)
    selected = operators.select_rows(operator, rows)
    index = torch.arange(3)[rows].reshape(-1)
    assert (selected.A(x[index]) - y[index]).abs().max() < 1e-14
    assert (selected.A_adjoint(y[index]) - operator.A_adjoint(y)[index]).abs().max() < 1e-14
    prox = operator.prox_l2(x, y, 2.0)[index]
    assert (selected.prox_l2(x[index], y[index], 2.0) - prox).abs().max() < 1e-8
    assert (operator.A(x) - y).abs().max() == 0  # the original is unchanged
    with pytest.raises(operators.RestoreError, match="7 images, got 3"):
        operator.A(image(7))


@pytest.mark.parametrize("name", PER_IMAGE)
def test_rows_that_do_not_exist(name):
    for rows in ([3], ["first"], [0.5]):
        with pytest.raises(operators.RestoreError, match="indices of the 3 (masks|kernels), got"):
            PER_IMAGE[name]()[rows]


def test_rows_of_an_operator_shared_by_all_images():
    shared = [
        operators.Denoising(),
        operators.Inpainting(masks(1)),
        operators.Blur(kernels(1)),
        operators.SuperResolution(2) @ operators.GaussianBlur(5, 1.0),
        operators.as_operator(Foreign()),
        Foreign(),
    ]
    for operator in shared:
        assert operators.select_rows(operator, [0, 0, 1]) is operator
    with pytest.raises(TypeError, match="not iterable"):
        list(operators.Denoising())


@pytest.mark.parametrize("border", ["reflect", "circular"])
def test_one_kernel_per_image(border):
    """Each image is blurred as by its own operator; kernels may have a channel axis; the transpose is exact."""
    each, x = kernels(), image()
    operator = operators.Blur(each, border=border)
    expected = torch.cat([operators.Blur(each[i], border=border).A(x[i : i + 1]) for i in range(3)])
    assert (operator.A(x) - expected).abs().max() < 1e-14
    assert torch.equal(operators.Blur(each[:, None], border=border).A(x), operator.A(x))
    assert operators.check_operator(operator, x.shape) < 1e-14
    assert (operator.A(x.float()).double() - expected).abs().max() < 1e-5
    scaled = each * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[:, None, None]
    assert (operators.Blur(scaled, normalize=True, border=border).A(x) - expected).abs().max() < 1e-14
    with pytest.raises(operators.RestoreError, match="sum of 2"):
        operators.Blur(torch.stack([each[0], 2 * each[1]]))


def test_circular_border_is_scipys_wrap():
    import scipy.ndimage

    x = image(1, size=(9, 8))
    for weights in (kernels(1, (5, 4))[0], kernels(1, (9, 7))[0], kernels(1, (1, 1))[0], kernels(1, (2, 8 - 1))[0]):
        operator = operators.Blur(weights, border="circular")
        expected = [scipy.ndimage.correlate(channel, weights.numpy(), mode="wrap") for channel in x[0].numpy()]
        assert np.abs(operator.A(x)[0].numpy() - np.stack(expected)).max() < 1e-14
        assert operators.check_operator(operator, (2, 3, 9, 8)) < 1e-14
    assert operators.MotionBlur(5, border="circular").A(x).shape == x.shape
    with pytest.raises(operators.RestoreError, match="circular border, got 11 x 11.*9 x 8"):
        operators.GaussianBlur(11, 1.0, border="circular").A(x)
    with pytest.raises(operators.RestoreError, match="'reflect' or 'circular'"):
        operators.Blur([[1.0]], border="mirror")


def test_image_shape():
    x = image()
    for operator in (
        operators.SuperResolution(3, image_size=SIZE),
        operators.Colorization(),
        operators.SuperResolution(2, image_size=SIZE) @ operators.GaussianBlur(5, 1.0, image_size=SIZE),
        operators.as_operator(Foreign()),
        Foreign(),
        operators.PhaseRetrieval(),
    ):
        assert operators.image_shape(operator, operator.A(x)) == tuple(x.shape)
    assert operators.image_shape(operators.SuperResolution(2), image(1, size=(4, 5))) == (1, 3, 8, 10)


def test_image_shape_errors():
    class OnlyA:
        def A(self, x):
            return x

    class Broken(Foreign):
        def A_adjoint(self, y):
            raise RuntimeError("sizes 3 and 4 do not match")

    class Flat(Foreign):
        def A_adjoint(self, y):
            return y.flatten(1)

    y = image()
    for none in (None, OnlyA(), 3, torch.nn.Identity()):
        for ask, arguments in (
            (operators.image_shape, (y,)),
            (operators.prox_l2, (y, y, 1.0)),
            (operators.regularised_inverse, (y, 1.0)),
        ):
            with pytest.raises(operators.RestoreError, match=rf"A\(x\) and A_adjoint\(y\), got {type(none).__name__}"):
                ask(none, *arguments)
    with pytest.raises(operators.RestoreError, match=r"\(3, 3, 17, 12\): sizes 3 and 4"):
        operators.image_shape(Broken(), y)
    small = image(size=(4, 4))
    for operator in (
        operators.Inpainting(masks(1)),
        operators.Colorization(),
        operators.SuperResolution(2, image_size=9),
    ):
        with pytest.raises(operators.RestoreError, match="y must .*, got .*4"):
            operators.image_shape(operator, small)
    with pytest.raises(operators.RestoreError, match=r"y must be .* \(B, C, H, W\)"):
        operators.image_shape(operators.Denoising(), y[0])
    with pytest.raises(operators.RestoreError, match="must return images"):
        operators.image_shape(Flat(), y)


def test_the_reference_transpose_reaches_the_parts_of_a_composition():
    """Setting `adjoint` on a copy of a composition does not change its parts; with_adjoint does."""
    blur, small = operators.GaussianBlur(9, 1.5, image_size=(24, 24)), operators.SuperResolution(4)
    x = image(size=(24, 24))
    for chain in (small @ blur, operators.Compose(small @ blur), small @ (blur @ operators.Denoising())):
        y = chain.A(x)
        reference = operators.with_adjoint(chain, "reference")
        nearest = y.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)  # the blur's is the identity
        assert torch.equal(reference.A_adjoint(y), nearest)
        assert reference.adjoint == "reference" and chain.adjoint == "exact"
        assert operators.check_operator(chain, x.shape) < 1e-10  # the original is untouched
        exact = operators.with_adjoint(reference, "exact")
        assert torch.equal(exact.A_adjoint(y), chain.A_adjoint(y)) and exact.adjoint == "exact"
        forgotten = copy.copy(chain)
        forgotten.adjoint = "reference"
        assert torch.equal(forgotten.A_adjoint(y), chain.A_adjoint(y))
    mixed = operators.Compose(operators.GaussianBlur(9, 1.5, adjoint="reference"), small)
    assert torch.equal(mixed.with_adjoint("reference").A_adjoint(y), nearest)


def test_operators_without_reference_transpose():
    class Mine(operators.Operator):
        name = "mine"

        def A(self, x):
            return 2 * x

    for operator in (operators.Colorization(), Mine(), operators.Colorization() @ operators.SuperResolution(2)):
        with pytest.raises(operators.RestoreError, match="adjoint must be .* (colorization|mine)"):
            operators.with_adjoint(operator, "reference")
        assert operators.with_adjoint(operator, "exact") is operator
    with pytest.raises(operators.RestoreError, match="adjoint must be .* mine"):
        Mine(adjoint="reference")
    with pytest.raises(operators.RestoreError, match="adjoint must be .* Foreign"):
        operators.with_adjoint(Foreign(), "reference")
    with pytest.raises(operators.RestoreError, match="'exact' or 'reference'"):
        operators.with_adjoint(operators.Denoising(), "transpose")
    plain = Foreign()
    assert operators.with_adjoint(plain, "exact") is plain
