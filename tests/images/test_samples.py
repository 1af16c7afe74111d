"""Colour model, polarity, sign, depth and transparency are those of the file, at every depth, or it is refused."""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np
import PIL.Image
import pytest
import tifffile

from operators import RestoreError
from restore.images import io

RAMP = np.arange(48).reshape(6, 8)


def read_grey(path):
    record = io.read_image(path)
    assert record.grey and record.alpha is None
    return record.bits, np.asarray((record.pixels[0, 0] + 1) / 2, np.float64)


def refuse(path, fact):
    with pytest.raises(RestoreError, match=fact) as caught:
        io.read_image(path)
    assert path.name in str(caught.value) and len(str(caught.value).splitlines()) == 1
    with pytest.raises(RestoreError, match=fact):  # before anything is computed
        io.check_source(path, path.with_name("a.png"))


def write_netpbm(path, magic, maximum, samples):
    height, width = samples.shape[:2]
    kind = ">u1" if maximum < 256 else ">u2"
    path.write_bytes(f"{magic}\n# a scanner's\n{width} {height}\n{maximum}\n".encode() + samples.astype(kind).tobytes())


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("byteorder", "<>")
def test_white_is_zero_in_min_is_white(tmp_path, bits, byteorder):
    top = 2**bits - 1
    samples = (RAMP * (top // 47)).astype(f"u{bits // 8}")
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="miniswhite", byteorder=byteorder)
    if (bits, byteorder) == (16, ">"):
        return refuse(tmp_path / "a.tif", "usual kind, got 1 x 16 bits")
    assert read_grey(tmp_path / "a.tif")[0] == bits
    assert np.allclose(read_grey(tmp_path / "a.tif")[1], 1 - samples / top, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_is_turned_whatever_its_mode_and_compression(tmp_path, mode, compression, orientation):
    """Pillow 12 maps uncompressed grey and four-channel pixels wrongly if they are to be turned."""
    values = np.random.default_rng(0).integers(0, 256, (6, 9, 4), np.uint8)
    picture = PIL.Image.fromarray(values)
    picture = PIL.Image.fromarray(values[..., 0] * np.uint16(257)) if mode == "I;16" else picture.convert(mode)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.tif", exif=exif, compression=compression)
    record = io.read_image(tmp_path / "a.tif")
    grey = np.asarray(picture) if mode == "I;16" else np.asarray(picture.convert("RGB"))[..., 0]
    expected = io.apply_orientation(grey, orientation) / (65535 if mode == "I;16" else 255)
    assert np.allclose((record.pixels[0, 0] + 1) / 2, expected, atol=1e-6)


@pytest.mark.parametrize("magic", ["P5", "P6"])
@pytest.mark.parametrize("maximum", [100, 255, 1023, 4095, 65535])
def test_netpbm_of_any_maximum_is_exact(tmp_path, magic, maximum):
    suffix, shape = (".pgm", (6, 8)) if magic == "P5" else (".ppm", (6, 8, 3))
    samples = np.random.default_rng(0).integers(0, maximum + 1, shape)
    write_netpbm(tmp_path / f"a{suffix}", magic, maximum, samples)
    record = io.read_image(tmp_path / f"a{suffix}")
    levels = 255 if maximum < 256 else 65535
    assert record.bits == (8 if maximum < 256 else 16) and record.grey == (magic == "P5")
    values = np.asarray((record.pixels[0] + 1) / 2 * levels).transpose(1, 2, 0)
    assert np.abs(values[..., : samples.ndim == 2 or 3].squeeze() - samples * levels / maximum).max() <= 0.51
    io.write_image(tmp_path / f"b{suffix}", record.pixels, record)
    again = io.read_image(tmp_path / f"b{suffix}")
    assert again.bits == record.bits and (again.pixels == record.pixels).all()


def test_netpbm_that_cannot_be_exact_is_refused(tmp_path):
    (tmp_path / "a.ppm").write_text("P3\n1 1\n65535\n1 2 65535\n")
    refuse(tmp_path / "a.ppm", "binary")
    (tmp_path / "b.pfm").write_bytes(b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.5))
    refuse(tmp_path / "b.pfm", "32-bit")
    write_netpbm(tmp_path / "c.ppm", "P6", 65535, np.zeros((6, 8, 3)))
    (tmp_path / "c.ppm").write_bytes((tmp_path / "c.ppm").read_bytes()[:-3])
    with pytest.raises(RestoreError, match="c.ppm.*truncated"):
        io.read_image(tmp_path / "c.ppm")


@pytest.mark.parametrize(
    ("kind", "options", "fact"),
    [
        ("i1", {"photometric": "minisblack"}, "signed 8-bit"),
        ("i2", {"photometric": "minisblack"}, "signed 16-bit"),
        ("u4", {"photometric": "minisblack"}, "32"),
        ("i4", {"photometric": "minisblack"}, "signed 32-bit"),
        ("f2", {"photometric": "minisblack"}, "f2.tif"),
        ("f4", {"photometric": "minisblack"}, "floating-point 32-bit"),
        ("f4", {"photometric": "rgb"}, "f4.tif"),
        ("u2", {"photometric": "cielab"}, "u2.tif"),
        ("u2", {"photometric": "separated"}, "CMYK"),
        ("u2", {"photometric": "rgb", "subfiletype": 1}, "raw"),
        ("u1", {"photometric": "rgb", "extratags": [(50706, 1, 4, (1, 4, 0, 0), True)]}, "raw"),
    ],
)
def test_what_would_be_read_as_other_values_is_refused(tmp_path, kind, options, fact):
    channels = {"minisblack": 1, "separated": 4}.get(options["photometric"], 3)
    samples = np.repeat(RAMP[..., None], channels, 2).astype(kind)
    tifffile.imwrite(tmp_path / f"{kind}.tif", samples[..., 0] if channels == 1 else samples, **options)
    try:
        refuse(tmp_path / f"{kind}.tif", fact)
    except PIL.Image.DecompressionBombError:
        raise AssertionError from None


def test_twelve_bits_are_refused_by_their_number(tmp_path):
    samples = (RAMP * 80).astype(np.uint16)
    data = imagecodecs.packints_encode(samples, 12)
    head = [(256, 4, 8), (257, 4, 6), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, 6)]
    tags = [*head, (279, 4, len(data))]
    body = b"".join(struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in tags)
    content = struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + body + bytes(4)
    (tmp_path / "a.tif").write_bytes(content)
    refuse(tmp_path / "a.tif", "got 12")


def test_colours_of_a_ycbcr_file_are_converted_or_refused(tmp_path):
    red = np.full((6, 8, 3), (76, 85, 255), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", red, photometric="ycbcr")
    refuse(tmp_path / "a.tif", "YCbCr")
    tifffile.imwrite(tmp_path / "b.tif", red, photometric="ycbcr", compression="zlib")
    record = io.read_image(tmp_path / "b.tif")
    assert np.abs(io.to_uint8(record.pixels[0])[0, 0].astype(int) - (254, 0, 0)).max() < 3


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extra", [[], ["unspecified"], ["unassalpha"]])
def test_extra_samples_mean_the_same_at_both_depths(tmp_path, bits, extra):
    samples = np.random.default_rng(0).integers(0, 2**bits, (6, 8, 4)).astype(f"u{bits // 8}")
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="rgb", extrasamples=extra or ["unassalpha"])
    if not extra:  # a file without the tag, as some programs write it
        with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as file:
            offset = file.pages[0].tags[338].offset
        content = bytearray((tmp_path / "a.tif").read_bytes())
        content[offset : offset + 2] = struct.pack("<H", 0xFDE8)  # a private tag
        (tmp_path / "a.tif").write_bytes(content)
    record = io.read_image(tmp_path / "a.tif")
    assert record.bits == bits and (record.alpha is None) == (extra == ["unspecified"])
    expected = samples[..., :3].transpose(2, 0, 1) / (2**bits - 1)
    assert np.allclose(np.asarray(record.pixels[0] + 1) / 2, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "depth", "given", "fact"),
    [
        (3, 8, 8, None),
        (1, 8, 8, None),
        (1, 16, 16, None),
        (3, 16, 16, "got 16 bits of RGB"),
        (1, 16, 12, "got 12 bits of grey"),
        (3, 8, 5, "got 5 bits of RGB"),
    ],
)
def test_jpeg_2000_is_exact_or_refused(tmp_path, channels, depth, given, fact):
    samples = np.repeat((RAMP * (2**given // 48))[..., None], channels, 2).astype(f"u{depth // 8}")
    encoded = imagecodecs.jpeg2k_encode(samples.squeeze(), level=0, bitspersample=given, reversible=True)
    (tmp_path / "a.jp2").write_bytes(encoded)
    if fact is not None:
        refuse(tmp_path / "a.jp2", fact)
        return
    record = io.read_image(tmp_path / "a.jp2")
    assert record.bits == depth and record.grey == (channels == 1)
    assert np.allclose(np.asarray(record.pixels[0, 0] + 1) / 2, samples[..., 0] / (2**depth - 1), atol=1e-6)


def test_other_formats_with_sixteen_bits_are_refused(tmp_path):
    PIL.Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / "a.sgi", bpc=2)
    refuse(tmp_path / "a.sgi", "8 bits.*SGI, got 16")
    PIL.Image.fromarray(np.zeros((6, 8), np.uint16)).save(tmp_path / "a.im")
    refuse(tmp_path / "a.im", "8 bits.*IM, got 16")
    cards = ["SIMPLE  =                    T", "BITPIX  =                   16", "NAXIS   =                    2"]
    cards += ["NAXIS1  =                    8", "NAXIS2  =                    6", "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880)
    (tmp_path / "a.fits").write_bytes(header.encode() + RAMP.astype(">i2").tobytes().ljust(2880, b"\0"))
    refuse(tmp_path / "a.fits", "8 bits.*FITS, got 16")


def test_more_than_eight_bits_of_avif_are_said(tmp_path):
    samples = np.full((32, 32, 3), 600, np.uint16)
    (tmp_path / "a.avif").write_bytes(imagecodecs.avif_encode(samples, bitspersample=10))
    record = io.read_image(tmp_path / "a.avif")
    assert record.metadata.lost == ("10 bits",) and io.list_lost("a.png", record) == ["10 bits"]
