"""Every mode of Pillow in every format that Pillow writes, with and without transparency, EXIF and profile: read as
Pillow itself converts it, or refused by name; written again with all that the format holds, and the rest said."""

from __future__ import annotations

import io as bytesio
import itertools
import warnings
from pathlib import Path

import imagecodecs
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import tifffile
from PIL import ImageCms

from operators import RestoreError
from restore.images import io
from restore.images.formats import FORMATS, READ_FORMATS, choose_suffix

MODES = "1 L P LA PA RGB RGBA RGBX RGBa La CMYK YCbCr LAB HSV I F I;16 I;16L I;16B".split()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PROFILES = {space: SRGB[:16] + space.encode() + SRGB[20:] for space in ("RGB ", "GRAY", "CMYK", "Lab ")}
LOSSLESS = ("PNG", "TIFF", "BMP", "PPM")
# What Pillow reads and we refuse, for what Pillow makes of it: 16 bits cut to 8, a range that is not filled.
REFUSED = ("must have", "must be compressed", "must hold one image", "must be a picture", "must be binary")


def draw(mode):
    values = np.random.default_rng(0).integers(0, 256, (24, 40, 4), np.uint8)
    values[:12, :, 3] = 255
    rgba = PIL.Image.fromarray(values)
    if mode in ("I", "F"):
        return PIL.Image.fromarray(values[..., 0].astype(np.int32 if mode == "I" else np.float32))
    if mode.startswith("I;16"):
        data = (values[..., 0].astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2").tobytes()
        return PIL.Image.frombytes(mode, (40, 24), data)
    source = rgba if mode in ("RGBA", "LA", "RGBa", "La") else rgba.convert("RGB")
    if mode == "PA":
        return source.convert("P").convert("PA")
    return source.convert("LA").convert("La") if mode == "La" else source.convert(mode)


def save(path, image, image_format, transparent, exif, profile):
    """Write a file with Pillow; whether it could."""
    block = PIL.Image.Exif()
    block[0x010F] = "Maker"
    block[0x0112] = 6
    options = ({"exif": block} if exif else {}) | ({"icc_profile": PROFILES[profile]} if profile else {})
    if transparent:
        options["transparency"] = {"RGB": (10, 20, 30)}.get(image.mode, 3)
    try:
        image.save(path, image_format, **options)
        with PIL.Image.open(path) as again:
            again.load()
            assert again.has_transparency_data in (True, False)
            again.copy().convert("RGB")
        return True
    except Exception:  # Pillow does not write this mode so, or does not read it again
        return False


def read_as_pillow(path):
    """uint8 (H, W, C) in RGB, alpha or None, and the mode and format in the file, by Pillow alone."""
    with PIL.Image.open(bytesio.BytesIO(path.read_bytes())) as image:  # not mapped: see samples.read_samples
        image.load()
        mode, image_format = image.mode, image.format
        alpha = image.has_transparency_data
        upright = PIL.ImageOps.exif_transpose(image)
        if mode.startswith("I;16") or (mode, image_format) == ("I", "PPM"):
            grey, absent = np.asarray(upright).astype(np.uint16), image.info.get("transparency")
            alpha = None if absent is None else np.where(grey == absent, 0, 255)
            return np.repeat(grey[..., None], 3, 2), alpha, mode, image_format
        rgba = np.asarray(upright.convert("RGBA" if alpha else "RGB"))
    return rgba[..., :3], rgba[..., 3] if alpha else None, mode, image_format


def check_written(tmp_path, record, path):
    """The result has the photo's pixels and says what the photo says, or list_lost does."""
    target = tmp_path / f"result{choose_suffix(path)}"
    image_format = next(name for name, form in FORMATS.items() if target.suffix in form.suffixes)
    if record.alpha is not None and "alpha" not in FORMATS[image_format].holds:
        with pytest.raises(RestoreError, match="no transparency"):
            io.encode_image(target, record.pixels, record)
        return
    io.write_image(target, record.pixels, record)
    lost, again = io.list_lost(target, record), io.read_image(target)
    if image_format in LOSSLESS:
        levels = 65535 if again.bits == 16 else 255
        assert ((again.pixels - record.pixels).abs().max() * levels / 2 < 0.51) and again.bits == record.bits
        assert (again.alpha is None) == (record.alpha is None)
        assert again.alpha is None or np.array_equal(again.alpha, record.alpha)
    elif image_format == "JPEG" and record.bits == 16:
        assert "16 bits" in lost
    with PIL.Image.open(path) as before, PIL.Image.open(target) as after:
        exif, icc = before.getexif().get(0x010F), before.info.get("icc_profile")
        assert after.getexif().get(0x010F) == exif or "EXIF" in lost
        assert after.getexif().get(0x0112, 1) == 1
        kept = after.info.get("icc_profile")
        assert kept == icc or (kept is None and any("profile" in word for word in lost))
        if kept is not None:
            grey = image_format != "WEBP" and again.grey
            assert kept[16:20] == (b"GRAY" if grey else b"RGB ")


@pytest.mark.slow
@pytest.mark.parametrize("image_format", sorted({*PIL.Image.SAVE} - {"PDF", "PALM"}))
def test_every_mode(tmp_path, image_format):
    warnings.simplefilter("ignore")
    suffixes = [s for s, name in PIL.Image.registered_extensions().items() if name == image_format] or [".picture"]
    path, count, seen = tmp_path / f"photo{suffixes[0]}", 0, set()
    options = itertools.product(MODES, (False, True), (False, True), (None, *PROFILES))
    if image_format == "ICNS":  # it has none of these, and ten pictures of up to 1024 pixels
        options = itertools.product(MODES, (False,), (False,), (None,))
    for mode, transparent, exif, profile in options:
        if not save(path, draw(mode), image_format, transparent, exif, profile):
            continue
        count += 1
        if (content := path.read_bytes()) in seen:  # a format without EXIF, profile or alpha
            continue
        seen.add(content)
        case = (mode, transparent, exif, profile)
        expected, alpha, stored, read_format = read_as_pillow(path)
        try:
            record = io.read_image(path)
        except RestoreError as error:
            assert path.name in str(error) and len(str(error).splitlines()) == 1, case
            unknown = read_format not in (*READ_FORMATS, "MPO")
            assert unknown or any(words in str(error) for words in REFUSED), (case, error)
            if not unknown and stored[0] not in "IF":  # an 8-bit picture: what Pillow would read from it is wrong
                assert stored == "RGB" and image_format == "TIFF" and mode == "YCbCr", (case, error)
            continue
        assert record.bits == (16 if expected.dtype == np.uint16 else 8), case
        levels = 65535 if record.bits == 16 else 255
        values = np.asarray((record.pixels[0].permute(1, 2, 0) + 1) / 2 * levels)
        if record.grey and stored in ("1", "L", "LA", "La"):
            assert np.array_equal(values[..., 0], values[..., 1])
        assert np.abs(values - expected).max() < 0.51, case
        assert (record.alpha is None) == (alpha is None), case
        assert alpha is None or np.abs(np.asarray(record.alpha[0, 0]) * 255 - alpha).max() < 0.51, case
        check_written(tmp_path, record, path)
    assert count or image_format in ("BUFR", "EPS", "GRIB", "HDF5", "WMF"), "Pillow writes no mode of it"


SIXTEEN = {f"{channels}.png": ("png", channels) for channels in (1, 2, 3, 4)}
SIXTEEN |= {f"{channels}.tif": ("tif", channels) for channels in (1, 3, 4)}
SIXTEEN |= {"1.pgm": ("pnm", 1), "3.ppm": ("pnm", 3)}


@pytest.mark.slow
@pytest.mark.parametrize("profile", [None, *PROFILES])
@pytest.mark.parametrize("name", SIXTEEN)
def test_sixteen_bits(tmp_path, name, profile):
    kind, channels = SIXTEEN[name]
    samples = np.random.default_rng(0).integers(0, 65536, (24, 40, channels)).astype(np.uint16)
    path, squeezed = tmp_path / name, samples[..., 0] if channels == 1 else samples
    if kind == "png":
        path.write_bytes(imagecodecs.png_encode(squeezed))
    elif kind == "tif":
        options = {"photometric": "rgb", "extrasamples": ["unassalpha"] if channels == 4 else None}
        options = options if channels > 1 else {"photometric": "minisblack"}
        tifffile.imwrite(path, squeezed, iccprofile=PROFILES.get(profile), **options)
    else:
        magic = "P5" if channels == 1 else "P6"
        path.write_bytes(f"{magic} 40 24 65535\n".encode() + samples.astype(">u2").tobytes())
    record = io.read_image(path)
    colours = 1 if channels < 3 else 3
    values = np.asarray((record.pixels[0, :colours].permute(1, 2, 0) + 1) / 2 * 65535)
    assert record.bits == 16 and record.grey == (channels < 3)
    assert np.abs(values - samples[..., :colours]).max() < 0.51
    assert (record.alpha is None) == (channels in (1, 3))
    if record.alpha is not None:
        assert np.abs(np.asarray(record.alpha[0, 0]) * 65535 - samples[..., -1]).max() < 0.51
    check_written(tmp_path, record, path)


@pytest.mark.slow
def test_every_cut_of_a_file_is_refused_by_name_or_read(tmp_path):
    """No damaged file of a written format raises anything but a RestoreError of one line."""
    warnings.simplefilter("ignore")
    for image_format, form in FORMATS.items():
        buffer = bytesio.BytesIO()
        draw("RGB").save(buffer, image_format)
        content = buffer.getvalue()
        for length in range(0, len(content), max(1, len(content) // 60)):
            path = Path(tmp_path / f"cut{form.suffixes[0]}")
            path.write_bytes(content[:length])
            try:
                io.read_image(path)
            except RestoreError as error:
                assert path.name in str(error) and len(str(error).splitlines()) == 1
