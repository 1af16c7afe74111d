"""Inpainting masks: their distribution, and errors."""

import numpy as np
import pytest
import torch

import operators
from operators import Inpainting, box_mask, random_mask


def hole(mask):
    rows, columns = np.nonzero(mask[0, 0].numpy() == 0)
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


def test_distribution_of_the_box_corner():
    """top in [margin, H - size - margin), both ends reached; the hole is a full rectangle."""
    corners = set()
    for seed in range(300):
        mask = box_mask((20, 31), size=(6, 9), margin=(5, 7), seed=seed)
        top, left, bottom, right = hole(mask)
        assert (bottom - top, right - left) == (6, 9) and (mask == 0).sum() == 54
        corners.add((top, left))
    assert {top for top, _ in corners} == set(range(5, 9)) and {left for _, left in corners} == set(range(7, 15))


def test_box_defaults_scale_with_the_image():
    for size in (64, 256, (45, 91)):
        height, width = (size, size) if isinstance(size, int) else size
        top, left, bottom, right = hole(box_mask(size, seed=0))
        assert (bottom - top, right - left) == (height // 2, width // 2)
        assert top >= height // 16 and left >= width // 16 and height - bottom > height // 16


def test_masks_depend_only_on_their_seed():
    for make in (box_mask, random_mask):
        np.random.seed(3)
        first = make((40, 50), seed=0)
        np.random.seed(4)
        assert torch.equal(first, make((40, 50), seed=0))
        assert not all(torch.equal(first, make((40, 50), seed=seed)) for seed in (1, 2, 3))
        assert set(first.unique().tolist()) == {0.0, 1.0} and first.shape == (1, 1, 40, 50)


def test_seeds_may_be_large():
    seeds = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63]
    masks = [random_mask(16, fraction=0.5, seed=seed) for seed in seeds]
    assert not any(torch.equal(masks[i], masks[j]) for i in range(len(seeds)) for j in range(i))


def test_random_mask_has_exactly_int_n_p_holes():
    fractions = []
    for seed in range(50):
        p = np.random.RandomState(seed).uniform(0.3, 0.7)
        holes = int((random_mask((33, 47), seed=seed) == 0).sum())
        assert holes == int(33 * 47 * p)
        fractions.append(p)
    assert min(fractions) < 0.35 and max(fractions) > 0.65
    assert int((random_mask((10, 10), fraction=0.92) == 0).sum()) == 92
    rate = torch.stack([random_mask(16, fraction=0.5, seed=s) for s in range(400)]).mean(0)
    assert 0.5 - 4.5 * 0.025 < rate.min() and rate.max() < 0.5 + 4.5 * 0.025  # every pixel equally often


def test_the_forms_of_a_mask():
    known = torch.rand(12, 10, generator=torch.Generator().manual_seed(0)) > 0.5
    x = torch.rand(2, 3, 12, 10)
    expected = x * known
    for form in (
        known,
        known.numpy(),
        known.numpy()[::-1].copy()[::-1],
        known.float(),
        known[None],
        known[None, None].int(),
        (known * 255).to(torch.uint8),
    ):
        operator = Inpainting(form)
        assert torch.equal(operator.A(x), expected) and operator.image_size == (12, 10)
    per_image = Inpainting(torch.stack([known, ~known])[:, None])
    assert torch.equal(per_image.A(x)[1], x[1] * ~known)
    with pytest.raises(operators.RestoreError, match="3 images, got 2"):
        per_image.A(torch.rand(3, 3, 12, 10))


def test_bad_masks():
    good = (torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    cases = [
        (torch.zeros(8, 8), "must have a known pixel"),
        (torch.ones(8, 8), "must have a hole"),
        (torch.full((8, 8), 255, dtype=torch.uint8), "must have a hole"),
        (good * float("nan"), "got nan"),
        (good * 0.5, r"only 0 \(hole\) and 1 \(known\), got 0.5; try a threshold"),
        (torch.stack([good] * 3), "one channel"),
        (torch.stack([good] * 3)[None], "one channel"),
        (torch.ones(0, 8), "one channel"),
        ("mask.png", "tensor or array, got str"),
        (None, "tensor or array"),
    ]
    for mask, message in cases:
        with pytest.raises(operators.RestoreError, match=message):
            Inpainting(mask)
    with pytest.raises(operators.RestoreError, match=r"mask must be 16 x 16.*got 8 x 8"):
        Inpainting(good, image_size=16)
    with pytest.raises(operators.RestoreError, match=r"must be 8 x 8.*got 8 x 9"):
        Inpainting(good).A(torch.rand(1, 3, 8, 9))
    with pytest.raises(operators.RestoreError, match="must be 8 x 8"):
        Inpainting(good).A_adjoint(torch.rand(1, 3, 9, 8))


def test_bad_options_of_masks():
    cases = [
        ({"size": 40}, "must fit"),
        ({"size": 20, "margin": 10}, "must fit"),
        ({"size": 10, "top": 25}, "must fit"),
        ({"size": 0}, "at least 1"),
        ({"margin": -1}, "margin"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed"),
    ]
    for options, message in cases:
        with pytest.raises(operators.RestoreError, match=message):
            box_mask(32, **options)
    for fraction in (-0.1, 1.5, (0.7, 0.3), "half"):
        with pytest.raises(operators.RestoreError, match="fraction"):
            random_mask(32, fraction=fraction)
    with pytest.raises(operators.RestoreError, match="must have a known pixel"):
        Inpainting(random_mask(8, fraction=1.0))
    with pytest.raises(operators.RestoreError, match="image_size"):
        box_mask("large")


def test_a_changed_operator_computes_with_what_it_says():
    """A new mask counts at once, in every precision; what others are computed from cannot be changed."""
    masks = [operators.random_mask((8, 8), seed=seed) for seed in range(2)]
    operator, x = operators.Inpainting(masks[0]), torch.rand(1, 3, 8, 8)
    texts = [repr(operator)]
    for value in (x, x.double()):
        assert torch.equal(operator.A(value), masks[0] * value) and operator.svd(x.shape).singular[0, 0].equal(
            masks[0][0, 0]
        )
    operator.mask = masks[1].clone()
    texts.append(repr(operator))
    for value in (x, x.double()):
        assert torch.equal(operator.A(value), masks[1] * value) and operator.svd(x.shape).singular[0, 0].equal(
            masks[1][0, 0]
        )
    operator.mask[..., 0] = 0  # in place
    texts.append(repr(operator))
    assert not operator.A(x.double())[..., 0].any() and len(set(texts)) == 3
    for blur, name in [
        (operators.GaussianBlur(5, 1.0), "std"),
        (operators.MotionBlur(5), "seed"),
        (operators.Blur(torch.full((3, 3), 1 / 9)), "kernel"),
    ]:
        with pytest.raises(operators.RestoreError, match=f"{name} of a {type(blur).__name__} must stay"):
            setattr(blur, name, 2)
        blur.noise = operators.GaussianNoise(0.1)
        assert blur.noise.sigma == 0.1
