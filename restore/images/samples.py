"""What the numbers of a file mean: colour model, polarity, sign, depth and alpha, decided once for all formats."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tifffile

from operators import RestoreError
from restore.images import sixteen
from restore.images.formats import is_raw

# TIFF 6.0: tags, and the names of their values
_BITS, _COMPRESSION, _MODEL, _EXTRA, _KIND = 258, 259, 262, 338, 339
_MODELS = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "Lab", 9: "Lab", 10: "Lab"}
_KINDS = {2: "signed", 3: "floating-point"}
_MODES = {"L": "grey", "LA": "grey", "RGB": "RGB", "RGBA": "RGB", "I;16": "grey", "I;16B": "grey"}


def measure_depth(image: PIL.Image.Image, name: str | Path) -> int:
    """Return the bits per sample, 8 (also for fewer) or 16, with which a file that is opened, not loaded, is read.

    Raises RestoreError for what would be read as other values than its own: other depths, signed and floating-point
    samples, colour models of 16 bits other than grey and RGB, and cameras' raw files.
    """
    check = {"TIFF": _measure_tiff, "PPM": _measure_ppm, "JPEG2000": _measure_jpeg2000}.get(image.format)
    if check is not None:
        return check(image, name)
    deep = image.mode.startswith("I;16") or any(re.search(r";16[BLNS]", str(tile[3])) for tile in image.tile)
    if image.format == "SGI":
        image.fp.seek(3)
        deep = image.fp.read(1) == b"\2"  # bytes per sample
    if deep and image.format != "PNG":
        raise RestoreError(f"{name} must have 8 bits per channel as {image.format}, got 16; convert it to PNG or TIFF")
    return 16 if deep else _require_integers(image.mode, name)


def read_samples(image: PIL.Image.Image, path: Path) -> np.ndarray:
    """Return uint8 or uint16 (H, W, C) of an opened file: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA, white at the top.

    Raises RestoreError as `measure_depth` does.
    """
    if measure_depth(image, path) == 16:
        if image.format == "TIFF":
            return sixteen.read_tiff(path, has_alpha(image))
        return sixteen.read_pnm(path, image) if image.format == "PPM" else sixteen.read_samples(path, image)
    if image.format == "TIFF":
        image.filename = ""  # or Pillow maps pixels that are to be turned into memory with exchanged width and height
    if image.format == "PNG" and image.tile and image.tile[0][3] in ("L;2", "L;4"):
        scale_transparent_grey(image, bits=int(image.tile[0][3][2:]))
    image.load()
    return convert_samples(image, path)


def convert_samples(image: PIL.Image.Image, name: str | Path) -> np.ndarray:
    """Return uint8 (H, W, C) of a loaded image, as `read_samples` does; a transparent palette entry or colour becomes
    alpha. Raises RestoreError for 32-bit numbers and modes without a conversion to RGB."""
    _require_integers(image.mode, name)
    alpha = has_alpha(image)
    grey = image.mode in ("1", "L", "LA", "La")
    mode = ("LA" if alpha else "L") if grey else ("RGBA" if alpha else "RGB")
    try:
        if grey and alpha and image.mode not in ("LA", "La"):
            image = image.convert("RGBA")  # Pillow turns a transparent grey value into alpha only this way
        return np.atleast_3d(np.asarray(image.convert(mode)))
    except ValueError as error:
        raise RestoreError(f"{name} must have a mode that Pillow converts to RGB, got {image.mode} ({error})") from None


def scale_transparent_grey(image: PIL.Image.Image, bits: int) -> None:
    """Bring the transparent grey value of a PNG file of 2 or 4 bits to 8 bits, as Pillow does with its pixels only."""
    if isinstance(absent := image.info.get("transparency"), int):
        image.info["transparency"] = absent * 255 // (2**bits - 1)


def has_alpha(image: PIL.Image.Image) -> bool:
    """Return whether an image has transparency, by its header."""
    return image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info


def name_model(image: PIL.Image.Image) -> str:
    """Return the colour model of a file: "grey", "RGB", "CMYK", ..."""
    return _MODES.get(image.mode, image.mode)


def describe_tiff(path: Path) -> str | None:
    """Return the samples of a TIFF file that Pillow does not open, in words; None if it is no TIFF file."""
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            model = _MODELS.get(int(page.photometric), str(page.photometric))
            return f"{page.samplesperpixel} x {page.bitspersample} bits ({page.dtype}) of {model}"
    except Exception:  # damaged files raise anything
        return None


def _require_integers(mode: str, name: str | Path) -> int:
    if mode in ("I", "F") or mode.startswith("I;"):
        raise RestoreError(f"{name} must have 8 or 16 bits per channel, got 32-bit numbers; convert it")
    return 8


def _measure_tiff(image: Any, name: str | Path) -> int:
    tags = image.tag_v2
    if is_raw(image):
        raise RestoreError(f"{name} must be a picture, got a camera's raw file; develop it first")
    bits, kinds, extra = set(tags.get(_BITS, (1,))), set(tags.get(_KIND, (1,))), tags.get(_EXTRA, ())
    model = _MODELS.get(tags.get(_MODEL), f"colour model {tags.get(_MODEL)}")
    for kind in kinds - {1, 4}:  # 4: undefined, which TIFF 6.0 treats as 1
        depth = "/".join(map(str, sorted(bits)))
        given = f"{_KINDS.get(kind, 'complex')} {depth}-bit numbers"
        raise RestoreError(f"{name} must have unsigned samples of 8 or 16 bits, got {given}; convert it")
    if model == "YCbCr" and tags.get(_COMPRESSION, 1) == 1:
        raise RestoreError(f"{name} must be compressed if it is a YCbCr TIFF file, got raw samples; convert it to RGB")
    if bits <= {1, 2, 4, 8} and len(bits) == 1:
        return _require_integers(image.mode, name)
    if bits != {16}:
        depth = "/".join(map(str, sorted(bits)))
        raise RestoreError(f"{name} must have 8 or 16 bits per channel, got {depth}; convert it")
    if model not in ("grey", "RGB") or extra[:1] == (1,):
        given = model + " with premultiplied alpha" * (extra[:1] == (1,))
        raise RestoreError(f"{name} must be grey or RGB with 16 bits per channel, got {given}; convert it to RGB")
    return 16


def _measure_ppm(image: Any, name: str | Path) -> int:
    decoder, _, _, given = image.tile[0]
    deep = sixteen.find_maximum(image) > 255
    if deep and decoder == "ppm_plain":
        raise RestoreError(f"{name} must be binary if it has more than 8 bits per channel, got text; convert it")
    return 16 if deep else _require_integers(image.mode, name)


def _measure_jpeg2000(image: Any, name: str | Path) -> int:
    """Pillow gives colours of any depth as 8 bits and does not fill the range for depths in between."""
    image.fp.seek(0)
    content = image.fp.read(1 << 20)
    size = content.find(b"\xff\x4f\xff\x51")  # the start of the code stream and its SIZ segment, ISO 15444-1 A.5.1
    count = int.from_bytes(content[size + 40 : size + 42], "big")
    parts = content[size + 42 : size + 42 + 3 * count : 3]
    bits, signed = {(part & 0x7F) + 1 for part in parts}, any(part & 0x80 for part in parts)
    if size < 0 or not parts or signed or not (bits == {8} or (bits == {16} and image.mode == "I;16")):
        given = f"{'signed ' * signed}{'/'.join(map(str, sorted(bits)))} bits of {name_model(image)}"
        raise RestoreError(f"{name} must have 8 bits per channel as JPEG 2000, or 16 of grey, got {given}; convert it")
    return max(bits)
