"""What a configuration has to compute: fixed batches of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from operators import RestoreError
from restore import disk
from restore.bench import datasets
from restore.bench.config import pairs
from restore.images.folder import to_file_name


@dataclass(frozen=True)
class Batch:
    """`ids` of one task, by one method. Batches are cut from the list of images in order and never
    regrouped, so that a resumed run computes the same batches as an undisturbed one."""

    task: str
    method: str
    index: int
    ids: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.task}/{self.method}/{self.index:06d}"

    def results(self, run: Path) -> Path:
        return run / "results" / self.task / self.method

    def rows(self, run: Path) -> list[Path]:
        """The files whose presence means that an image is done: they are written last."""
        return [self.results(run) / "rows" / f"{to_file_name(i)}.json" for i in self.ids]

    def done(self, run: Path) -> bool:
        return all(read_row(path) is not None for path in self.rows(run))


def read_row(path: Path) -> dict[str, Any] | None:
    """A finished image's row; None where it, or its picture, is not there or cannot be read: it is computed again."""
    row = disk.read_json(path)
    whole = isinstance(row, dict) and "sha256" in row and "image" in row
    return row if whole and (path.parent.parent / f"{path.stem}.png").exists() else None


def load_images(config: Mapping[str, Any]) -> datasets.ImageSet | None:
    """The checked images of a restoration benchmark, None for generation. Raises RestoreError as load_dataset."""
    if config["kind"] != "restoration":
        return None
    data = dict(config["data"])
    images = datasets.load_dataset(data.pop("folder"), **data)
    if len(set(images.shapes)) > 1 and config["batch"] > 1:
        raise RestoreError("the images have different sizes; give data.size=PIXELS to bring them to one, or batch=1")
    return images


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line. Raises RestoreError for a missing or empty file."""
    if not Path(path).is_file():
        raise RestoreError(f"the file of prompts {path} does not exist; give one with a prompt a line")
    prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise RestoreError(f"the file of prompts {path} is empty; give one prompt a line")
    return prompts


def image_ids(config: Mapping[str, Any], task: str, images: datasets.ImageSet | None) -> list[str]:
    """Ids of the images of a task: of the data set, or numbers; `prompt-number` where images belong to prompts."""
    if images is not None:
        return list(images.ids)
    entry = config["tasks"][task]
    if config["metrics"]["group_by_prompt"] and entry["prompts"]:
        # count images for each prompt
        prompts = range(len(read_prompts(entry["prompts"])))
        return [f"{p:03d}-{i:06d}" for p in prompts for i in range(entry["count"])]
    return [f"{i:06d}" for i in range(entry["count"])]


def expand(config: Mapping[str, Any], images: datasets.ImageSet | None) -> list[Batch]:
    """All batches. The first of every task and method comes before the second of any, so that an interrupted run
    compares all methods on the same first images; where tasks have different backbones, one backbone after the other.
    """
    batches = []
    size = config["batch"]
    for task, method in pairs(config):
        ids = image_ids(config, task, images)
        for index, first in enumerate(range(0, len(ids), size)):
            batches.append(Batch(task, method, index, tuple(ids[first : first + size])))
    backbones = list(dict.fromkeys(task["backbone"] for task in config["tasks"].values()))
    batches.sort(key=lambda batch: (backbones.index(config["tasks"][batch.task]["backbone"]), batch.index))
    names = [to_file_name(i) for i in (images.ids if images is not None else [])]
    if len(set(names)) != len(names):
        raise RestoreError("two images would be written to one file: folders become __ in names; rename one of them")
    return batches
