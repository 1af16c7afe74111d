"""Folders of images: the files they hold, their ids, pixels and sizes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from operators import RestoreError
from restore import disk
from restore.images import io
from restore.images.formats import READABLE_SUFFIXES, recognise
from restore.images.metadata import ORIENTATION

# Files that may lie beside images; any other file in an image folder is reported.
SIDECAR_SUFFIXES = (".json", ".jsonl", ".csv", ".txt", ".md", ".yaml", ".yml", ".log", ".html")
SIDECAR_BYTES = 1 << 22  # larger JSON files are annotations of a data set


def is_image(path: Path) -> bool:
    """Return whether a file is an image, by its suffix or else its content; files that may lie beside are not."""
    suffix = path.suffix.lower()
    return suffix in READABLE_SUFFIXES or (suffix not in SIDECAR_SUFFIXES and recognise(path) is not None)


def filter_images(paths: Iterable[Path]) -> list[Path]:
    """Return the image files among `paths`, see `is_image`, sorted and without hidden files."""
    return sorted(path for path in paths if path.name[0] != "." and os.path.isfile(path) and is_image(path))


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """Return the content of a side-car of this program, the JSON file beside a result; None if it is none."""
    try:
        is_small = path.stat().st_size < SIDECAR_BYTES
    except OSError:
        return None
    content = disk.read_json(path) if is_small else None
    return content if isinstance(content, dict) and isinstance(content.get("files"), list) else None


def check_owned(paths: Iterable[Path], sidecar: Path, main: Path, overwrite: bool = False) -> None:
    """Raise RestoreError if one of `paths` exists and is not a file of this program.

    sidecar: the JSON file that lists the program's files beside it. main: the file that it must name, or it is the
    side-car of another result. overwrite: replace any file.
    """
    ours = () if overwrite else set((read_sidecar(sidecar) or {}).get("files", ()))
    for path in paths:
        if not overwrite and path.exists() and (path.name not in ours or main.name not in ours):
            raise RestoreError(
                f"{path} exists and {sidecar.name} does not name it as a result of this program; "
                "give overwrite=True to replace it, or choose another output folder"
            )


def drop_companions(paths: Sequence[Path]) -> list[Path]:
    """Return the images that are results or of other origin: without those that a side-car names after its result
    (degraded, mean, spread, other samples), results of an interrupted run, and a benchmark's samples and spreads."""
    companions: set[Path] = set()
    for folder in dict.fromkeys(path.parent for path in paths):
        for sidecar in folder.glob("*.json"):
            if content := read_sidecar(sidecar):
                is_finished = content.get("finished", True)
                companions |= {folder / str(name) for name in content["files"][1 if is_finished else 0 :]}
        if folder.name in ("samples", "spread") and (folder.parent / "rows").is_dir():
            companions |= {path for path in paths if path.parent == folder}
    return [path for path in paths if path not in companions]


def list_images(folder: str | os.PathLike) -> tuple[dict[str, Path], list[str]]:
    """Return all images below `folder` by id, sorted, without the companions of results (see `drop_companions`), and
    the names of other files. The id is the relative path without suffix; of a benchmark's result, that of its image.
    Raises RestoreError if the folder is missing or has no image, if two files share an id, or if a name is no UTF-8."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RestoreError(f"{folder} is not a folder; give the folder that holds the images")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if not any(part[0] == "." for part in path.relative_to(folder).parts)]
    found: dict[str, Path] = {}
    images = set(filter_images(files))
    for path in drop_companions(sorted(images)):
        name = path.with_suffix("").name
        row = disk.read_json(path.parent / "rows" / f"{name}.json")  # of a benchmark's result
        name = str(row["image"]) if isinstance(row, Mapping) and "sha256" in row and "image" in row else name
        key = (path.relative_to(folder).parent / name).as_posix()
        try:
            key.encode()
        except UnicodeEncodeError:
            name = os.fsencode(path).decode("utf-8", "backslashreplace")
            raise RestoreError(f"{name} must have a name of UTF-8 to be listed among others; rename it") from None
        if key in found:
            raise RestoreError(f"{found[key].name} and {path.name} in {path.parent} share the id {key}; remove one")
        found[key] = path
    if not found:
        raise RestoreError(f"{folder} has no image; give a folder with images")
    others = [path for path in files if path not in images and path.suffix.lower() not in SIDECAR_SUFFIXES]
    return found, [path.relative_to(folder).as_posix() for path in others]


def to_file_name(image_id: str) -> str:
    """Return an id as a file name without suffix: "/" becomes "__", so that a results folder has no sub-folders."""
    return image_id.replace("/", "__")


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """Read a file as upright uint8 RGB (H, W, 3); 16 bits are rounded to 8. Raises RestoreError as `io.read_image`."""
    return io.to_uint8(io.read_image(path).pixels[0])


def read_image_size(path: Path) -> tuple[int, int]:
    """Return (height, width) of a file as displayed, read from its header."""
    with io.open_image(path) as image:
        # Pillow's size of a TIFF file is that of the turned picture.
        rotated = image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
        return image.size if rotated else image.size[::-1]


def crop_centre(pixels: np.ndarray, size: int | None) -> np.ndarray:
    """Reduce uint8 (H, W, 3) to `size` on the shorter side, antialiased bicubic, and crop the centre square."""
    height, width = pixels.shape[:2]
    if size is None or (height, width) == (size, size):
        return pixels
    scale = size / min(height, width)
    new = (max(size, round(width * scale)), max(size, round(height * scale)))
    resized = np.asarray(Image.fromarray(pixels).resize(new, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]
