"""File formats: which are read, which are written, by which suffixes, and what each written one can hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

try:  # HEIC files of phones
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:
    pillow_heif = None

PROPERTIES = ("grey", "alpha", "16 bits", "colour profile", "EXIF", "XMP", "resolution", "gamma")


@dataclass(frozen=True)
class Format:
    """A format that is written: the suffixes of its files, which of PROPERTIES they hold, and how many pixels a side
    has at most, None for more than anybody computes."""

    suffixes: tuple[str, ...]
    holds: frozenset[str]
    longest: int | None = None


def _holding(suffixes: str, *properties: str, longest: int | None = None) -> Format:
    return Format(tuple(suffixes.split()), frozenset(properties), longest)


# Without .pbm and .pfm, which hold other numbers. WebP stores grey as three equal channels; a BMP file has room for
# alpha, which hardly any program reads.
FORMATS = {
    "PNG": _holding(".png .apng", *PROPERTIES),
    "JPEG": _holding(".jpg .jpeg .jpe .jfif", "grey", "colour profile", "EXIF", "XMP", "resolution", longest=65500),
    "TIFF": _holding(".tif .tiff", *(name for name in PROPERTIES if name != "gamma")),
    "WEBP": _holding(".webp", "alpha", "colour profile", "EXIF", "XMP", longest=16383),
    "BMP": _holding(".bmp", "grey", "resolution"),
    "PPM": _holding(".ppm .pgm .pnm", "grey", "16 bits"),
}
# Drawings that a program outside of this one would have to render, and files that Pillow recognises but cannot read.
_NOT_READ = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"}
PIL.Image.init()
READ_FORMATS = tuple(name for name in PIL.Image.ID if name not in _NOT_READ)
# Recognised by their first bytes: the others would take any file for theirs.
_RECOGNISED = tuple(name for name in READ_FORMATS if PIL.Image.OPEN[name][1] is not None)
_OTHERS = (".heic", ".heif", ".jxl", ".svg", ".dng")  # without a plugin, Pillow does not know them


def _list_suffixes(formats: Iterable[str]) -> tuple[str, ...]:
    registered = sorted(PIL.Image.registered_extensions().items())
    return tuple(suffix for suffix, name in registered if name in formats)


WRITABLE_SUFFIXES = tuple(suffix for each in FORMATS.values() for suffix in each.suffixes)
# HEIC without its plugin fails by name instead of being passed over.
READABLE_SUFFIXES = tuple(dict.fromkeys((*WRITABLE_SUFFIXES, *_list_suffixes((*READ_FORMATS, "MPO")), *_OTHERS[:2])))
PICTURE_SUFFIXES = tuple(dict.fromkeys((*READABLE_SUFFIXES, *_list_suffixes(PIL.Image.SAVE), *_OTHERS)))


def find_format(path: Path) -> str | None:
    """Return the format that is written to a file of this name, by its suffix; None if none is."""
    suffix = path.suffix.lower()
    return next((name for name, form in FORMATS.items() if suffix in form.suffixes), None)


def recognise(path: Path) -> str | None:
    """Return Pillow's name of a file's format by its content; None if it is not a picture that can be read."""
    try:
        with PIL.Image.open(path, formats=_RECOGNISED) as image:
            return None if image.format == "TIFF" and is_raw(image) else image.format
    except Exception:  # plugins raise anything for other files
        return None


def is_raw(image: PIL.Image.Image) -> bool:
    """Return whether an opened TIFF file is a camera's raw file, whose first page is a thumbnail or undeveloped."""
    tags = image.tag_v2
    # NewSubfileType: a reduced version; PhotometricInterpretation: a colour filter array; DNGVersion; Canon's mark
    undeveloped = tags.get(262) in (32803, 34892) or 50706 in tags
    image.fp.seek(8)
    return bool(tags.get(254, 0) & 1) or undeveloped or image.fp.read(2) == b"CR"


def choose_suffix(source: Path) -> str:
    """Return the suffix of a result of `source`: its own if it can be written, else its format's, else ".png"."""
    if source.suffix.lower() in WRITABLE_SUFFIXES:
        return source.suffix
    name = recognise(source)
    return FORMATS["JPEG" if name == "MPO" else name].suffixes[0] if name in (*FORMATS, "MPO") else ".png"


def format_table() -> str:
    """Return FORMATS as a table in Markdown."""
    lines = ["| | " + " | ".join(PROPERTIES) + " |", "|---" * (len(PROPERTIES) + 1) + "|"]
    for form in FORMATS.values():
        marks = ("yes" if name in form.holds else "–" for name in PROPERTIES)
        lines.append(f"| {' '.join(f'`{suffix}`' for suffix in form.suffixes)} | {' | '.join(marks)} |")
    return "\n".join(lines)
