"""The table of formats and properties is true, cell by cell; what a format does not hold is said."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import ImageCms
from PIL.PngImagePlugin import PngInfo

from restore.images import io
from restore.images.folder import read_image_size
from restore.images.formats import FORMATS, PROPERTIES, READABLE_SUFFIXES, format_table
from restore.images.metadata import Metadata

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY, LAB = (SRGB[:16] + space + SRGB[20:] for space in (b"GRAY", b"Lab "))
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><tiff:Artist>A</tiff:Artist></x:xmpmeta>"
SUFFIXES = [suffix for form in FORMATS.values() for suffix in form.suffixes]


def make_exif():
    exif = PIL.Image.Exif()
    exif[0x010F] = "Maker"
    exif[0x8769] = {0x9003: "2024:05:06 07:08:09", 0x829A: (1, 250)}
    exif[0x8825] = {1: "N", 2: (52.0, 30.0, 1.5)}
    return exif.tobytes()


ALL = Metadata(SRGB, make_exif(), XMP, (300.0, 240.0), ((b"gAMA", (100000).to_bytes(4, "big")),))


def make_record(grey=False, bits=8, alpha=False, metadata=ALL):
    pixels = torch.linspace(-1, 1, 3 * 12 * 9).reshape(1, 3, 12, 9)
    pixels = pixels[:, :1].expand(-1, 3, -1, -1).contiguous() if grey else pixels
    alpha = torch.linspace(0, 1, 12 * 9).reshape(1, 1, 12, 9) if alpha else None
    return io.ImageRecord(pixels, Path("photo.png"), "PNG", grey, bits, alpha, metadata)


def write(tmp_path, suffix, record):
    io.write_image(tmp_path / f"a{suffix}", record.pixels, record)
    return tmp_path / f"a{suffix}"


# How an independent reader sees each property of a file.
def has_exif(image):
    exif = image.getexif()
    ours = exif.get_ifd(0x8769).get(0x9003) == "2024:05:06 07:08:09" and exif.get_ifd(0x8825).get(1) == "N"
    return exif.get(0x010F) == "Maker" and ours


SEEN = {
    "grey": lambda image: image.mode in ("L", "I;16", "I"),
    "alpha": lambda image: image.mode in ("LA", "RGBA"),
    "colour profile": lambda image: image.info.get("icc_profile") == SRGB,
    "EXIF": has_exif,
    "XMP": lambda image: image.info.get("xmp") == XMP,
    "resolution": lambda image: np.allclose([float(v) for v in image.info.get("dpi", ())] or 0, (300, 240), atol=0.1),
    "gamma": lambda image: image.info.get("gamma") == 1.0,
}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_cell_of_the_table(tmp_path, suffix, name, bits):
    holds = next(form.holds for form in FORMATS.values() if suffix in form.suffixes)
    record = make_record(grey=name == "grey", bits=bits, alpha=name == "alpha")
    if name == "alpha" and "alpha" not in holds:
        with pytest.raises(io.RestoreError, match="transparency"):
            write(tmp_path, suffix, record)
        return
    path = write(tmp_path, suffix, record)
    if name == "16 bits":
        found = io.read_image(path)
        assert (found.bits == 16) == (name in holds and bits == 16)
        exact = (found.pixels - record.pixels).abs().max() < 2.1 / 65535
        assert exact == (found.bits == 16)
    else:
        with PIL.Image.open(path) as image:
            assert SEEN[name](image) == (name in holds)
    if name not in ("grey", "alpha", "16 bits"):
        assert (name in io.list_lost(path, record)) == (name not in holds)
    assert ("16 bits" in io.list_lost(path, record)) == (bits == 16 and "16 bits" not in holds)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_a_file_says_survives_being_read_and_written(tmp_path, suffix, bits):
    record = io.read_image(write(tmp_path, suffix, make_record(bits=bits)))
    again = tmp_path / f"b{suffix}"
    io.write_image(again, record.pixels, record)
    before, after = record.metadata, io.read_image(again).metadata
    assert (before.icc, before.xmp, before.gamma) == (after.icc, after.xmp, after.gamma)
    assert before.dpi == after.dpi and (before.exif is None) == (after.exif is None)
    with PIL.Image.open(again) as image:
        assert has_exif(image) == ("EXIF" in next(form.holds for form in FORMATS.values() if suffix in form.suffixes))
    assert io.list_lost(again, record) == []


def test_a_picture_with_too_many_pixels_is_not_called_unreadable(tmp_path, monkeypatch):
    path = write(tmp_path, ".png", make_record())
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 40)  # refused above twice as many
    with pytest.raises(io.RestoreError, match="a.png must have at most 0 million pixels, got more; cut it in parts"):
        io.read_image(path)


def test_the_table_in_the_documents_is_this_one():
    assert format_table() in (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("profile", [SRGB, GREY, LAB])
@pytest.mark.parametrize(("grey", "alpha"), [(False, False), (True, False), (True, True)])
def test_a_profile_of_another_colour_space_is_not_attached(tmp_path, suffix, bits, profile, grey, alpha):
    holds = next(form.holds for form in FORMATS.values() if suffix in form.suffixes)
    if alpha and "alpha" not in holds:
        return
    record = make_record(grey, bits, alpha, Metadata(icc=profile))
    path = write(tmp_path, suffix, record)
    with PIL.Image.open(path) as image:
        space = "GRAY" if grey and image.format != "WEBP" and not (alpha and image.format == "TIFF") else "RGB "
        fitting = profile[16:20] == space.encode() and "colour profile" in holds
        assert image.info.get("icc_profile") == (profile if fitting else None)
    assert ("colour profile" in io.list_lost(path, record)) == (not fitting)


def test_the_profile_of_another_colour_space_is_not_read_either(tmp_path):
    array = np.full((8, 8, 3), 90, np.uint8)
    for mode, profile, name in (("LAB", LAB, "Lab"), ("CMYK", SRGB[:16] + b"CMYK" + SRGB[20:], "CMYK")):
        picture = PIL.Image.fromarray(array).convert("LAB" if mode == "LAB" else mode)
        picture.save(tmp_path / "a.tif", icc_profile=profile)
        record = io.read_image(tmp_path / "a.tif")
        assert record.metadata.icc is None and f"{name} profile" in record.metadata.lost
        assert f"{mode} colours" in record.metadata.lost
        expected = np.asarray(picture.convert("RGB"))
        assert np.array_equal(io.to_uint8(record.pixels[0]), expected)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("source", [".jpg", ".png", ".tif", ".webp", ".avif"])
@pytest.mark.parametrize("target", [".jpg", ".png", ".tif", ".webp"])
def test_exif_goes_from_any_format_to_any_other(tmp_path, source, target, bits):
    picture = PIL.Image.fromarray(np.full((32, 48, 3), 90, np.uint8))
    picture.save(tmp_path / f"a{source}", exif=make_exif(), dpi=(300, 300))
    record = io.read_image(tmp_path / f"a{source}")
    record = io.ImageRecord(record.pixels, record.path, record.format, bits=bits, metadata=record.metadata)
    io.write_image(tmp_path / f"b{target}", record.pixels, record)
    with PIL.Image.open(tmp_path / f"b{target}") as image:
        assert image.size == (48, 32) and has_exif(image)
        assert image.getexif().get_ifd(0x8769)[0x829A] == 1 / 250 or image.getexif().get_ifd(0x8769)[0x829A] == (1, 250)


def pass_on(tmp_path, source, target, exif, changes, bits=8):
    """The record of a file with this EXIF and `changes` of its bytes, and the directories of the EXIF of its result."""
    path = tmp_path / f"a{source}"
    PIL.Image.fromarray(np.full((32, 48, 3), 90, np.uint8)).save(path, exif=exif.tobytes())
    for before, after in changes.items():
        path.write_bytes(path.read_bytes().replace(before, after))
    record = io.read_image(path)
    record = io.ImageRecord(record.pixels, record.path, record.format, bits=bits, metadata=record.metadata)
    io.write_image(tmp_path / f"b{target}", torch.zeros(1, 3, 16, 16), record)
    with PIL.Image.open(tmp_path / f"b{target}") as image:
        return record, dict(image.getexif()), *(image.getexif().get_ifd(tag) for tag in (0x8769, 0x8825))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("target", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("source", [".jpg", ".tif"])
def test_text_of_exif_keeps_its_bytes(tmp_path, source, target, bits):
    """Cameras and programs write UTF-8 where the standard has ASCII."""
    texts = {b"a" * 14: "Jürgen 東京", b"l" * 12: "läns 東京", b"d" * 10: "2024:é:06"}
    artist, lens, date = (text.decode() for text in texts)
    exif = PIL.Image.Exif()
    exif[0x010E] = exif[0x013B] = artist
    exif[0x8769], exif[0x8825] = {0xA434: lens}, {1: "N", 0x001D: date}
    changes = {before: after.encode() for before, after in texts.items()}
    _, found, camera, gps = pass_on(tmp_path, source, target, exif, changes, bits)
    kept = found[0x010E], found[0x013B], camera[0xA434], gps[0x001D]
    assert [text.encode("latin-1").decode() for text in kept] == ["Jürgen 東京", *texts.values()]


@pytest.mark.parametrize("target", [".jpg", ".png", ".tif", ".webp"])
def test_a_tag_that_cannot_be_written_is_the_only_one_that_is_lost(tmp_path, target):
    exif = PIL.Image.Exif()
    exif[0x010F] = "Maker"
    exif[0x8825] = {1: "N", 6: 3.5}
    changes = {b"\0\6\0\5": b"\0\6\0\x0a"}  # a signed fraction, against the standard
    changes[b"\0\0\0\7\0\0\0\2"] = b"\xff\xff\xff\xf9\0\0\0\2"
    record, found, _, gps = pass_on(tmp_path, ".jpg", target, exif, changes)
    assert found[0x010F] == "Maker" and gps == {1: "N"}
    assert io.list_lost(tmp_path / f"b{target}", record) == ["EXIF GPSAltitude"]


def test_sizes_of_the_file_do_not_become_those_of_the_result(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x010F], exif[0x0100], exif[0x0101] = "Maker", 48, 32
    exif[0x8769] = {0xA002: 48, 0xA003: 32, 0x9003: "2024:05:06 07:08:09"}
    _, found, camera, _ = pass_on(tmp_path, ".jpg", ".jpg", exif, {})
    assert set(found) == {0x010F, 0x8769} and set(camera) == {0x9003}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("exif", [False, True])
def test_xmp_behind_the_pixels_is_kept(tmp_path, bits, exif):
    """As exiftool writes it into a PNG file."""
    record = make_record(bits=bits, metadata=Metadata(exif=make_exif() if exif else None))
    content = write(tmp_path, ".png", record).read_bytes()
    chunk = b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + XMP
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(content[:-12] + chunk + content[-12:])  # before the last chunk
    found = io.read_image(tmp_path / "a.png")
    assert found.bits == bits and found.metadata.xmp == XMP


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".avif"])
def test_the_size_in_the_header_is_that_of_the_upright_picture(tmp_path, suffix, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    PIL.Image.fromarray(np.full((32, 48, 3), 90, np.uint8)).save(tmp_path / f"a{suffix}", exif=exif)
    assert read_image_size(tmp_path / f"a{suffix}") == io.read_image(tmp_path / f"a{suffix}").size


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_a_result_is_not_turned_twice(tmp_path, suffix, bits):
    """Neither by EXIF nor by XMP, which Pillow and viewers read where EXIF has no orientation."""
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6" exif:PixelXDimension="48"/></x:xmpmeta>'
    options = {"xmp": xmp}
    if suffix == ".png":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options = {"pnginfo": info}
    elif suffix == ".tif":
        options = {"tiffinfo": {700: xmp}}
    PIL.Image.fromarray(np.full((32, 48, 3), 90, np.uint8)).save(tmp_path / f"a{suffix}", **options)
    record = io.read_image(tmp_path / f"a{suffix}")
    assert record.size == (48, 32)
    record = io.ImageRecord(record.pixels, record.path, record.format, bits=bits, metadata=record.metadata)
    io.write_image(tmp_path / f"b{suffix}", record.pixels, record)
    assert io.read_image(tmp_path / f"b{suffix}").size == (48, 32)
    with PIL.Image.open(tmp_path / f"b{suffix}") as image:
        assert b"xmpmeta" in image.info["xmp"] and b"PixelXDimension" not in image.info["xmp"]


def test_the_layout_of_a_tiff_file_does_not_become_exif(tmp_path):
    tags = {270: '{"shape": [32, 48, 3]}', 271: "Maker", 305: "scanner 1.0"}
    picture = PIL.Image.fromarray(np.full((32, 48, 3), 90, np.uint8))
    picture.save(tmp_path / "a.tif", tiffinfo=tags, compression="tiff_lzw")
    record = io.read_image(tmp_path / "a.tif")
    io.write_image(tmp_path / "b.jpg", torch.zeros(1, 3, 16, 16), record)
    with PIL.Image.open(tmp_path / "b.jpg") as image:
        exif = dict(image.getexif())
    assert exif == {271: "Maker", 305: "scanner 1.0"}


def test_the_exif_of_a_large_thumbnail_does_not_stop_a_jpeg(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x010F] = "M" * 70000
    record = make_record(metadata=Metadata(exif=exif.tobytes(), xmp=b"x" * 70000))
    for suffix in (".jpg", ".png"):
        io.write_image(tmp_path / f"a{suffix}", record.pixels, record)
    assert io.list_lost("a.jpg", record) == ["EXIF", "XMP"] and io.list_lost("a.png", record) == []
    assert PIL.Image.open(tmp_path / "a.png").getexif()[0x010F] == "M" * 70000


def test_readable_suffixes_are_those_of_pillow():
    for suffix in (".jfif", ".jpe", ".jp2", ".tga", ".mpo", ".gif", ".avif", ".psd", ".heic"):
        assert suffix in READABLE_SUFFIXES
    assert not {".pdf", ".eps", ".ps", ".wmf", ".h5", ".mpg"} & {*READABLE_SUFFIXES}
    assert not [suffix for suffix in READABLE_SUFFIXES if not re.fullmatch(r"\.[a-z0-9]+", suffix)]
