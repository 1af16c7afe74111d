"""Sixteen-bit samples of PNG and TIFF files, which Pillow reduces to 8 bits when they have colour or alpha."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import PIL.Image
import tifffile

from operators import RestoreError


def is_sixteen_bit(image: PIL.Image.Image) -> bool:
    """Return whether a file that was opened, but not loaded, stores 16 bits per sample."""
    if image.format == "TIFF":
        return set(image.tag_v2.get(258, (1,))) == {16}  # BitsPerSample
    return image.mode.startswith("I;16") or (image.format == "PNG" and ";16" in image.tile[0][3])


def read_samples(path: Path, image: PIL.Image.Image) -> np.ndarray:
    """Return uint16 samples (H, W, C) as stored, before the orientation: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.

    image: the same file, opened by Pillow. Raises RestoreError for a TIFF file with signed or floating-point samples,
    another colour model than grey and RGB, or premultiplied alpha.
    """
    if image.format == "TIFF":
        return _read_tiff(path)
    samples = imagecodecs.png_decode(path.read_bytes()) if image.format == "PNG" else np.asarray(image, np.uint16)
    return np.atleast_3d(samples)


def encode_png(samples: np.ndarray, icc: bytes | None = None, exif: bytes | None = None) -> bytes:
    """Return a PNG file of uint16 samples (H, W, C) as in `read_samples`, with a colour profile and EXIF block."""
    samples = np.ascontiguousarray(samples)
    data = imagecodecs.png_encode(samples[:, :, 0] if samples.shape[2] == 1 else samples, level=6)
    chunks = [b"iCCPICC Profile\0\0" + zlib.compress(icc)] if icc else []
    chunks += [b"eXIf" + exif.removeprefix(b"Exif\0\0")] if exif else []
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return data[:33] + b"".join(parts) + data[33:]  # after the signature and the header chunk


def encode_tiff(samples: np.ndarray, icc: bytes | None = None) -> bytes:
    """Return a Deflate-compressed TIFF file of uint16 samples (H, W, C): 1 grey, 3 RGB, 4 RGBA."""
    channels, buffer = samples.shape[2], io.BytesIO()
    options = {"photometric": "minisblack"} if channels == 1 else {"photometric": "rgb", "planarconfig": "contig"}
    options |= {"compression": "zlib", "compressionargs": {"level": 6}, "metadata": None, "software": False}
    options |= {"extrasamples": ["unassalpha"] if channels == 4 else None, "iccprofile": icc}
    tifffile.imwrite(buffer, samples[:, :, 0] if channels == 1 else samples, **options)
    return buffer.getvalue()


def _read_tiff(path: Path) -> np.ndarray:
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        grey, alpha = page.photometric in (0, 1), page.extrasamples[:1]  # 0: white is zero
        if page.dtype != np.uint16 or not (grey or page.photometric == 2) or alpha == (1,):
            model = f"{page.photometric.name} of {page.dtype}" + (" with premultiplied alpha" if alpha == (1,) else "")
            raise RestoreError(f"{path} must hold unsigned 16-bit grey or RGB samples, got {model}; convert it to RGB")
        samples = np.atleast_3d(page.asarray())
        if page.axes.startswith("S"):  # one plane per channel
            samples = np.moveaxis(samples, 0, -1)
    samples = samples[..., : (1 if grey else 3) + (alpha == (2,))]
    if page.photometric == 0:
        samples[..., 0] = 65535 - samples[..., 0]
    return samples
