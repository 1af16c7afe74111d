"""Files in, files out: every pixel and every promise about the container survives the round trip."""

from __future__ import annotations

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch

from operators import RestoreError
from restore.images import io, sixteen
from restore.images.metadata import Metadata


def photo(height=13, width=17, channels=3, seed=0, top=256):
    kind = np.uint8 if top == 256 else np.uint16
    return np.random.default_rng(seed).integers(0, top, (height, width, channels)).astype(kind)


def saved(path, array, **options):
    PIL.Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_formats_return_the_same_bytes(tmp_path, suffix, channels):
    array = photo(channels=channels)
    record = io.read_image(saved(tmp_path / f"a{suffix}", array))
    assert record.pixels.shape == (1, 3, 13, 17) and record.grey == (channels == 1) and record.bits == 8
    io.write_image(tmp_path / f"b{suffix}", record.pixels, record)
    with PIL.Image.open(tmp_path / f"b{suffix}") as image:
        assert image.mode == ("L" if channels == 1 else "RGB")
        assert np.array_equal(np.asarray(image).reshape(array.shape), array)


def test_every_level_survives_in_8_and_16_bits(tmp_path):
    for levels, kind in ((256, np.uint8), (65536, np.uint16)):
        ramp = np.arange(levels).astype(kind).reshape(16, -1, 1)
        x = io.to_tensor(ramp)
        assert x.min() == -1 and x.max() == 1
        record = io.ImageRecord(x, tmp_path / "ramp.png", "PNG", grey=True, bits=8 if levels == 256 else 16)
        io.write_image(tmp_path / "ramp.png", x, record)
        again = io.read_image(tmp_path / "ramp.png")
        assert again.bits == record.bits and again.grey
        with PIL.Image.open(tmp_path / "ramp.png") as image:
            assert np.array_equal(np.asarray(image).astype(np.int64), ramp[:, :, 0])
        assert torch.equal(again.pixels, x)


def test_nothing_is_stretched():
    low_contrast = torch.full((3, 4, 4), 0.1)
    low_contrast[:, 0, 0] = 0.12
    assert sorted(set(io.to_uint8(low_contrast).ravel())) == [140, 143]  # round(1.1 * 127.5), round(1.12 * 127.5)
    assert set(io.to_uint8(torch.tensor([-3.0, 3.0]).expand(3, 2, 2)).ravel()) == {0, 255}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_exif_orientation_is_applied_once(tmp_path, orientation, suffix):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Maker"
    array = np.repeat(np.repeat(photo(4, 6), 16, 0), 16, 1)  # blocks, so that JPEG keeps them recognisable
    path = saved(tmp_path / f"a{suffix}", array, exif=exif.tobytes())
    with PIL.Image.open(path) as image:
        expected = np.asarray(PIL.ImageOps.exif_transpose(image)).astype(int)
    record = io.read_image(path)
    assert np.array_equal(io.to_uint8(record.pixels[0]).astype(int), expected)
    assert record.size == ((96, 64) if orientation >= 5 else (64, 96))
    io.write_image(tmp_path / f"b{suffix}", record.pixels, record)
    with PIL.Image.open(tmp_path / f"b{suffix}") as image:
        assert image.getexif().get(0x0112, 1) == 1
        assert image.size == record.size[::-1]
        assert image.getexif()[0x010F] == "Maker"
        assert np.abs(np.asarray(image).astype(int) - expected).mean() < (4 if suffix == ".jpg" else 1e-9)


def test_alpha_is_kept_and_follows_a_new_size(tmp_path):
    array = photo(8, 8, 4)
    array[..., 3] = np.repeat([[0] * 4 + [255] * 4], 8, 0)
    record = io.read_image(saved(tmp_path / "a.png", array))
    io.write_image(tmp_path / "b.png", record.pixels, record)
    assert np.array_equal(np.asarray(PIL.Image.open(tmp_path / "b.png")), array)
    io.write_image(tmp_path / "c.png", torch.zeros(1, 3, 16, 16), record)
    bigger = np.asarray(PIL.Image.open(tmp_path / "c.png"))[..., 3]
    assert bigger.shape == (16, 16) and (bigger[:, :6] == 0).all() and (bigger[:, 10:] == 255).all()
    with pytest.raises(RestoreError, match="transparency"):
        io.write_image(tmp_path / "d.jpg", record.pixels, record)


def test_palettes_transparency_cmyk_and_bilevel(tmp_path):
    array = np.repeat(np.repeat(np.array([[[200, 30, 90], [10, 240, 7]]], np.uint8), 8, 0), 8, 1)
    PIL.Image.fromarray(array).quantize(4).save(tmp_path / "p.png", transparency=0)
    record = io.read_image(tmp_path / "p.png")
    assert not record.grey and record.alpha is not None and set(record.alpha.unique().tolist()) == {0.0, 1.0}
    assert np.array_equal(io.to_uint8(record.pixels[0]), array)
    PIL.Image.fromarray(array).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    record = io.read_image(tmp_path / "c.jpg")
    assert np.abs(io.to_uint8(record.pixels[0])[2:6, 2:6].astype(int) - array[2:6, 2:6]).max() < 12
    io.write_image(tmp_path / "d.jpg", record.pixels, record)
    assert PIL.Image.open(tmp_path / "d.jpg").mode == "RGB"
    PIL.Image.fromarray(array[..., 0] > 100).save(tmp_path / "b.png")
    assert io.read_image(tmp_path / "b.png").grey


def test_colour_profile_is_kept(tmp_path):
    profile = bytes(16) + b"RGB " + b"not parsed, only carried " * 4
    for name, bits in (("a.png", 8), ("a.jpg", 8), ("a16.png", 16), ("a16.tif", 16)):
        record = io.ImageRecord(
            torch.zeros(1, 3, 8, 8), tmp_path / name, "PNG", bits=bits, metadata=Metadata(icc=profile)
        )
        io.write_image(tmp_path / name, record.pixels, record)
        assert io.read_image(tmp_path / name).metadata.icc == profile
        assert io.read_image(tmp_path / name).bits == bits


def test_camera_exif_is_carried_over_without_stale_sizes(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0110] = "Camera"
    exif.get_ifd(0x8769).update({0xA002: 4000, 0xA003: 3000, 0x9003: "2024:05:06 07:08:09"})
    for suffix in (".jpg", ".png", ".webp"):
        record = io.read_image(saved(tmp_path / f"a{suffix}", photo(), exif=exif.tobytes()))
        io.write_image(tmp_path / f"b{suffix}", record.pixels, record)
        with PIL.Image.open(tmp_path / f"b{suffix}") as image:
            assert image.getexif()[0x0110] == "Camera"
            assert dict(image.getexif().get_ifd(0x8769)) == {0x9003: "2024:05:06 07:08:09"}
    whole = (tmp_path / "a.jpg").read_bytes()
    at = whole.index(b"Exif\0\0") + 14
    (tmp_path / "c.jpg").write_bytes(whole[:at] + b"\xff" * 40 + whole[at + 40 :])  # a broken directory
    assert io.read_image(tmp_path / "c.jpg").size == (13, 17)


def test_a_format_that_cannot_hold_the_size_says_so(tmp_path):
    with pytest.raises(RestoreError, match="a.jpg as JPEG"):
        io.write_image(tmp_path / "a.jpg", torch.zeros(1, 3, 1, 70000))
    assert list(tmp_path.iterdir()) == []


def test_grey_stays_grey_unless_colour_is_asked_for(tmp_path):
    record = io.read_image(saved(tmp_path / "a.jpg", photo(channels=1)))
    red = torch.full((1, 3, 13, 17), -1.0)
    red[:, 0] = 1
    io.write_image(tmp_path / "b.png", red, record)
    with PIL.Image.open(tmp_path / "b.png") as image:
        assert image.mode == "L" and set(np.asarray(image).ravel()) == {76}  # 0.299 * 255
    io.write_image(tmp_path / "c.png", red, record, colour=True)
    assert PIL.Image.open(tmp_path / "c.png").mode == "RGB"


def test_unreadable_files_are_named(tmp_path):
    good = saved(tmp_path / "good.png", photo(64, 64))
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:4000])
    jpeg = tmp_path / "cut.jpg"
    jpeg.write_bytes(saved(tmp_path / "good.jpg", photo(64, 64)).read_bytes()[:2000])
    sixteen_cut = tmp_path / "cut16.png"
    sixteen_cut.write_bytes(sixteen.encode_png(photo(64, 64, 3, top=65536))[:5000])
    text = tmp_path / "text.png"
    text.write_text("no picture")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    for path in (cut, jpeg, sixteen_cut, text, empty, tmp_path / "missing.png", tmp_path):
        with pytest.raises(RestoreError, match=path.name):
            io.read_image(path)
    frames = [PIL.Image.fromarray(photo(seed=seed)) for seed in (1, 2)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(RestoreError, match="2 frames"):
        io.read_image(tmp_path / "moving.gif")
    PIL.Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(RestoreError, match="32-bit"):
        io.read_image(tmp_path / "float.tif")


def test_bad_pixels_are_refused_and_leave_no_file(tmp_path):
    image = torch.zeros(1, 3, 4, 4)
    image[0, 1, 2, 3] = float("nan")
    for call in (io.to_uint8, io.to_pil, io.to_tensor, lambda x: io.write_image(tmp_path / "a.png", x)):
        with pytest.raises(RestoreError, match="NaN"):
            call(image)
    with pytest.raises(RestoreError, match="must end in"):
        io.write_image(tmp_path / "a.xyz", torch.zeros(3, 4, 4))
    with pytest.raises(RestoreError, match="one image"):
        io.write_image(tmp_path / "a.png", torch.zeros(2, 3, 4, 4))
    assert list(tmp_path.iterdir()) == []
