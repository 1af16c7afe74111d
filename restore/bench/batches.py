"""What a configuration has to compute: fixed batches of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from operators import RestoreError
from operators.naming import AUTO
from restore import disk
from restore.batch import check_operator
from restore.bench.config import list_cells, locate_errors
from restore.bench.datasets import ImageSet, load_dataset
from restore.images.folder import to_file_name
from restore.paths import data_dir


@dataclass(frozen=True)
class Batch:
    """Images of one task, by one method.

    Batches are cut from the list of images in order and never regrouped, so that a resumed run computes the same ones.
    """

    task: str
    method: str
    index: int
    ids: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its name in progress and messages, and of its cost file."""
        return f"{self.task}/{self.method}/{self.index:06d}"

    def folder(self, run: Path) -> Path:
        """Return the folder of the results of its task and method."""
        return run / "results" / self.task / self.method

    def row_paths(self, run: Path) -> list[Path]:
        """Return the files that are written last: an image is done if its row exists."""
        return [self.folder(run) / "rows" / f"{to_file_name(i)}.json" for i in self.ids]

    def is_done(self, run: Path) -> bool:
        """Return whether all its images are done."""
        return all(read_row(path) is not None for path in self.row_paths(run))


def read_row(path: Path) -> dict[str, Any] | None:
    """Return a finished image's row. None if it, its picture or a file beside it (truth, measurement, samples, spread)
    is missing or not the one that was written: the image must be computed again."""
    row, folder = disk.read_json(path), path.parent.parent
    if not (isinstance(row, dict) and "sha256" in row and "image" in row):
        return None
    run = folder.parents[2]
    files = {folder / f"{path.stem}.png": row["sha256"]}
    files |= {run / name: digest for name, digest in (row.get("files") or {}).items()}  # older rows have none
    return row if all(disk.has_hash(file, digest) for file, digest in files.items()) else None


def find_truth(run: Path, task: str, name: str) -> Path:
    """Return the file (of the stem `name`) that results of a task are compared with: the image, or, if the task has
    truths of its own, the part of it that the measurement shows."""
    own = run / "truth" / task / f"{name}.png"
    return own if own.exists() else run / "truth" / own.name


def load_images(config: Mapping[str, Any]) -> ImageSet | None:
    """Return the checked images of a restoration benchmark, None for generation. Raises RestoreError as load_dataset,
    for different sizes in one batch, for images that a task's `solve_at` would distort, and for operators that cannot
    be built: all before a run is begun."""
    if config["kind"] != "restoration":
        return None
    data = dict(config["data"])
    images = load_dataset(data.pop("folder"), **data)
    if len(set(images.shapes)) > 1 and config["batch"] not in (1, AUTO):
        raise RestoreError("the images have different sizes; give data.size=PIXELS to bring them to one, or batch=1")
    for name, task in config["tasks"].items():
        _check_square(images, task["solve_at"], f"tasks.{name}.solve_at")
    check_operators(config, images, 1 if config["batch"] == AUTO else min(config["batch"], len(images)))
    return images


def check_operators(config: Mapping[str, Any], images: ImageSet, count: int) -> None:
    """Raise RestoreError for a task whose operator cannot be built, or not for a batch of `count` images."""
    height, width = min(images.shapes, key=math.prod)  # the smallest leaves the least room for masks and kernels
    for name, task in config["tasks"].items():
        with locate_errors(f"tasks.{name}"):
            side, options = task["solve_at"], {"per_image": task["per_image"], "count": count}
            check_operator(task["operator"], (side or height, side or width), **options)


def _check_square(images: ImageSet, side: int | None, key: str) -> None:
    """Raise RestoreError for images that are to be resized to side x side, as wide ones already are not, and are no
    squares."""
    for image_id, (height, width) in zip(images.ids, images.shapes, strict=True):
        if side and side != width != height:
            raise RestoreError(
                f"images must be square for {key}={side}, got {image_id} of {width} x {height}; give data.size=PIXELS,"
                " by which they are cropped"
            )


def find_prompts(name: str | Path) -> Path:
    """Return the file of prompts at this path, or of this name in data/prompts. Raises RestoreError without one."""
    shipped = data_dir() / "prompts" / f"{name}.txt"
    if not Path(name).is_file() and not shipped.is_file():
        raise RestoreError(f"the file of prompts {name} does not exist; give one with a prompt a line")
    return Path(name) if Path(name).is_file() else shipped


def read_prompts(path: str | Path, limit: int | None = None) -> list[str]:
    """Return the prompts (the first ones, so many) of a file, one a line, or of a set by its name. Raises RestoreError
    as find_prompts, and if there are none, or fewer."""
    lines = find_prompts(path).read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise RestoreError(f"the file of prompts {path} is empty; give one prompt a line")
    if limit is not None and len(prompts) < limit:
        raise RestoreError(f"the file of prompts {path} must have prompt_limit={limit} prompts, got {len(prompts)}")
    return prompts[:limit]


def list_prompts(config: Mapping[str, Any], task: str, ids: Sequence[str]) -> list[str]:
    """Return the prompt of each of these images of a task; "" without prompts. They cycle through the file."""
    entry = config["tasks"][task]
    if not entry["prompts"]:
        return [""] * len(ids)
    prompts, numbers = read_prompts(entry["prompts"], entry["prompt_limit"]), [int(i.split("-")[0]) for i in ids]
    if entry["template"]:
        prompts = [entry["template"].replace("{}", prompt) for prompt in prompts]
    return [prompts[n if config["metrics"]["group_by_prompt"] else n % len(prompts)] for n in numbers]


def list_image_ids(config: Mapping[str, Any], task: str, images: ImageSet | None) -> list[str]:
    """Return the ids of a task's images: those of the data set, or numbers, `prompt-number` if grouped by prompt."""
    if images is not None:
        return list(images.ids)
    entry = config["tasks"][task]
    if config["metrics"]["group_by_prompt"] and entry["prompts"]:
        prompts = range(len(read_prompts(entry["prompts"], entry["prompt_limit"])))  # count images for each
        return [f"{p:03d}-{i:06d}" for p in prompts for i in range(entry["count"])]
    return [f"{i:06d}" for i in range(entry["count"])]


def make_batches(config: Mapping[str, Any], images: ImageSet | None) -> list[Batch]:
    """Return all batches, the first of every task and method before the second of any.

    So an interrupted run compares all methods on the same first images. Tasks with different backbones come one
    backbone after the other. Raises RestoreError if two images would be written to one file.
    """
    names: dict[str, str] = {}
    for key in images.ids if images is not None else ():
        if (other := names.setdefault(to_file_name(key), key)) != key:
            raise RestoreError(
                f"images {other} and {key} would be written to one file, as folders become __ in names; rename one"
            )
    batches, size = [], config["batch"]
    for task, method in list_cells(config):
        ids = list_image_ids(config, task, images)
        groups = [tuple(ids[first : first + size]) for first in range(0, len(ids), size)]
        batches += [Batch(task, method, index, group) for index, group in enumerate(groups)]
    backbones = list(dict.fromkeys(task["backbone"] for task in config["tasks"].values()))
    return sorted(batches, key=lambda batch: (backbones.index(config["tasks"][batch.task]["backbone"]), batch.index))
