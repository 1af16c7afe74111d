"""A user study: one page that shows the pictures of two methods blind, side by side, and counts which are preferred."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from operators import RestoreError
from restore import disk
from restore.bench.batches import read_row
from restore.bench.protocol import find_conflicts, format_differences
from restore.report import tables
from restore.report.figures import to_data_uri
from restore.report.tables import Run
from restore.report.write import make_environment

QUESTIONS, IMAGES = 10, 4  # of a task, and of each side of a question (PAG, Ahn et al. 2024, App. C.4)

MARK = '"restore study "'  # of the page's own script


def write_study(
    runs: Sequence[str | os.PathLike],
    methods: tuple[str, str],
    out: str | os.PathLike | None = None,
    *,
    questions: int = QUESTIONS,
    images: int = IMAGES,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write study.html, into `out` or the first run's folder, and return its path.

    runs: one, or two whose pictures are paired: the first method is of the first run, the second of the last one.
    methods: keys of the configurations. Every question has `images` pictures of each, of the same noise or measurement;
    which side a method is on is drawn by the seed, as often left as right. At most `questions` for each task, no
    picture twice.
    Raises RestoreError if the runs differ in images or measurements, if there is no task with enough finished pictures
    of both, and if a file would be replaced that is no such page, unless `overwrite`.
    """
    if not 1 <= len(runs) <= 2:
        raise RestoreError(f"a study needs one run or two, got {len(runs)}")
    first, last = tables.read_run(runs[0]), tables.read_run(runs[-1])
    # What was computed of the pictures does not matter to people who look at them.
    protocols = ({k: v for k, v in run.protocol.items() if k != "metrics"} for run in (first, last))
    if conflicts := find_conflicts(*protocols):
        raise RestoreError(
            f"the two runs of a study must have the same images and measurements, got {format_differences(conflicts)}"
            f" ({first.folder} there, {last.folder} here); try runs whose configurations differ in methods alone"
        )
    draw, asked = random.Random(seed), []
    for task in first.results:
        pairs = _pair_pictures(first, last, task, methods)
        groups = [pairs[i : i + images] for i in range(0, len(pairs) - images + 1, images)][:questions]
        sides = [i % 2 for i in range(len(groups))]
        draw.shuffle(sides)
        for group, swapped in zip(groups, sides, strict=True):
            columns = [[to_data_uri(path) for path in column] for column in zip(*group, strict=True)]
            columns = columns[::-1] if swapped else columns
            asked.append({"task": first.task_title(task), "left": 1 if swapped else 0, "sides": columns})
    if not asked:
        raise RestoreError(f"a study needs {images} finished pictures of {methods[0]} and {methods[1]} in one task")
    draw.shuffle(asked)
    names = [first.method_title(methods[0]), last.method_title(methods[1])]
    if names[0] == names[1]:
        names = [f"{run.title}: {name}" for run, name in zip((first, last), names, strict=True)]
    key = {"methods": names, "questions": [{k: q[k] for k in ("task", "left")} for q in asked]}
    context: dict[str, Any] = {"title": first.title, "questions": asked, "key": _to_script(key)}
    page = make_environment().get_template("study.html.j2").render(context)
    path = Path(out or first.folder) / "study.html"
    if path.exists() and not overwrite and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise RestoreError(f"{path} exists and is no study; give overwrite=True to replace it, or another out=")
    disk.make_folder(path.parent)
    disk.write_bytes(path, page.encode("utf-8"))
    return path


def _pair_pictures(first: Run, last: Run, task: str, methods: tuple[str, str]) -> list[tuple[Path, Path]]:
    """Return the finished pictures of the two methods on the same images, in the order of the images."""
    folders = [run.folder / "results" / task / name for run, name in zip((first, last), methods, strict=True)]
    for run, name in zip((first, last), methods, strict=True):
        if name not in run.config["methods"]:
            raise RestoreError(f"{run.folder} has no method {name}; it has {', '.join(run.config['methods'])}")
    # A picture without its row, or another one than its row says, is of an interrupted or changed run.
    names = [{path.stem for path in folder.glob("rows/*.json") if read_row(path) is not None} for folder in folders]
    return [(folders[0] / f"{name}.png", folders[1] / f"{name}.png") for name in sorted(names[0] & names[1])]


def _to_script(value: Any) -> str:
    """Return JSON that cannot end the script element it stands in."""
    return json.dumps(value).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
