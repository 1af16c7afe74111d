"""What a file says beside its pixels: colour profile, EXIF, XMP, resolution, gamma; read and written again."""

from __future__ import annotations

import math
import re
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
from PIL import TiffTags
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from restore.images.samples import name_model

ORIENTATION, _EXIF_IFD, _GPS_IFD, _INTEROP = 0x0112, 0x8769, 0x8825, 0xA005
_SIZES = (0x0100, 0x0101, 0xA002, 0xA003)  # in pixels: of the first directory, and of EXIF's
# Tags of a TIFF file that tell of the photo and not of the file: description, camera, software, date, artist, host,
# rating, copyright, Windows's texts, EXIF and GPS.
_TELLING = {269, 270, 271, 272, 305, 306, 315, 316, 0x4746, 0x4749, 33432, *range(40091, 40096), _EXIF_IFD, _GPS_IFD}
_LAYOUTS = ('{"shape"', "ImageJ=", "<?xml")  # descriptions by which programs find the pixels of their own files
_COLOUR_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"cICP")
_JPEG_SEGMENT = 65000  # bytes; a segment ends at 65535
_SPACES = {True: b"GRAY", False: b"RGB "}  # of profiles, ICC.1:2022 7.2.8


@dataclass(frozen=True)
class Metadata:
    """What a file says beside its pixels, or None.

    icc: profile of grey or RGB. exif: block without orientation, thumbnail and pixel sizes. xmp: likewise. dpi: pixels
    per inch, horizontally and vertically. gamma: type and content of the chunks of a PNG file by which its values
    become colours. lost: what the file says and is not read, in words.
    """

    icc: bytes | None = field(default=None, repr=False)
    exif: bytes | None = field(default=None, repr=False)
    xmp: bytes | None = field(default=None, repr=False)
    dpi: tuple[float, float] | None = None
    gamma: tuple[tuple[bytes, bytes], ...] = ()
    lost: tuple[str, ...] = ()

    def list_for(self, image_format: str, grey: bool, holds: frozenset[str]) -> dict[str, Any]:
        """Return what a file can hold, of "colour profile", "EXIF", "XMP", "resolution" and "gamma".

        grey: whether its pixels are stored as grey. holds: what its format can hold.
        """
        found = {"colour profile": self.icc, "EXIF": self.exif, "XMP": self.xmp}
        found |= {"resolution": self.dpi, "gamma": self.gamma}
        if not fits(self.icc, grey):
            del found["colour profile"]
        if image_format == "JPEG":
            found = {k: v for k, v in found.items() if k not in ("EXIF", "XMP") or len(v or b"") < _JPEG_SEGMENT}
        return {name: value for name, value in found.items() if value and name in holds}

    def list_lost(self, written: dict[str, Any]) -> list[str]:
        """Return, in words, what a file with `written`, a result of `list_for`, does not say."""
        found = {"colour profile": self.icc, "EXIF": self.exif, "XMP": self.xmp, "resolution": self.dpi}
        # A display gamma of 2.2 is what other formats mean.
        found["gamma"] = [c for kind, c in self.gamma if kind == b"cICP" or (kind == b"gAMA" and not _is_usual(c))]
        return [name for name, value in found.items() if value and name not in written] + list(self.lost)


def read_metadata(image: PIL.Image.Image, exif: PIL.Image.Exif, path: Path, grey: bool) -> Metadata:
    """Return the metadata of an image that was opened from `path`. grey: whether it is read as grey."""
    if image.format == "PNG":
        image.load()  # text and XMP may stand behind the pixels, which are not read by Pillow if they have 16 bits
    icc, xmp, lost = image.info.get("icc_profile"), image.info.get("xmp"), []
    if icc is not None and not fits(icc, grey):
        lost.append(f"{icc[16:20].decode('ascii', 'replace').strip()} profile")
        icc = None
    if (model := name_model(image)) in ("CMYK", "LAB", "HSV", "YCbCr"):
        lost.append(f"{model} colours")
    if (bits := _find_depth(image, path)) > 8:
        lost.append(f"{bits} bits")
    if image.format == "MPO" and getattr(image, "n_frames", 1) > 1:
        lost.append("other pictures of the file")
    if "photoshop" in image.info or 33723 in getattr(image, "tag_v2", ()):
        lost.append("IPTC")
    if image.info.get("comment") or getattr(image, "text", {}).keys() - {"XML:com.adobe.xmp"}:
        lost.append("comment")
    xmp = xmp.encode() if isinstance(xmp, str) else xmp if isinstance(xmp, bytes) else None
    dpi, gamma = _read_dpi(image, exif), _read_colour_chunks(path) if image.format == "PNG" else ()
    block, broken = _clean_exif(exif, image.format)
    return Metadata(icc, block, _clean_xmp(xmp), dpi, gamma, (*lost, *broken))


def fits(icc: bytes | None, grey: bool) -> bool:
    """Return whether a colour profile is one of the pixels' colour space; True for None."""
    return icc is None or icc[16:20] == _SPACES[grey]


def list_png_chunks(parts: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    """Return the parts, a result of `Metadata.list_for`, as chunks of a PNG file before its pixels."""
    icc = parts.get("colour profile")
    chunks = [] if icc is None else [(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc))]
    chunks += parts.get("gamma", ())
    chunks += [(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + parts["XMP"])] if "XMP" in parts else []
    if "resolution" in parts:
        chunks.append((b"pHYs", struct.pack(">IIB", *(round(dpi / 0.0254) for dpi in parts["resolution"]), 1)))
    return chunks + ([(b"eXIf", parts["EXIF"].removeprefix(b"Exif\0\0"))] if "EXIF" in parts else [])


def list_tiff_tags(parts: dict[str, Any]) -> dict[int, Any]:
    """Return the parts, a result of `Metadata.list_for`, as tags of a TIFF file."""
    tags: dict[int, Any] = {}
    if "EXIF" in parts:
        exif = PIL.Image.Exif()
        exif.load(parts["EXIF"])
        tags = {tag: value for tag, value in _list_tags(exif).items() if tag in _TELLING}
        tags.get(_EXIF_IFD, {}).pop(_INTEROP, None)
    if "resolution" in parts:
        tags |= {282: parts["resolution"][0], 283: parts["resolution"][1], 296: 2}
    return tags | {tag: parts[name] for tag, name in ((700, "XMP"), (34675, "colour profile")) if name in parts}


def list_options(image_format: str, parts: dict[str, Any]) -> dict[str, Any]:
    """Return the parts, a result of `Metadata.list_for`, as arguments of Pillow's `save`."""
    names = {"icc_profile": "colour profile", "exif": "EXIF", "xmp": "XMP", "dpi": "resolution"}
    options = {key: parts[name] for key, name in names.items() if name in parts}
    if image_format == "PNG" and ("gamma" in parts or "xmp" in options):
        info = PngInfo()
        for kind, content in list_png_chunks({name: parts[name] for name in ("gamma", "XMP") if name in parts}):
            info.add(kind, content)
        options["pnginfo"] = info
        options.pop("xmp", None)
    if image_format == "JPEG" and "dpi" in options:
        options["dpi"] = tuple(min(max(round(dpi), 1), 65535) for dpi in options["dpi"])
    return options


class _Text(str):
    """Text of EXIF, which may be UTF-8: Pillow reads it as Latin-1 and would write ASCII; this writes its bytes."""

    def encode(self, *_: str) -> bytes:
        return super().encode("latin-1", "replace")


def _list_tags(exif: PIL.Image.Exif) -> dict[int, Any]:
    """The tags of an EXIF block; each of its directories, EXIF, GPS and, below EXIF, interoperability, is a mapping."""
    tags = {tag: exif[tag] for tag in exif if tag not in (_EXIF_IFD, _GPS_IFD)}
    tags |= {tag: dict(exif.get_ifd(tag)) for tag in (_EXIF_IFD, _GPS_IFD) if exif.get_ifd(tag)}
    if _INTEROP in tags.get(_EXIF_IFD, {}):
        tags[_EXIF_IFD][_INTEROP] = exif.get_ifd(_INTEROP)
    return _keep_text(tags)


def _keep_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {tag: _keep_text(item) for tag, item in value.items()}
    return _Text(value) if isinstance(value, str) else value


def _drop_unwritable(tags: dict[int, Any], group: int | None = None) -> list[str]:
    """Drop the tags that Pillow does not write again, such as a negative altitude, and return their names.

    group: the tag of their directory."""
    dropped = []
    for tag, value in list(tags.items()):
        if isinstance(value, dict):
            dropped += _drop_unwritable(value, tag)
            continue
        try:
            trial = ImageFileDirectory_v2(group=group)
            trial[tag] = value
            trial.tobytes()
        except Exception:  # whatever the value is
            del tags[tag]
            dropped.append(f"EXIF {TiffTags.lookup(tag, group).name}")
    return dropped


def _clean_exif(exif: PIL.Image.Exif, image_format: str | None) -> tuple[bytes | None, list[str]]:
    """The EXIF block without orientation, pixel sizes and, of a TIFF file, its layout, None if there is none; and what
    of the file's it does not hold, in words."""
    try:
        tags, dropped = _list_tags(exif), []
        tags.pop(ORIENTATION, None)
        if image_format == "TIFF":
            tags = {t: value for t, value in tags.items() if t in _TELLING and not str(value).startswith(_LAYOUTS)}
        for tag in _SIZES:
            tags.pop(tag, None)
            tags.get(_EXIF_IFD, {}).pop(tag, None)
        block = PIL.Image.Exif()
        block.endian = exif.endian  # a camera's own notes may have it too
        block.update(tags)
        try:
            block.tobytes()
        except Exception:  # cameras write broken EXIF
            dropped = _drop_unwritable(tags)
            block.clear()
            block.update(tags)
        return (block.tobytes() if tags else None), dropped
    except Exception:  # the photo matters more
        return None, ["EXIF"]


def _clean_xmp(xmp: bytes | None) -> bytes | None:
    """XMP of a picture that is upright and may have another size."""
    if xmp is None:
        return None
    xmp = re.sub(rb'(tiff:Orientation(?:\s*=\s*["\']|>))[2-8]', rb"\g<1>1", xmp)
    names = rb"(?:exif:Pixel[XY]Dimension|tiff:Image(?:Width|Length))"
    return re.sub(rb"\s" + names + rb'\s*=\s*["\']\d+["\']|<' + names + rb">\d+</" + names + rb">", b"", xmp)


def _read_dpi(image: PIL.Image.Image, exif: PIL.Image.Exif) -> tuple[float, float] | None:
    """Pixels per inch, without the values that Pillow gives to files that say none."""
    if image.format == "TIFF" and 282 not in image.tag_v2:
        return None
    if image.format in ("JPEG", "MPO") and image.info.get("jfif_unit") not in (1, 2) and 282 not in exif:
        return None
    try:
        dpi = tuple(float(value) for value in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return dpi if len(dpi) == 2 and all(math.isfinite(value) and 0 < value < 1e6 for value in dpi) else None


def _read_colour_chunks(path: Path) -> tuple[tuple[bytes, bytes], ...]:
    """The chunks of a PNG file that say what its values mean, which stand before its pixels."""
    found = []
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            length = int.from_bytes(head[:4], "big")
            if head[4:] in _COLOUR_CHUNKS:
                found.append((head[4:], file.read(length)))
            file.seek(4 + (0 if head[4:] in _COLOUR_CHUNKS else length), 1)
    return tuple(found)


def _find_depth(image: PIL.Image.Image, path: Path) -> int:
    """Bits per sample of an AVIF or HEIF file, by its pixi box (ISO 23008-12, 6.5.6): Pillow reads 8 of them."""
    if image.format not in ("AVIF", "HEIF"):
        return 8
    with path.open("rb") as file:
        head = file.read(1 << 16)
    at = head.find(b"pixi")
    return head[at + 9] if 0 <= at < len(head) - 9 else 8


def _is_usual(gamma: bytes) -> bool:
    return len(gamma) == 4 and 43000 < int.from_bytes(gamma, "big") < 48000
