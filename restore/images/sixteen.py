"""Sixteen-bit PNG and TIFF files, which Pillow opens as 8 bits when they have colour or alpha."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image

_PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # PNG colour type -> samples per pixel
_PNG_COLOUR = {1: 0, 2: 4, 3: 2, 4: 6}


def is_sixteen_bit(image: PIL.Image.Image) -> bool:
    """Whether the just opened, not yet loaded file stores 16 bits a sample."""
    if image.mode.startswith("I;16"):
        return True
    if image.format == "TIFF":
        return set(image.tag_v2.get(258, (1,))) == {16}  # BitsPerSample
    return image.format == "PNG" and _png_header(image)[0] == 16


def read(path: str | Path) -> tuple[np.ndarray, PIL.Image.Image]:
    """The samples, uint16 (H, W, C) with C = 1 to 4, and Pillow's loaded 8-bit view (for its metadata).

    Pillow keeps one byte of each sample of a colour file, chosen by the byte order named in the raw
    mode. Decoding twice, the second time with the order swapped, yields both bytes exactly.
    """
    image = PIL.Image.open(path)
    if image.mode.startswith("I"):  # grey: Pillow keeps all 16 bits ("I;16", "I;16B"; "I" before version 11)
        image.load()
        return np.asarray(image).astype(np.uint16)[:, :, None], image
    if image.format == "PNG" and _png_header(image)[1] == 4:  # grey + alpha: four bytes a pixel, read as they are
        samples = np.asarray(_decode(path, "RGBA")).astype(np.uint16)
        image.load()
        return np.stack([samples[..., 0] << 8 | samples[..., 1], samples[..., 2] << 8 | samples[..., 3]], -1), image
    raw = _raw_mode(image)
    swapped = raw[:-1] + ("L" if raw.endswith("B") or (raw.endswith("N") and _native_big()) else "B")
    high, low = _decode(path, raw), _decode(path, swapped)
    return np.asarray(high).astype(np.uint16) << 8 | np.asarray(low), high


def png_bytes(samples: np.ndarray, icc: bytes | None = None, exif: bytes | None = None) -> bytes:
    """A PNG file of uint16 samples (H, W, C), C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA (PNG 1.2, ch. 4 and 6)."""
    height, width, channels = samples.shape
    rows = np.ascontiguousarray(samples, ">u2").view(np.uint8).reshape(height, -1)
    filtered = rows.copy()
    filtered[1:] -= rows[:-1]  # filter type 2, "Up", modulo 256: photographs compress better than unfiltered
    kinds = np.full((height, 1), 2, np.uint8)
    data = zlib.compress(np.concatenate([kinds, filtered], 1).tobytes(), 6)
    header = struct.pack(">IIBBBBB", width, height, 16, _PNG_COLOUR[channels], 0, 0, 0)
    chunks = [(b"IHDR", header)]
    if icc:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc)))
    if exif:
        chunks.append((b"eXIf", exif.removeprefix(b"Exif\0\0")))
    chunks += [(b"IDAT", data), (b"IEND", b"")]
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, body in chunks:
        parts.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join(parts)


def tiff_bytes(samples: np.ndarray, icc: bytes | None = None) -> bytes:
    """A little-endian, Deflate-compressed TIFF file of uint16 samples (H, W, C), channels as in `png_bytes`."""
    height, width, channels = samples.shape
    data = zlib.compress(samples.astype("<u2").tobytes(), 6)
    data += b"\0" * (len(data) % 2)
    extra = channels in (2, 4)
    tags: list[tuple[int, int, tuple[int, ...] | bytes]] = [
        (256, 4, (width,)),
        (257, 4, (height,)),
        (258, 3, (16,) * channels),  # BitsPerSample
        (259, 3, (8,)),  # Compression: Deflate
        (262, 3, (2 if channels >= 3 else 1,)),  # PhotometricInterpretation: RGB or black is zero
        (273, 4, (8,)),  # StripOffsets: one strip, right after the file header
        (277, 3, (channels,)),
        (278, 4, (height,)),
        (279, 4, (len(data),)),
        (284, 3, (1,)),  # PlanarConfiguration: interleaved
    ]
    if extra:
        tags.append((338, 3, (2,)))  # ExtraSamples: unassociated alpha
    if icc:
        tags.append((34675, 7, icc))
    start = 8 + len(data)
    overflow_at = start + 2 + 12 * len(tags) + 4
    directory, overflow = struct.pack("<H", len(tags)), b""
    for tag, kind, values in tags:
        count = len(values)
        body = values if isinstance(values, bytes) else struct.pack(f"<{count}{'H' if kind == 3 else 'I'}", *values)
        if len(body) > 4:
            field = struct.pack("<I", overflow_at + len(overflow))
            overflow += body + b"\0" * (len(body) % 2)
        else:
            field = body.ljust(4, b"\0")
        directory += struct.pack("<HHI", tag, kind, count) + field
    return struct.pack("<2sHI", b"II", 42, start) + data + directory + struct.pack("<I", 0) + overflow


def _png_header(image: PIL.Image.Image) -> tuple[int, int]:
    """Bit depth and colour type of a PNG: bytes 24 and 25 of the file."""
    position = image.fp.tell()
    image.fp.seek(24)
    depth, colour = image.fp.read(2)
    image.fp.seek(position)
    return depth, colour


def _raw_mode(image: PIL.Image.Image) -> str:
    arguments = image.tile[0][3]
    raw = arguments if isinstance(arguments, str) else arguments[0]
    if ";16" not in raw or raw.startswith("RGBa"):  # RGBa: premultiplied, undone byte by byte: not separable
        raise ValueError(f"16-bit samples stored as {raw!r} are not supported")
    return raw


def _decode(path: str | Path, raw_mode: str) -> PIL.Image.Image:
    image = PIL.Image.open(path)
    image.tile = [_with_raw_mode(tile, raw_mode) for tile in image.tile]
    image.load()
    return image


def _with_raw_mode(tile: tuple, raw_mode: str) -> tuple:
    arguments = raw_mode if isinstance(tile[3], str) else (raw_mode, *tile[3][1:])
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def _native_big() -> bool:
    return struct.pack("=H", 1) == b"\0\1"
