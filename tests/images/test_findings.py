"""What is found in photos with damages that are known, and what is not found in sound ones."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

import operators
from operators import RestoreError
from restore.images import io
from restore.images.blocks import Compression, estimate_quantised_noise, scale_table
from restore.images.damage import detect_damage
from restore.images.findings import CERTAIN, SENSITIVITY, inspect_photo
from restore.images.motion import Motion
from restore.paths import data_dir
from restore.repair import SHARPENED, choose_repair

PHOTOS = data_dir() / "photos"


@pytest.fixture(scope="module")
def sharp():
    """The cat at 440 x 288: above what is called small, and with its own compression averaged away."""
    return io.read_image(PHOTOS / "chelsea.jpg").pixels[..., 5:293, 5:445]


def add_noise(x, levels):
    return x + levels / 127.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def inspect(folder, x, **saving):
    path = folder / ("photo.jpg" if saving else "photo.png")
    io.write_image(folder / "photo.png", x[0])
    if saving:
        Image.open(folder / "photo.png").save(path, **saving)
    return inspect_photo(path)


def test_strong_noise_is_not_blur(tmp_path, sharp):
    for levels in (25, 50):
        found = inspect(tmp_path, add_noise(sharp, levels))
        assert found.sigma * 127.5 == pytest.approx(levels, rel=0.1) and found.blur == 0 and found.motion is None
        assert choose_repair(found).config["name"] == "denoising" and not found.damage


@pytest.mark.parametrize("std, levels", [(1.5, 2), (2.0, 5), (3.0, 15)])
def test_blur_below_noise(tmp_path, sharp, std, levels):
    found = inspect(tmp_path, add_noise(operators.GaussianBlur(25, std).A(sharp), levels))
    assert found.blur == pytest.approx(std, rel=0.35) and found.motion is None


@pytest.mark.parametrize("length, angle", [(9, 30), (15, 115)])
def test_straight_motion(tmp_path, sharp, length, angle):
    kernel = Motion(length, angle).kernel()
    assert float(kernel.sum()) == pytest.approx(1)
    found = inspect(tmp_path, add_noise(operators.Blur(kernel).A(sharp), 2))
    assert found.motion.length == pytest.approx(length, abs=1.5) and found.blur == 0
    assert abs((found.motion.angle - angle + 90) % 180 - 90) < 6
    assert choose_repair(found).config["name"] == "blur"


def test_jpeg_is_read_from_the_file_and_seen_in_the_pixels(tmp_path, sharp):
    stated = inspect(tmp_path, sharp, quality=20)
    assert stated.quality == 20 and len(stated.jpeg["tables"]) == 2 and not stated.damage
    pixels = io.read_image(tmp_path / "photo.jpg").pixels
    for top, left in ((0, 0), (3, 5)):
        seen = inspect(tmp_path, pixels[..., top:, left:])
        assert abs(seen.quality - 20) <= 1 and seen.jpeg["offset"] == [top, left]
    assert choose_repair(seen).config["name"] == "jpeg"
    assert inspect(tmp_path, sharp).jpeg is None


def test_noise_before_the_compression(tmp_path, sharp):
    found = inspect(tmp_path, add_noise(sharp, 20), quality=50)
    assert found.sigma * 127.5 == pytest.approx(20, rel=0.2)
    repair = choose_repair(found)
    assert repair.config["name"] == "jpeg" and repair.config["noise"]["sigma"] == found.sigma
    assert "noise" in repair.describe() and "JPEG of quality 50" in repair.describe()


@pytest.mark.parametrize("quality, most", [(60, 6.5), (80, 3.0)])
def test_fur_is_no_noise_before_the_compression(tmp_path, sharp, quality, most):
    """Pieces of nothing but fur were told noise of 8 to 14 of 255, and lost it."""
    table = Compression(quality, tuple(map(tuple, scale_table(quality).tolist())))

    def measure(piece, levels):
        io.write_image(tmp_path / "piece.png", add_noise(piece, levels)[0])
        Image.open(tmp_path / "piece.png").save(tmp_path / "piece.jpg", quality=quality)
        return 127.5 * estimate_quantised_noise(io.read_image(tmp_path / "piece.jpg").pixels, table)

    pieces = [sharp[..., top : top + 128, left : left + 128] for top in (0, 56, 112) for left in (0, 112, 168, 224)]
    assert np.mean([measure(piece, 0) for piece in pieces]) < most
    told = [measure(piece, 25) for piece in pieces]
    assert np.mean(told) == pytest.approx(25, rel=0.1) and min(told) > 19


def test_a_chain_in_the_order_of_what_happened(tmp_path, sharp):
    blurred = add_noise(operators.GaussianBlur(25, 3.0).A(sharp), 10)
    repair = choose_repair(inspect(tmp_path, blurred, quality=60))
    assert [part["name"] for part in repair.config["operators"]] == ["gaussian_blur", "jpeg"]
    assert repair.config["noise"]["sigma"] * 127.5 == pytest.approx(10, rel=0.2)
    operator = operators.build_operator(repair.config, image_size=sharp.shape[-2:])
    assert operator.A(sharp).shape == sharp.shape


def test_scratches(tmp_path, sharp):
    x = sharp.clone()
    for k in range(20, 250):
        x[..., k, 100 + k // 2 : 102 + k // 2] = 0.9
    repair = choose_repair(inspect(tmp_path, x))
    assert repair.config["name"] == "inpainting_mask" and repair.keep_known
    missing = repair.config["mask"][0, 0] == 0
    assert math.isclose(float(missing[60, 130:132].float().mean()), 1) and missing.float().mean() < 0.05


def test_a_fainter_scratch_that_ends_within_the_photo(sharp):
    """Few edges of things do: on undamaged held-out photos lines so clear run through the whole of it."""
    x, scratch = sharp[..., :288].clone(), torch.zeros(288, 288, dtype=torch.bool)
    for k in range(80):
        scratch[60 + k, 150 + k // 2 : 152 + k // 2] = True
    x[..., scratch] = 0.3 * x[..., scratch] + 0.6
    missing = detect_damage(x, SENSITIVITY, CERTAIN)[0, 0] == 0
    assert missing[scratch].float().mean() > 0.9 and missing.float().mean() < 0.03
    assert not (detect_damage(sharp, SENSITIVITY, CERTAIN) == 0).any()


def test_beside_certain_damage_a_thread_of_another_colour_stays(sharp):
    x, scratch, thread = sharp.clone(), *torch.zeros(2, 288, 440, dtype=torch.bool)
    for k in range(20, 250):
        scratch[k, 100 + k // 2 : 102 + k // 2] = True
    for k in range(80):
        thread[120 + k, 300 + k // 2 : 302 + k // 2] = True
    x[..., scratch], x[..., thread] = 0.9, 0.2 * x[..., thread] + 0.32
    assert (detect_damage(x, SENSITIVITY)[0, 0] == 0)[scratch | thread].all()  # a mask for a person to correct
    missing = detect_damage(x, SENSITIVITY, CERTAIN)[0, 0] == 0
    assert missing[scratch].all() and not missing[thread].any()


def test_a_light_or_two_are_no_dust(tmp_path, sharp):
    """A spot as of light in an eye is not filled in; more of them are dust."""
    rows, columns = np.mgrid[: sharp.shape[-2], : sharp.shape[-1]]
    x, places = sharp.clone(), [(60, 350), (200, 380), (250, 120), (30, 240), (120, 30)]
    for count, (top, left) in enumerate(places, 1):
        x[..., torch.from_numpy(np.hypot(rows - top, columns - left) < 2.5)] = 0.98
        if count in (1, 5):
            assert bool(inspect(tmp_path, x).damage) == (count == 5), count


def test_too_small_and_nothing_wrong(tmp_path):
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(tmp_path / "tiny.png")
    with pytest.raises(RestoreError, match="32 pixels.*tiny.png of 40 x 20"):
        inspect_photo(tmp_path / "tiny.png")


def test_motion_to_a_fraction_of_a_pixel(tmp_path, sharp):
    """The sharpened photo has 5 dB less if a motion of 9 pixels is taken for one of 8; of 9.25 and 31 degrees, 2 dB."""
    for length, angle in ((9, 30), (12, 160), (15, 115)):
        found = inspect(tmp_path, add_noise(operators.Blur(Motion(length, angle).kernel()).A(sharp), 1))
        assert found.motion.length == pytest.approx(length, abs=0.15)
        assert abs((found.motion.angle - angle + 90) % 180 - 90) <= 0.5


def test_no_motion_and_no_blur_in_small_sharp_pieces(tmp_path):
    """A piece of 128 pixels has one spectrum, in which whiskers look like the zeros of a long motion, and few edges."""
    for name in ("astronaut", "chelsea", "coffee"):
        photo = io.read_image(PHOTOS / f"{name}.jpg").pixels
        for top, left in ((40, 60), (150, 240), (160, 100)):
            piece = photo[..., top : top + 128, left : left + 128]
            for levels in (0, 10):
                found = inspect(tmp_path, add_noise(piece, levels))
                assert found.motion is None and not found.damage, (name, top, left, levels)
                assert found.blur == 0 or levels, (name, top, left)


def test_an_unclear_edge_is_no_blur(tmp_path, sharp):
    """What is left above strong noise at the coarsest scale is the shape of things, not their edges."""
    soft = operators.GaussianBlur(49, 6.0).A(0.15 * sharp[..., :128, :128])
    assert inspect(tmp_path, add_noise(soft, 15)).blur == 0


def test_sharpening_does_not_believe_its_estimate_to_the_last_digit(tmp_path, sharp):
    """An inverse of a kernel that is a fifth too large, for a photo without noise, is worse than the photo."""
    found = inspect(tmp_path, operators.GaussianBlur(25, 1.8).A(sharp))
    assert found.sigma < 0.004 and choose_repair(found).config["noise"]["sigma"] == SHARPENED
    assert choose_repair(found, sigma=0.002).config["noise"]["sigma"] == 0.002  # somebody knows better


def test_a_tiny_photo_is_enlarged_more(tmp_path, sharp):
    found = inspect(tmp_path, sharp)
    for side, factor in ((64, 4), (65, 2), (400, 2)):
        repair = choose_repair(dataclasses.replace(found, size=(side - 8, side)))
        assert repair.config["factor"] == factor and repair.done == (f"enlarged {factor} times",)
    noisy = dataclasses.replace(found, sigma=0.05)
    repair = choose_repair(dataclasses.replace(noisy, size=(40, 63)))
    assert repair.done == ("noise removed", "enlarged 4 times") and repair.config["name"] == "super_resolution"
    assert repair.config["noise"] == {"name": "gaussian", "sigma": 0.05}
    assert choose_repair(dataclasses.replace(noisy, size=(64, 64))).done == ("noise removed",)  # may be a face
    compressed = dataclasses.replace(found, size=(40, 63), jpeg={"quality": 20, "loss": 0.1}, quality=20)
    assert choose_repair(compressed).done == ("blocks removed",)
