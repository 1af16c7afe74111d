"""What is read off a photo, against what was done to it: the shipped photos with known noise, blur and damage."""

from itertools import product

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

import operators
from operators import RestoreError
from restore.images import io
from restore.images.estimate import detect_damage, estimate_blur, estimate_noise, measure_grey_share, rasterise_path
from restore.images.masks import read_mask
from restore.images.tint import apply_tint, estimate_tint
from restore.paths import data_dir

PHOTOS, MASKS = data_dir() / "photos", data_dir() / "masks"
COFFEE, CAT, ASTRONAUT = "coffee.jpg", "chelsea.jpg", "astronaut.jpg"


def photo(name):
    return io.read_image(PHOTOS / name).pixels


def noisy(x, sigma, seed=0):
    """With noise, clipped and rounded to 8 bits as a file would be."""
    n = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return (((x + sigma * n).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


@pytest.mark.parametrize("name", [COFFEE, CAT, ASTRONAUT])
def test_noise_level_of_a_photo(name):
    x = photo(name)
    for sigma in (0.02, 0.05, 0.2):
        assert estimate_noise(noisy(x, sigma)) == pytest.approx(sigma, rel=0.1)
    grey = x.mean(1, keepdim=True)
    for sigma in (0.05, 0.2):
        assert estimate_noise(noisy(grey, sigma)) == pytest.approx(sigma, rel=0.15)
    # Grey stored as RGB has one plane's noise three times, not three planes'.
    assert estimate_noise(noisy(grey, 0.1).expand(-1, 3, -1, -1)) == estimate_noise(noisy(grey, 0.1))
    assert estimate_noise(noisy(x, 0.1)[0]) == estimate_noise(noisy(x, 0.1))


def test_noise_level_is_not_fooled():
    x = photo(CAT)
    assert estimate_noise(torch.zeros(3, 40, 40)) == 0
    assert estimate_noise(x) < 0.008  # rounding to 8 bits gives 0.0023
    framed = torch.full((1, 3, 600, 700), 0.97)  # a flat border, nearly white, of more than half the area
    framed[..., 100:400, 100:551] = noisy(x, 0.1)
    assert estimate_noise(framed) == pytest.approx(0.1, rel=0.1)
    dark = noisy(x * 0.4 - 0.6, 0.1)  # half of it is near to black, where noise is clipped
    assert estimate_noise(dark) == pytest.approx(0.1, rel=0.2)
    with pytest.raises(RestoreError, match="32 pixels"):
        estimate_noise(x[..., :20])


def test_noise_level_of_tiny_textures():
    """Pieces of 32 pixels are sixteen blocks, of which a few are smooth; most were told noise of 4 of 255 and more."""
    found, told = [], []
    for name in (COFFEE, ASTRONAUT):
        x = F.avg_pool2d(photo(name), 3)
        for top, left in product(range(0, x.shape[-2] - 32, 24), range(0, x.shape[-1] - 32, 24)):
            piece = x[..., top : top + 32, left : left + 32]
            found.append(estimate_noise(noisy(piece, 0)))
            told.append(estimate_noise(noisy(piece, 0.1)))
    assert np.mean(np.array(found) < 0.03) > 0.7
    assert np.median(told) == pytest.approx(0.1, rel=0.1)


def test_noise_level_after_compression(tmp_path):
    """Chroma at half resolution has lost its fine noise; brightness has not."""
    x = noisy(photo(COFFEE), 0.1)
    io.to_pil(x).save(tmp_path / "x.jpg", quality=95, subsampling=2)
    left = io.read_image(tmp_path / "x.jpg").pixels
    assert 0.05 < estimate_noise(left) < 0.11
    assert estimate_noise(left) > 2 * float((left - left.mean(1, True)).diff(dim=-1).std()) / 3


@pytest.mark.parametrize("name", [COFFEE, CAT])
def test_blur_size_of_a_photo(name):
    x = photo(name)
    assert estimate_blur(x) < 1
    found = []
    for std in (2.0, 4.0):
        blurred = operators.GaussianBlur(33, std).A(x)
        for sigma in (0.0, 0.05):
            found.append(estimate_blur(noisy(blurred, sigma)))
            assert found[-1] == pytest.approx(std, rel=0.3)
    assert max(found[:2]) < min(found[2:])
    assert estimate_blur(torch.zeros(1, 3, 64, 64)) == 0
    with pytest.raises(RestoreError, match="32 pixels"):
        estimate_blur(x[..., :20])


def test_blur_size_says_more_for_more():
    x = photo(ASTRONAUT)
    sizes = [estimate_blur(operators.GaussianBlur(41, std).A(x)) for std in (1.0, 2.5, 5.0)]
    assert sizes == sorted(sizes) and sizes[-1] == pytest.approx(5, rel=0.2)


def test_a_path_drawn_by_hand_is_the_trace_of_a_point_of_light():
    path = [(100, 50), (110, 50), (110, 56)]  # to the right, then down
    kernel = rasterise_path(path)
    assert kernel.dtype == torch.float64 and kernel.shape[0] % 2 == 1 and float(kernel.sum()) == pytest.approx(1)
    light = torch.zeros(1, 3, 41, 41, dtype=torch.float64)
    light[..., 20, 20] = 1
    trace = operators.Blur(kernel).A(light)[0, 0]
    rows, columns = torch.nonzero(trace > 0.02, as_tuple=True)
    assert rows.max() - rows.min() == 6 and columns.max() - columns.min() == 10
    lowest_right = trace[rows.max() - 1, columns.max()]
    lowest_left = trace[rows.max() - 1, columns.min()]
    highest_left = trace[rows.min(), columns.min() + 1]
    assert lowest_right > 0.02 and highest_left > 0.02 and lowest_left < 1e-6
    grid = torch.arange(41.0, dtype=torch.float64) - 20
    assert abs(float((trace.sum(0) * grid).sum())) < 0.05 and abs(float((trace.sum(1) * grid).sum())) < 0.05
    # A constant speed: one of many points and one of few are the same path.
    many = [(100 + k / 10, 50) for k in range(100)] + [(110, 50), (110, 56)]
    assert torch.allclose(rasterise_path(many), kernel, atol=1e-6)
    assert rasterise_path(np.array(path), size=31).shape == (31, 31)
    assert torch.equal(rasterise_path([(3, 4)]), torch.ones(1, 1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("points", "size", "sentence"),
    [
        ([], None, "at least one"),
        ([1, 2, 3], None, "N, 2"),
        ([(0, float("nan"))], None, "finite"),
        ("abc", None, "N, 2"),
        ([(0, 0), (1e9, 0)], None, "pixels long"),
        ([(0, 0), (6000, 0)], None, "at most 4096"),
        ([(0, 0), (30, 0)], 9, "at least 31|31"),
        ([(0, 0), (30, 0)], 32, "odd"),
        ([(0, 0), (30, 0)], "x", "kernel's size"),
    ],
)
def test_no_path(points, size, sentence):
    with pytest.raises(RestoreError, match=sentence):
        rasterise_path(points, size)


def test_damage_of_the_shipped_photo_is_found():
    """Scratches of 5 pixels and the two stains they run into; the cat's whiskers and eyes are none."""
    proposed = detect_damage(photo("chelsea-scratched.jpg")) == 0
    drawn = read_mask(MASKS / "chelsea-scratches.png") == 0
    assert float(proposed[drawn].float().mean()) > 0.75  # recall
    assert float(drawn[proposed].float().mean()) > 0.95  # precision
    assert proposed.shape == drawn.shape


def drawn_damage(x):
    """White and dark scratches of 3 pixels and specks of 7, antialiased, with the pixels they are on."""
    height, width = x.shape[-2:]
    truth = np.zeros((height, width), bool)
    for level, lines, specks in (
        (0.9, [((20, 30), (190, 320)), ((300, 40), (250, 380))], [(60, 250), (330, 200), (120, 90)]),
        (-0.95, [((400, 60), (440, 300))], [(200, 60), (80, 330)]),
    ):
        layer = PIL.Image.new("L", (4 * width, 4 * height))
        draw = PIL.ImageDraw.Draw(layer)
        for line in lines:
            draw.line([(4 * a, 4 * b) for a, b in line], fill=255, width=12)
        for a, b in specks:
            draw.ellipse([4 * a - 14, 4 * b - 14, 4 * a + 14, 4 * b + 14], fill=255)
        opaque = np.asarray(layer.resize((width, height), PIL.Image.Resampling.BOX)) / 255
        truth |= opaque > 0.3
        x = x * (1 - torch.from_numpy(opaque).float()) + level * torch.from_numpy(opaque).float()
    return x, truth


@pytest.mark.parametrize("name", [COFFEE, ASTRONAUT])
@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
def test_drawn_scratches_and_specks_are_found(name, grey):
    x = photo(name)
    x = x.mean(1, keepdim=True) if grey else x
    damaged, truth = drawn_damage(x)
    found = detect_damage(noisy(damaged, 0.02))[0, 0].numpy() == 0
    assert (found & truth).sum() / truth.sum() > 0.6
    near = scipy.ndimage.binary_dilation(truth, np.ones((3, 3)), iterations=3)
    assert (found & ~near).mean() < 0.035  # highlights of the cup and the helmet


def test_undamaged_photos_are_hardly_masked():
    shares = [1 - float(detect_damage(photo(name)).mean()) for name in (COFFEE, CAT, ASTRONAUT)]
    assert max(shares) < 0.01
    for name in ("astronaut-face-64.png", "chelsea-face-64.png", "generated-face-64-1.png"):
        assert detect_damage(photo(name)).min() == 1
    assert detect_damage(torch.zeros(1, 3, 50, 50)).min() == 1


def test_sensitivity_finds_more():
    x = drawn_damage(photo(COFFEE))[0]
    shares = [1 - float(detect_damage(x, sensitivity).mean()) for sensitivity in (0.0, 0.5, 1.0)]
    assert shares == sorted(shares) and shares[0] < shares[2]
    for wrong in (-0.1, 1.5, float("nan"), "high"):
        with pytest.raises(RestoreError, match="sensitivity"):
            detect_damage(x, wrong)
    for wrong in (x[..., :20], torch.cat([x, x])):
        with pytest.raises(RestoreError, match="one photo"):
            detect_damage(wrong)


def test_a_large_photo_is_looked_at_reduced():
    """A scratch of two pixels survives a reduction by two; the proposal has the photo's own, odd size."""
    x = torch.nn.functional.interpolate(photo(COFFEE), (1201, 1799), mode="bicubic")
    x[..., 400:1150, 1650:1652] = 1
    mask = detect_damage(x)
    assert mask.shape == (1, 1, 1201, 1799)
    assert float((mask[..., 420:1130, 1650:1652] == 0).float().mean()) > 0.9


def test_one_hue_is_kept_and_colours_are_colours():
    x = photo(CAT)
    grey = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    sepia = torch.stack([0.95 * grey[0, 0] + 0.04, grey[0, 0] * 0.85, grey[0, 0] ** 2 * 0.1 + grey[0, 0] * 0.7 - 0.2])[
        None
    ]
    for scan in (grey, sepia, noisy(sepia, 0.05)):
        tint = estimate_tint(scan)
        assert tint is not None
        coloured = scan + 0.3 * (x - x.mean(1, keepdim=True)) + 0.02
        back = apply_tint(coloured[None], tint)[0]
        assert torch.allclose(back.mean(1), coloured.mean(1), atol=1e-6)  # no brightness is lost
        assert (back - scan).abs().mean() < 0.25 * (coloured - scan).abs().mean() + 0.06
    back = apply_tint(grey + torch.tensor([0.1, 0.0, -0.1])[:, None, None], estimate_tint(grey))
    assert measure_grey_share(back) == 1 or (back.amax(1) - back.amin(1)).max() < 1e-6
    red = grey.clone()
    red[..., 100:120, 100:120] += torch.tensor([0.3, -0.2, -0.2])[:, None, None]  # 0.3 % of the photo
    for colour in (x, photo(COFFEE), photo(ASTRONAUT), photo("coffee-64.png"), red):
        assert estimate_tint(colour) is None
