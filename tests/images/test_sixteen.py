"""Sixteen-bit PNG and TIFF files keep every level; what cannot be kept is refused by name."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import tifffile
import torch

from operators import RestoreError
from restore.images import io, samples, sixteen


def photo(height=13, width=17, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 65536, (height, width, channels)).astype(np.uint16)


def read_samples(path):
    with PIL.Image.open(path) as image:
        return samples.read_samples(image, path)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_png_is_read_and_written_exactly(tmp_path, channels):
    array = photo(channels=channels)
    (tmp_path / "a.png").write_bytes(sixteen.encode_png(array))
    assert np.array_equal(read_samples(tmp_path / "a.png"), array)
    record = io.read_image(tmp_path / "a.png")
    assert record.bits == 16 and record.grey == (channels < 3) and (record.alpha is not None) == (channels in (2, 4))
    io.write_image(tmp_path / "b.png", record.pixels, record)
    assert np.array_equal(read_samples(tmp_path / "b.png"), array)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bit_tiff_is_read_and_written_exactly(tmp_path, channels):
    array = photo(channels=channels)
    squeezed = array[:, :, 0] if channels == 1 else array
    options = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    for byteorder in "<>":
        tifffile.imwrite(
            tmp_path / "a.tif",
            squeezed,
            byteorder=byteorder,
            photometric="minisblack" if channels == 1 else "rgb",
            **options,
        )
        record = io.read_image(tmp_path / "a.tif")
        assert record.bits == 16
        io.write_image(tmp_path / "b.tif", record.pixels, record)
        assert np.array_equal(tifffile.imread(tmp_path / "b.tif"), squeezed)  # an independent reader
        again = io.read_image(tmp_path / "b.tif")  # Deflate-compressed now: Pillow takes its other decoder
        assert torch.equal(again.pixels, record.pixels) and (again.alpha is None) == (channels != 4)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits"])
@pytest.mark.parametrize("layout", [{}, {"planarconfig": "separate"}, {"tile": (16, 16)}, {"predictor": True}])
def test_every_layout_of_tiff_is_read(tmp_path, compression, layout):
    array = photo(40, 35)
    pixels = np.moveaxis(array, -1, 0) if "planarconfig" in layout else array
    if compression is not None or "predictor" not in layout:
        tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", compression=compression, **layout)
        assert np.array_equal(read_samples(tmp_path / "a.tif"), array)


def test_white_is_zero_orientation_and_extra_samples_of_tiff(tmp_path):
    grey = photo(channels=1)[..., 0]
    tifffile.imwrite(tmp_path / "a.tif", grey, photometric="miniswhite")
    assert np.array_equal(read_samples(tmp_path / "a.tif")[..., 0], 65535 - grey)
    tifffile.imwrite(tmp_path / "b.tif", photo(), photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    tifffile.imwrite(tmp_path / "c.tif", np.rot90(photo(), -1).copy(), photometric="rgb")
    assert torch.equal(io.read_image(tmp_path / "b.tif").pixels, io.read_image(tmp_path / "c.tif").pixels)
    tifffile.imwrite(tmp_path / "d.tif", photo(channels=4), photometric="rgb", extrasamples=["unspecified"])
    assert np.array_equal(read_samples(tmp_path / "d.tif"), photo(channels=4)[..., :3])


@pytest.mark.parametrize(
    ("array", "options", "fact"),
    [
        (photo(channels=4), {"photometric": "separated"}, "CMYK"),
        (photo(channels=4), {"photometric": "rgb", "extrasamples": ["assocalpha"]}, "premultiplied"),
        (photo(channels=1)[..., 0].astype(np.int16), {"photometric": "minisblack"}, "signed 16-bit"),
    ],
)
def test_other_tiff_files_are_refused(tmp_path, array, options, fact):
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    with pytest.raises(RestoreError, match=f"a.tif.*{fact}") as caught:
        io.read_image(tmp_path / "a.tif")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_the_transparent_colour_of_a_png_becomes_alpha(tmp_path, channels):
    array = photo(channels=channels)
    chunk = b"tRNS" + array[0, 0].astype(">u2").tobytes()
    data = sixteen.encode_png(array)
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])
    record = io.read_image(tmp_path / "a.png")
    assert record.bits == 16 and record.alpha[0, 0, 0, 0] == 0 and record.alpha.sum() == 13 * 17 - 1


@pytest.mark.parametrize(
    "bits, samples, absent, expected", [(2, 0b00011011, 1, [255, 0, 255, 255]), (4, 0x3F, 3, [0, 255])]
)
def test_the_transparent_grey_of_a_png_of_few_bits_becomes_alpha(tmp_path, bits, samples, absent, expected):
    header = struct.pack(">IIBBBBB", len(expected), 1, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(">H", absent))]
    chunks += [(b"IDAT", zlib.compress(bytes([0, samples]))), (b"IEND", b"")]
    parts = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert (io.read_image(tmp_path / "a.png").alpha[0, 0, 0] * 255).tolist() == expected
