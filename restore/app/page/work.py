"""Photos restored one after another in a thread, with what there is to see meanwhile."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from operators import RestoreError
from restore import disk
from restore.app.choice import MethodChoice, PAGOverride
from restore.app.files import MEAN, SIGNALS, SPREAD, Photo, find_photos
from restore.app.page import pictures
from restore.app.page.pictures import SMALLEST, Edits
from restore.app.page.request import Request, make_task
from restore.app.page.text import hide_folders
from restore.app.priors import PriorChooser
from restore.app.progress import PhotoPace, watch_network
from restore.app.run import Condition, Outcome, RestoreJob
from restore.images import io
from restore.memory import Plan, Planner, format_duration

File = str | Path
INTERVAL = 0.5  # seconds between two pictures of what is forming
WORKER = "restore-photos"  # the name of the thread
LARGEST_TRAJECTORY = 4_000_000  # pixels of the largest result whose guidance is drawn


@dataclass(frozen=True)
class Step:
    """Where one photo is. share: of its steps. picture: x0_hat of the current sample, None before the first step."""

    sentence: str
    share: float | None = None
    detail: str = ""
    picture: PIL.Image.Image | None = None


@dataclass(frozen=True)
class Result:
    """What became of one photo: an error, which says why there is no result, or what to look at and to download."""

    name: str
    error: str | None = None
    seconds: float = 0.0
    before: PIL.Image.Image | None = None
    samples: list[PIL.Image.Image] = field(default_factory=list)
    guessed: PIL.Image.Image | None = None
    guidance: Path | None = None
    files: list[Path] = field(default_factory=list)
    sidecar: dict[str, Any] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """What was seen in the photo and done."""
        return self.sidecar.get("note", "")

    def line(self) -> str:
        if self.error is None:
            lost = ", ".join(self.sidecar.get("not_kept", ()))
            return f"{self.name}: done in {format_duration(self.seconds)}" + (f"; not kept: {lost}" if lost else "")
        return self.error if not self.name or self.name in self.error else f"{self.name}: {self.error}"


def restore(
    photos: list[File],
    prior: Planner | PriorChooser,
    request: Request,
    folder: File,
    stop: threading.Event,
    edits: Edits | None = None,
    mask: File | None = None,
    others: Request | None = None,
) -> Iterator[Step | Result]:
    """Restore photos, by a planner's Restorer or a chosen one, into a folder of the caller's; yield steps and Results.

    edits: of the first photo, None for none. others: asked of the photos after it, None for the same. mask: a file, for
    every photo; without one the paint of the edits, and for photos without edits the proposed mask. A photo that cannot
    be restored yields a Result with its error; no message names a folder. Ends early, with the error "cancelled", once
    `stop` is set; closing the iterator sets it too.
    """
    if not photos:
        yield Result("", "choose a photo first")
        return
    folder = Path(folder)

    def work(report: Callable[[Any], None]) -> None:
        for k, photo in enumerate(map(Path, photos)):
            place, own = folder / str(k), edits if k == 0 else None  # several photos may have one name
            title = f"{photo.name} ({k + 1} of {len(photos)})" if len(photos) > 1 else photo.name
            wanted = request if k == 0 or others is None else others
            report(Step(f"Looking at {title} …"))
            try:
                selected, task = _prepare(photo, wanted, place, own, mask)
                seconds = _restore_photo(selected, task, prior, wanted, _Watch(title, report, stop))
                report(_collect_result(photo, selected, wanted, own or Edits(), seconds))
            except RestoreError as error:
                report(Result(photo.name, _reword(error, photo, mask, place)))
            if stop.is_set():
                return

    yield from _stream(work, stop)


def estimate(
    photo: File,
    prior: Planner | PriorChooser,
    request: Request,
    folder: File,
    edits: Edits | None = None,
    mask: File | None = None,
) -> Outcome:
    """Return the plan of one photo, which need not be painted over yet, and what was seen. Raises RestoreError."""
    folder = Path(folder)
    try:
        selected, task = _prepare(Path(photo), request, folder, edits, mask, planning=True)
        job = RestoreJob(task=task, **_options(request), **_name_prior(prior), dry_run=True)
        (outcome,) = job.run([selected])
        if outcome.error:
            raise RestoreError(outcome.error)
    except RestoreError as error:
        raise RestoreError(_reword(error, photo, mask, folder)) from None
    return outcome


def _name_prior(prior: Planner | PriorChooser) -> dict[str, Any]:
    """Return the arguments of RestoreJob."""
    if isinstance(prior, PriorChooser):
        return {"restorer": None, "chooser": prior}
    return {"restorer": prior.restorer, "planner": prior}


def _reword(error: RestoreError, *paths: File | None) -> str:
    """Return a message without folders, in the words of the page."""
    return hide_folders(str(error), *paths).replace("try task=sr2", "choose Enlarge")


class _Watch:
    """Reports the plan, the steps and the network's calls of one photo, and stops it."""

    def __init__(self, title: str, report: Callable[[Any], None], stop: threading.Event) -> None:
        self.title, self.report, self.stop = title, report, stop
        self.plan: Plan | None = None
        self.pace, self.last, self.place, self.note = PhotoPace(), 0.0, "", ""

    def check(self) -> None:
        if self.stop.is_set():
            raise RestoreError("cancelled")

    def announce(self, outcome: Outcome) -> None:
        self.plan, self.pace, self.note = outcome.plan, PhotoPace(outcome.plan), outcome.note
        if self.plan.fits:
            self._show(None)

    def called(self) -> None:
        self.check()
        if self.plan is not None:  # not those that are timed for the plan
            self.pace.count_call()
            if self._due():
                self._show(None)

    def step(self, step: dict) -> None:
        self.check()
        self.pace.count_step(step)
        version = f", version {step['first'] + 1} of {step['total']}" if step["total"] > 1 else ""
        self.place = f"step {step['step'] + 1} of {step['steps']}{version}"
        if step["step"] == step["steps"] - 1 or self._due():
            self._show(pictures.render(step["x0_hat"][0].float().cpu(), 640, SMALLEST))

    def _due(self) -> bool:
        return time.monotonic() - self.last > INTERVAL

    def _show(self, picture: PIL.Image.Image | None) -> None:
        self.last = time.monotonic()
        where = ", ".join(filter(None, (self.pace.format_left(), self.place)))
        detail = "; ".join(filter(None, (where, self.note)))
        self.report(Step(f"Restoring {self.title} …", self.pace.share, detail, picture))


def _restore_photo(photo: Photo, task: Any, prior: Planner | PriorChooser, request: Request, watch: _Watch) -> float:
    """Restore one photo and return the seconds it took."""
    started = time.monotonic()
    height, width = io.read_image(photo.source).size
    trajectory = request.trajectory and height * width * task.factor**2 <= LARGEST_TRAJECTORY
    options = _options(request) | {"save_trajectory": trajectory, "callback": watch.step, "announce": watch.announce}
    watch.check()
    with ExitStack() as watched:

        def observe(backbone: Any) -> None:
            watched.enter_context(watch_network(backbone, watch.called))

        if isinstance(prior, PriorChooser):
            prior.observe = observe
        else:
            observe(prior.restorer.backbone)
        (outcome,) = RestoreJob(task=task, **options, **_name_prior(prior)).run([photo])
    if (plan := watch.plan) is not None and not plan.fits:
        need, free = f"{plan.memory / 1e9:.1f} GB of memory", f"{plan.available / 1e9:.1f} GB are free"
        raise RestoreError(f"{photo.source.name} would take {need} and {free} here: crop it or reduce it")
    if outcome.error is not None:
        raise RestoreError(outcome.error)
    return time.monotonic() - started


def _prepare(
    photo: Path, request: Request, folder: Path, edits: Edits | None, mask: File | None, planning: bool = False
) -> tuple[Photo, Any]:
    """Return the photo to be restored, a new file if it was turned or cropped, and its task."""
    record = pictures.read_photo(photo)
    (selected,) = find_photos([photo], folder / "out")
    proposing, edits, compression = edits is None, edits or Edits(), None
    if edits.change_photo:
        compression = pictures.read_compression(record, edits)
        record = pictures.apply_edits(record, edits)
        source = folder / "in" / f"{photo.stem}.png"
        source.parent.mkdir(parents=True, exist_ok=True)
        io.write_image(source, record.pixels, like=record)
        selected = Photo(source, selected.target)
        if request.task == "jpeg" and compression is None:
            raise RestoreError(f"{photo.name} does not say how it was compressed, or not once it is turned: undo that")
    missing = edits.mask
    if request.task == "fill" and mask is None:
        if planning:  # memory and time do not depend on what is painted over
            missing = np.zeros(record.size, bool)
            missing[0, 0] = True
        elif proposing:
            missing = pictures.propose_mask(record.pixels, request.sensitivity)
        if missing is not None:
            mask = pictures.write_mask(folder / "mask.png", missing, record.size)
    task = make_task(request, record.pixels, folder, None if mask is None else Path(mask))
    return selected, replace(task, compression=compression)


def _options(request: Request) -> dict[str, Any]:
    guidance = "preset" if request.pag_scale is None else PAGOverride(request.pag_scale)
    method = MethodChoice(quality=request.quality, guidance=guidance, steps=request.steps)
    condition = Condition(request.label)
    return {"method": method, "condition": condition, "samples": request.samples, "seed": request.seed}


def _collect_result(photo: Path, selected: Photo, request: Request, edits: Edits, seconds: float) -> Result:
    sidecar = json.loads(selected.sidecar.read_text(encoding="utf-8"))
    if selected.source != photo:
        edited = {"turns": edits.turns, "crop": list(edits.crop), "sha256": disk.hash_file(photo)}
        sidecar |= {"input": photo.name, "edited": edited}
        lost = [*sidecar.get("not_kept", ()), *io.list_lost(selected.target, io.read_image(photo))]
        sidecar |= {"not_kept": list(dict.fromkeys(lost))} if lost else {}
        disk.write_json(selected.sidecar, sidecar)
    names = [selected.target] + [selected.companion(f"-sample{k}") for k in range(1, request.samples)]
    spread, guidance = selected.companion(SPREAD, ".png"), selected.companion(SIGNALS, ".png")
    results = [io.read_image(path).pixels for path in names]
    samples = [pictures.render(x, smallest=SMALLEST) for x in results]
    before = pictures.render(io.read_image(selected.source).pixels, smallest=SMALLEST)
    guessed = None
    if request.samples > 1:
        guessed = pictures.draw_spread(results[0], (io.read_image(spread).pixels[:, :1] + 1) / 4)
    files = [*names, selected.companion(MEAN), spread, guidance, selected.sidecar]
    return Result(
        photo.name,
        seconds=seconds,
        before=before.resize(samples[0].size, PIL.Image.Resampling.BICUBIC),
        samples=samples,
        guessed=guessed,
        guidance=guidance if guidance.exists() else None,
        files=[path for path in files if path.exists()],
        sidecar=sidecar,
    )


def _stream(work: Callable[[Callable[[Any], None]], None], stop: threading.Event) -> Iterator[Any]:
    """Yield what `work` reports from its own thread, which ends with the iterator; raise what it raises."""
    reports: queue.Queue = queue.Queue()

    def target() -> None:
        try:
            work(lambda report: reports.put((report, None)))
            reports.put((None, None))
        except BaseException as error:
            reports.put((None, error))

    thread = threading.Thread(target=target, name=WORKER, daemon=True)
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
