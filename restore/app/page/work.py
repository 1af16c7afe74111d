"""What a click does: photos restored one after the other in a thread, with what there is to see meanwhile."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from operators import RestoreError
from restore import disk
from restore.app import run
from restore.app.files import MEAN, SIGNALS, SPREAD, Photo, find_photos
from restore.app.page import pictures
from restore.app.page.pictures import SMALL, Edits
from restore.app.page.tasks import Wish, task_of
from restore.app.plan import Plan, Planner, duration
from restore.images import io

EVERY = 0.5  # seconds between two pictures of what is forming
WORKER = "restore-photos"  # the name of the thread
TRACED = 4_000_000  # pixels, up to which the pictures of the guidance are kept


@dataclass(frozen=True)
class Step:
    """Where one photo is. share: of its steps. picture: x0_hat of the sample at work, None before the first."""

    sentence: str
    share: float | None = None
    detail: str = ""
    picture: PIL.Image.Image | None = None


@dataclass(frozen=True)
class Done:
    """One photo's end. error: the sentence why there is no result; else what there is to see and to download."""

    name: str
    error: str | None = None
    seconds: float = 0.0
    before: PIL.Image.Image | None = None
    samples: list[PIL.Image.Image] = field(default_factory=list)
    guessed: PIL.Image.Image | None = None
    guidance: Path | None = None
    files: list[Path] = field(default_factory=list)
    sidecar: dict[str, Any] = field(default_factory=dict)


def restore(
    photos: list[str | Path],
    restorer: Any,
    wish: Wish,
    planner: Planner,
    folder: str | Path,
    stop: threading.Event,
    edits: Edits | None = None,
    mask: str | Path | None = None,
) -> Iterator[Step | Done]:
    """Photos restored into a folder of the caller's, as they go.

    edits: of the first photo, None for none. mask: a file, for every photo; else what the edits say was painted over,
    and for photos without edits what is proposed. A photo that cannot be restored is a Done with its error; sentences
    name no folder. Ends early, with the sentence "cancelled", once `stop` is set, which leaving the iterator does too.
    """
    if not photos:
        yield Done("", "choose a photo first")
        return
    folder = Path(folder)

    def work(report: Callable[[Any], None]) -> None:
        for k, photo in enumerate(photos):
            place = folder / str(k)  # photos may have one name
            count = f" ({k + 1} of {len(photos)})" if len(photos) > 1 else ""
            own = edits if k == 0 else None
            try:
                report(_one(Path(photo), restorer, wish, planner, place, stop, own, mask, count, report))
            except RestoreError as error:
                report(Done(Path(photo).name, bare(str(error), photo, mask, place)))
            if stop.is_set():
                return

    yield from _streamed(work, stop)


def estimate(
    photo: str | Path,
    restorer: Any,
    wish: Wish,
    planner: Planner,
    folder: str | Path,
    edits: Edits | None = None,
    mask: str | None = None,
) -> Plan:
    """Memory and time of one photo. Nothing need be painted over yet. Raises RestoreError."""
    folder = Path(folder)
    try:
        chosen, task = _prepared(Path(photo), wish, folder, edits, mask, planning=True)
        (outcome,) = run.restore_files([chosen], restorer, task, **_options(wish), planner=planner, dry_run=True)
        if outcome.error:
            raise RestoreError(outcome.error)
    except RestoreError as error:
        raise RestoreError(bare(str(error), photo, mask, folder)) from None
    return outcome.plan


def _one(photo, restorer, wish, planner, folder, stop, edits, mask, count, report) -> Done:
    report(Step(f"Looking at {photo.name}{count} …"))
    chosen, task = _prepared(photo, wish, folder, edits, mask)
    plans, began, last = [], 0.0, 0.0

    def announce(outcome: run.Outcome) -> None:
        nonlocal began
        began = time.monotonic()
        plans.append(outcome.plan)
        if outcome.plan.fits:
            report(Step(f"Restoring {photo.name}{count}, about {duration(outcome.plan.seconds)} …", 0.0))

    def watch(step: dict) -> None:
        nonlocal last
        if stop.is_set():
            raise RestoreError("cancelled")
        final = step["step"] == step["steps"] - 1
        if final or time.monotonic() - last > EVERY:
            last = time.monotonic()
            share = (step["first"] + (step["step"] + 1) / step["steps"]) / step["total"]
            version = f", version {step['first'] + 1} of {step['total']}" if step["total"] > 1 else ""
            left = duration((last - began) * (1 - share) / share) if share < 1 else "nothing"
            detail = f"step {step['step'] + 1} of {step['steps']}{version}, about {left} left"
            picture = pictures.shown(step["x0_hat"][0].float().cpu(), 640, SMALL)
            report(Step(f"Restoring {photo.name}{count} …", share, detail, picture))

    started = time.monotonic()
    before = io.read_image(chosen.source)
    traced = wish.pictures and before.pixels.shape[-1] * before.pixels.shape[-2] * task.factor**2 <= TRACED
    options = _options(wish) | {"save_trajectory": traced, "callback": watch, "planner": planner, "announce": announce}
    if stop.is_set():
        raise RestoreError("cancelled")
    (outcome,) = run.restore_files([chosen], restorer, task, **options)
    if plans and not plans[0].fits:
        need, free = plans[0].memory / 1e9, plans[0].available / 1e9
        raise RestoreError(
            f"{photo.name} would take {need:.1f} GB of memory and {free:.1f} GB are free here: crop it or reduce it"
        )
    if outcome.error is not None:
        raise RestoreError(outcome.error)
    return _done(photo, chosen, before, wish, edits or Edits(), time.monotonic() - started)


def _prepared(
    photo: Path, wish: Wish, folder: Path, edits: Edits | None, mask: str | Path | None, planning: bool = False
) -> tuple[Photo, Any]:
    """The photo as it is to be restored, a new file where it was turned or cropped, and its task."""
    record = pictures.read(photo)
    (chosen,) = find_photos([photo], folder / "out")
    proposing, edits = edits is None, edits or Edits()
    if not edits.none:
        record = pictures.edited(record, edits)
        source = folder / "in" / f"{photo.stem}.png"
        source.parent.mkdir(parents=True, exist_ok=True)
        io.write_image(source, record.pixels, like=record)
        chosen = Photo(source, chosen.target)
    missing = edits.mask
    if wish.task == "fill" and mask is None:
        if planning:  # what it takes does not depend on what is painted over
            missing = np.zeros(record.size, bool)
            missing[0, 0] = True
        elif proposing:
            missing = pictures.proposed(record.pixels, wish.sensitivity)
        if missing is not None:
            mask = pictures.write_mask(folder / "mask.png", missing, record.size)
    return chosen, task_of(wish, record.pixels, folder, None if mask is None else Path(mask))


def _options(wish: Wish) -> dict[str, Any]:
    guidance = "preset" if wish.pag_scale is None else run.ChangedPAG(wish.pag_scale)
    return {
        "quality": wish.quality,
        "samples": wish.samples,
        "steps": wish.steps,
        "seed": wish.seed,
        "guidance": guidance,
        "label": wish.label,
    }


def _done(photo: Path, chosen: Photo, before: io.ImageRecord, wish: Wish, edits: Edits, seconds: float) -> Done:
    sidecar = json.loads(chosen.sidecar.read_text(encoding="utf-8"))
    if chosen.source != photo:
        done = {"turns": edits.turns, "crop": list(edits.crop)}
        sidecar = sidecar | {"input": photo.name, "edited": {**done, "sha256": disk.hash_file(photo)}}
        disk.write_json(chosen.sidecar, sidecar)
    names = [chosen.target] + [chosen.beside(f"-sample{k}") for k in range(1, wish.samples)]
    results = [io.read_image(path).pixels for path in names]
    large = [pictures.shown(x, smallest=SMALL) for x in results]
    spread = chosen.beside(SPREAD, ".png")
    guessed = None
    if wish.samples > 1:
        guessed = pictures.guessed(results[0], (io.read_image(spread).pixels[:, :1] + 1) / 4)
    guidance = chosen.beside(SIGNALS, ".png")
    there = [*names, chosen.beside(MEAN), spread, guidance, chosen.sidecar]
    return Done(
        photo.name,
        seconds=seconds,
        before=pictures.shown(before.pixels, smallest=SMALL).resize(large[0].size, PIL.Image.Resampling.BICUBIC),
        samples=large,
        guessed=guessed,
        guidance=guidance if guidance.exists() else None,
        files=[path for path in there if path.exists()],
        sidecar=sidecar,
    )


def _streamed(work: Callable[[Callable[[Any], None]], None], stop: threading.Event) -> Iterator[Any]:
    """What `work` reports from a thread of its own, which ends with the iterator. What it raises is raised here."""
    reports: queue.Queue = queue.Queue()

    def run_it() -> None:
        try:
            work(lambda report: reports.put((report, None)))
            reports.put((None, None))
        except BaseException as error:
            reports.put((None, error))

    thread = threading.Thread(target=run_it, name=WORKER, daemon=True)
    thread.start()
    try:
        while (item := reports.get()) != (None, None):
            report, error = item
            if error is not None:
                raise error
            yield report
    finally:
        stop.set()
        thread.join()


def bare(sentence: str, *paths: str | Path | None) -> str:
    """A sentence without the folders that files lie in."""
    for path in filter(None, paths):
        path = Path(path)
        for folder in (path / "out", path / "in", path, path.parent):
            sentence = sentence.replace(f"{folder}/", "")
    return sentence
