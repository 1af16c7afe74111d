"""Which images a number was computed on: named sets, lists, folders, and the hash that identifies them."""

from __future__ import annotations

import csv
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
from restore.images.io import READABLE_SUFFIXES
from restore.images.resampling import stretch_range

# The sets of the literature: their side and, where the paper that introduced the protocol names them, the files.
KNOWN_SETS: dict[str, dict[str, Any]] = {
    "ffhq-256": {
        "size": 256,
        "names": [f"{i:05d}" for i in range(1000)],
        "about": "FFHQ at 256 pixels, files 00000-00999: the 1k validation set of DPS (Chung et al. 2023)",
    },
    "imagenet-256": {
        "size": 256,
        "names": None,
        "about": "ImageNet validation images at 256 pixels; `names` must list which ones, as papers differ",
    },
    "folder": {"size": None, "names": None, "about": "every image of a folder, sorted by name"},
}
PREPROCESSING = "shorter side to `size` by antialiased bicubic (Pillow), centre crop; untouched where it already fits"
STRETCHING = "; each image's range stretched to 0-255"


@dataclass(frozen=True)
class ImageSet:
    """A fixed, checked list of images.

    ids: one per image, the path below `root` without suffix, "/" between folders; unique.
    paths: the files, in the same order.
    size: every image is brought to size x size (PREPROCESSING), or left as it is when None.
    digest: sha256 over ids and file contents in order, hexadecimal: equal only for equal sets.
    shapes: (height, width) after preprocessing, one per image.
    stretch: each image's darkest value goes to 0 and its brightest to 255 after that (PSLD's code does it).
    """

    name: str
    root: Path
    ids: tuple[str, ...]
    paths: tuple[Path, ...]
    size: int | None
    digest: str
    shapes: tuple[tuple[int, int], ...]
    stretch: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def pixels(self, i: int) -> np.ndarray:
        """Image i as uint8 (H, W, 3), preprocessed."""
        pixels = crop_centre(read_rgb(self.paths[i]), self.size)
        return io.to_uint8(stretch_range(io.to_tensor(pixels)))[0] if self.stretch else pixels

    def tensor(self, i: int) -> torch.Tensor:
        """Image i as float32 (3, H, W) in [-1, 1]."""
        return torch.from_numpy(self.pixels(i).copy()).permute(2, 0, 1).float() / 127.5 - 1

    def describe(self) -> dict[str, Any]:
        """The protocol's entry: enough to know whether another run saw the same images."""
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


def metadata_names(folder: Path) -> list[str]:
    """The ids that metadata.jsonl or .csv of a Hugging Face image folder lists; [] where there is none."""
    for source in (folder / "metadata.jsonl", folder / "metadata.csv"):
        if source.exists():
            with open(source, newline="", encoding="utf-8") as file:
                read = csv.DictReader(file) if source.suffix == ".csv" else map(json.loads, filter(str.strip, file))
                rows = list(read)
            if not rows or "file_name" not in rows[0]:
                raise RestoreError(f"{source} has no column `file_name`; Hugging Face image folders need one")
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
    return [_without_suffix(line) for line in lines]


def _without_suffix(line: str) -> str:
    """`n01/a.JPEG 65` -> `n01/a`: lists of the literature carry a class label after the file name."""
    for candidate in (line, line.split()[0]):
        suffix = Path(candidate).suffix
        if suffix.lower() in READABLE_SUFFIXES:
            return candidate[: -len(suffix)]
    return line


def _choose(found: dict[str, Path], names: list[str], folder: Path) -> dict[str, Path]:
    """The named images in the list's order; a bare stem also finds a file deeper down if it is the only one."""
    by_stem: dict[str, list[str]] = {}
    for key in found:
        by_stem.setdefault(key.rsplit("/", 1)[-1], []).append(key)
    chosen, missing = {}, []
    for name in names:
        candidates = [name] if name in found else by_stem.get(name, [])
        if len(candidates) > 1:
            raise RestoreError(
                f"{name} is in {folder} {len(candidates)} times ({', '.join(candidates[:3])}); give its path"
            )
        if not candidates:
            missing.append(name)
        elif candidates[0] in chosen:
            raise RestoreError(f"the list of image names holds {name} twice; remove one")
        else:
            chosen[candidates[0]] = found[candidates[0]]
    if missing:
        some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise RestoreError(f"{len(missing)} of {len(names)} images are missing from {folder}: {some}; add them")
    return chosen


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
    """Resolve, check and hash a set of images before anything runs.

    folder: where the images are, at any depth.
    name: "ffhq-256" (files 00000-00999), "imagenet-256" (needs `names`) or "folder".
    names: a text file with one image name a line, or a sequence of names; suffixes are optional.
    split: subfolder of a Hugging Face image folder ("train", "test"), its metadata file giving the order.
    size: side in pixels that every image is brought to; the named sets have their own.
    every, limit: keep every n-th image, then at most `limit`.
    stretch: see ImageSet.

    Every file is decoded once, so missing and corrupt images are named here, all of them, in one RestoreError.
    """
    check_known([name], KNOWN_SETS, "there is no data set named")
    if every < 1 or (limit is not None and limit < 1) or (size is not None and size < 1):
        raise RestoreError(f"every={every}, limit={limit} and size={size} must be 1 or more (or absent)")
    known = KNOWN_SETS[name]
    root = Path(folder) / split if split else Path(folder)
    found, _ = list_images(root)
    wanted = _read_names(names) or known["names"] or metadata_names(root) or None
    if name == "imagenet-256" and names is None:
        raise RestoreError(
            "imagenet-256 needs names=FILE, a text file with one image name a line: papers use different 1k lists"
        )
    if name == "ffhq-256" and names is None and limit is not None:
        # Asking for fewer images must not require the others to be there.
        wanted = wanted[: every * limit]
    chosen = _choose(found, wanted, root) if wanted is not None else found
    ids = list(chosen)[::every][:limit]
    size = size or known["size"]

    digest, shapes, corrupt = hashlib.sha256(), [], []
    for key in ids:
        try:
            shape = read_rgb(chosen[key]).shape[:2]
        except RestoreError:
            corrupt.append(chosen[key].name)
            continue
        shapes.append((size, size) if size else (int(shape[0]), int(shape[1])))
        digest.update(key.encode() + b"\0" + bytes.fromhex(hash_file(chosen[key])))
    if corrupt:
        some = ", ".join(corrupt[:5]) + (" ..." if len(corrupt) > 5 else "")
        raise RestoreError(
            f"{len(corrupt)} of {len(ids)} files in {root} are not readable images: {some}; replace them"
        )
    if size:
        digest.update(f"size {size} {PREPROCESSING}".encode())
    if stretch:
        digest.update(STRETCHING.encode())
    return ImageSet(
        name=name,
        root=root,
        ids=tuple(ids),
        paths=tuple(chosen[key] for key in ids),
        size=size,
        digest=digest.hexdigest(),
        shapes=tuple(shapes),
        stretch=stretch,
    )
