"""Which images a number was computed on: named sets, lists, folders, and the hash that identifies them."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from operators import RestoreError
from operators.naming import check_known
from restore.disk import hash_file
from restore.images import io
from restore.images.folder import crop_centre, list_images, read_rgb
from restore.images.formats import READABLE_SUFFIXES
from restore.images.resampling import stretch_range

# The sets of the literature: their side in pixels, and their files if one paper names them.
KNOWN_SETS: dict[str, tuple[int | None, list[str] | None]] = {
    "ffhq-256": (256, [f"{i:05d}" for i in range(1000)]),  # the 1k validation set of DPS (Chung et al. 2023)
    "imagenet-256": (256, None),  # validation images; papers use different ones
    "folder": (None, None),  # every image of a folder, sorted by name
}
PREPROCESSING = "shorter side to `size` by antialiased bicubic (Pillow), centre crop; untouched where it already fits"
STRETCHING = "; each image's range stretched to 0-255"


@dataclass(frozen=True)
class ImageSet:
    """A fixed, checked list of images.

    ids: paths below the folder without suffix, "/" between folders; unique. paths: the files, in the same order.
    size: every image is brought to size x size (PREPROCESSING), or left as it is if None.
    hashes: sha256 of each file, hexadecimal. shapes: (height, width) after preprocessing.
    stretch: each image's darkest value goes to 0 and its brightest to 255 after that, as in PSLD's code.
    """

    name: str
    ids: tuple[str, ...]
    paths: tuple[Path, ...]
    size: int | None
    hashes: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    stretch: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def digest(self) -> str:
        """sha256 over ids, file contents and preprocessing in order, hexadecimal: equal only for equal sets."""
        digest = hashlib.sha256()
        for key, content in zip(self.ids, self.hashes, strict=True):
            digest.update(key.encode() + b"\0" + bytes.fromhex(content))
        if self.size:
            digest.update(f"size {self.size} {PREPROCESSING}".encode())
        if self.stretch:
            digest.update(STRETCHING.encode())
        return digest.hexdigest()

    def first(self, count: int) -> ImageSet:
        """Return the set of the first images."""
        parts = ("ids", "paths", "hashes", "shapes")
        return dataclasses.replace(self, **{name: getattr(self, name)[:count] for name in parts})

    def pixels(self, i: int, margin: tuple[int, int] = (0, 0)) -> np.ndarray:
        """Return image i as uint8 (H, W, 3), preprocessed, without so many rows and columns at each side."""
        pixels, (rows, columns) = crop_centre(read_rgb(self.paths[i]), self.size), margin
        pixels = io.to_uint8(stretch_range(io.to_tensor(pixels)))[0] if self.stretch else pixels
        return pixels[rows : len(pixels) - rows, columns : pixels.shape[1] - columns]

    def tensor(self, i: int, margin: tuple[int, int] = (0, 0)) -> torch.Tensor:
        """Return image i as float32 (3, H, W) in [-1, 1], without so many rows and columns at each side."""
        return torch.from_numpy(self.pixels(i, margin).copy()).permute(2, 0, 1).float() / 127.5 - 1

    def describe(self) -> dict[str, Any]:
        """Return the protocol's entry: enough to know whether another run used the same images."""
        shapes = sorted(set(self.shapes))
        return {
            "set": self.name,
            "count": len(self),
            "sha256": self.digest,
            "size": [list(shape) for shape in shapes] if len(shapes) <= 4 else f"{len(shapes)} different sizes",
            "preprocessing": (PREPROCESSING if self.size else "none") + (STRETCHING if self.stretch else ""),
            "first": self.ids[0],
            "last": self.ids[-1],
        }


def load_dataset(
    folder: str | os.PathLike,
    *,
    name: str = "folder",
    names: str | os.PathLike | Sequence[str] | None = None,
    split: str | None = None,
    size: int | None = None,
    every: int = 1,
    limit: int | None = None,
    stretch: bool = False,
) -> ImageSet:
    """Find, check and hash a set of images before anything runs.

    folder: where the images are, at any depth.
    name: "ffhq-256" (files 00000-00999), "imagenet-256" (needs `names`) or "folder".
    names: a text file with one image name a line, or a sequence of names; suffixes are optional.
    split: subfolder of a Hugging Face image folder ("train", "test"), whose metadata file gives the order.
    size: side in pixels to which every image is brought; the named sets have their own.
    every, limit: keep every n-th image, then at most `limit`.
    stretch: see ImageSet.
    Every file is decoded once: raises one RestoreError that names all missing or all corrupt images.
    """
    check_known([name], KNOWN_SETS, "there is no data set named")
    if every < 1 or (limit is not None and limit < 1) or (size is not None and size < 1):
        raise RestoreError(f"every={every}, limit={limit} and size={size} must be 1 or more (or absent)")
    known_size, known_names = KNOWN_SETS[name]
    root, size = Path(folder) / split if split else Path(folder), size or known_size
    files, _ = list_images(root)
    if name == "imagenet-256" and names is None:
        raise RestoreError("imagenet-256 needs names=FILE, with one image name a line: papers use different lists")
    wanted = _read_names(names) or known_names or read_metadata_names(root)
    if name == "ffhq-256" and names is None and limit is not None:
        wanted = wanted[: every * limit]  # fewer images do not require the others
    if wanted:
        files = _select_files(files, wanted, root)
    files = {key: files[key] for key in list(files)[::every][:limit]}

    hashes, shapes, corrupt = [], [], []
    for path in files.values():
        try:
            shape = read_rgb(path).shape[:2]
        except RestoreError:
            corrupt.append(path.name)
            continue
        shapes.append((size, size) if size else (int(shape[0]), int(shape[1])))
        hashes.append(hash_file(path))
    if corrupt:
        count = f"{len(corrupt)} of {len(files)}"
        raise RestoreError(f"{count} files in {root} are not readable images: {_shorten(corrupt)}; replace them")
    return ImageSet(name, tuple(files), tuple(files.values()), size, tuple(hashes), tuple(shapes), stretch)


def read_metadata_names(folder: Path) -> list[str]:
    """Return the ids that metadata.jsonl or .csv of a Hugging Face image folder lists; [] if there is none.

    Raises RestoreError for a file without a column `file_name`.
    """
    for source in (folder / "metadata.jsonl", folder / "metadata.csv"):
        if source.exists():
            with open(source, newline="", encoding="utf-8") as file:
                read = csv.DictReader(file) if source.suffix == ".csv" else map(json.loads, filter(str.strip, file))
                rows = list(read)
            if not rows or "file_name" not in rows[0]:
                raise RestoreError(f"{source} must have a column `file_name`, as Hugging Face image folders do")
            return [Path(row["file_name"]).with_suffix("").as_posix() for row in rows]
    return []


def _read_names(names: str | os.PathLike | Sequence[str] | None) -> list[str] | None:
    if names is None:
        return None
    if isinstance(names, (str, os.PathLike)):
        if not Path(names).is_file():
            raise RestoreError(f"the list of image names {names} does not exist; give a text file with one name a line")
        names = Path(names).read_text(encoding="utf-8").splitlines()
    lines = [str(line).strip() for line in names if str(line).strip() and not str(line).startswith("#")]
    if not lines:
        raise RestoreError("the list of image names is empty; give at least one name")
    for i, line in enumerate(lines):  # "n01/a.JPEG 65": lists of the literature have a class after the file name
        pictures = [name for name in (line, line.split()[0]) if Path(name).suffix.lower() in READABLE_SUFFIXES]
        lines[i] = pictures[0].removesuffix(Path(pictures[0]).suffix) if pictures else line
    return lines


def _select_files(files: dict[str, Path], names: list[str], folder: Path) -> dict[str, Path]:
    """The named images in the list's order; a bare stem also matches the only file of that name in a subfolder."""
    by_stem: dict[str, list[str]] = {}
    for key in files:
        by_stem.setdefault(key.rsplit("/", 1)[-1], []).append(key)
    selected, missing = {}, []
    for name in names:
        matches = [name] if name in files else by_stem.get(name, [])
        if len(matches) > 1:
            raise RestoreError(f"{name} is in {folder} {len(matches)} times ({', '.join(matches[:3])}); give its path")
        if not matches:
            missing.append(name)
        elif matches[0] in selected:
            raise RestoreError(f"the list of image names holds {name} twice; remove one")
        else:
            selected[matches[0]] = files[matches[0]]
    if missing:
        count = f"{len(missing)} of {len(names)}"
        raise RestoreError(f"{count} images are missing from {folder}: {_shorten(missing)}; add them")
    return selected


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
