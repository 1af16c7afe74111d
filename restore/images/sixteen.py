"""Sixteen-bit samples of PNG, TIFF and PPM files, which Pillow reduces to 8 bits when they have colour or alpha."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tifffile
from PIL import TiffImagePlugin


def read_samples(path: Path, image: PIL.Image.Image) -> np.ndarray:
    """Return uint16 samples (H, W, C) as stored: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.

    image: the same file, opened by Pillow: PNG, whose transparent colour becomes alpha, or grey of another format.
    """
    import imagecodecs  # a library of its own that most photos need not

    samples = imagecodecs.png_decode(path.read_bytes()) if image.format == "PNG" else np.asarray(image, np.uint16)
    return np.atleast_3d(samples)


def read_tiff(path: Path, alpha: bool) -> np.ndarray:
    """Return uint16 samples of a grey or RGB TIFF file as `read_samples` does, before its orientation, white at 65535.

    alpha: whether the first extra sample is alpha.
    """
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        grey = page.photometric in (0, 1)  # 0: white is zero
        samples = np.atleast_3d(page.asarray())
        if page.axes.startswith("S"):  # one plane per channel
            samples = np.moveaxis(samples, 0, -1)
    samples = samples[..., : (1 if grey else 3) + alpha]
    if page.photometric == 0:
        samples[..., 0] = 65535 - samples[..., 0]
    return samples


def read_pnm(path: Path, image: PIL.Image.Image) -> np.ndarray:
    """Return uint16 samples of a binary PGM or PPM file, scaled from its maximum to 65535.

    image: the same file, opened by Pillow, which cuts colours to 8 bits.
    """
    _, _, offset, given = image.tile[0]
    channels = 3 if image.mode == "RGB" else 1
    count, maximum = image.width * image.height * channels, find_maximum(image)
    samples = np.fromfile(path, ">u2", count, offset=offset).astype(np.uint32)
    if samples.size < count:
        raise ValueError("image file is truncated")
    samples = (samples.clip(max=maximum) * 65535 + maximum // 2) // maximum
    return samples.astype(np.uint16).reshape(image.height, image.width, channels)


def find_maximum(image: PIL.Image.Image) -> int:
    """Return the maximum that the header of an opened PBM, PGM or PPM file declares."""
    given = image.tile[0][3]
    return given[1] if isinstance(given, tuple) else 65535 if given == "I;16B" else 255


def encode_png(samples: np.ndarray, chunks: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """Return a PNG file of uint16 samples (H, W, C) as in `read_samples`. chunks: more of them, by type."""
    import imagecodecs

    samples = np.ascontiguousarray(samples)
    data = imagecodecs.png_encode(samples[:, :, 0] if samples.shape[2] == 1 else samples, level=6)
    parts = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    return data[:33] + b"".join(parts) + data[33:]  # after the signature and the header chunk


def encode_tiff(samples: np.ndarray, tags: Mapping[int, Any]) -> bytes:
    """Return a Deflate-compressed TIFF file of uint8 or uint16 samples (H, W, C): 1 grey, 3 RGB, 4 RGBA.

    tags: more of them; a mapping is a directory of its own, as EXIF is, which neither tifffile nor libtiff writes.
    """
    (height, width, channels), buffer = samples.shape, io.BytesIO()
    content = zlib.compress(np.ascontiguousarray(samples, samples.dtype.newbyteorder("<")), 6)
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    directory.update({256: width, 257: height, 258: (8 * samples.itemsize,) * channels, 259: 8})
    directory.update({262: 1 if channels == 1 else 2, 273: 0, 277: channels, 278: height, 279: len(content), 284: 1})
    directory.update(({338: (2,)} if channels == 4 else {}) | dict(tags))
    directory.save(buffer)
    return buffer.getvalue() + content


def encode_pnm(samples: np.ndarray) -> bytes:
    """Return a binary PGM or PPM file of uint16 samples (H, W, 1 or 3)."""
    height, width, channels = samples.shape
    return f"P{5 if channels == 1 else 6}\n{width} {height}\n65535\n".encode() + samples.astype(">u2").tobytes()
