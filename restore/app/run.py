"""Restoring and degrading files: what the command line and the page do, as functions."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from operators import RestoreError
from operators.naming import AUTO
from restore import disk
from restore.app import files
from restore.app.choice import MethodChoice
from restore.app.files import DEGRADED, MEAN, SIGNALS, SPREAD, TRAJECTORY, Photo
from restore.app.priors import PriorChooser
from restore.app.trajectory import Trajectory
from restore.calibration import describe_spread
from restore.images import io
from restore.images.resampling import Resampling
from restore.images.tint import apply_tint, estimate_tint
from restore.memory import Plan, Planner
from restore.method import Method
from restore.metrics.single import psnr, ssim
from restore.restoration import Restoration, allows_region, check_channels, explain_out_of_memory
from restore.task import Measurement, Task, build_for_photo, measure_photo
from restore.versions import get_version

# The parts of a protocol that make a result another one. The others (threads, batch size, ...) only affect rounding.
OF_THE_PRIOR = ("backbone", "weights", "weak_models", "model_options", "vae_tiling", "precision", "code")
_DECISIVE = (*OF_THE_PRIOR, "operator", "noise", "method")


@dataclass(frozen=True)
class Outcome:
    """What happened to one photo. numbers: residual_ratio, nfe, seconds, with `degrade` psnr and ssim. error: why there
    is no result. plan: memory and time of a photo that was only planned. lost: what the photo has and the result's
    format does not hold, see io.list_lost. note: what was seen and decided. caution: how not to read the result."""

    photo: Photo
    skipped: bool = False
    lost: tuple[str, ...] = ()
    note: str = ""
    caution: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    plan: Plan | None = None

    def line(self) -> str:
        if self.plan is not None:
            note = f"{self.photo.source.name}  {self.note}\n" if self.note else ""
            return f"{note}{self.photo.target}  {self.plan.format()}"
        if self.skipped:
            return f"{self.photo.target}  (finished before)"
        shown = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.3f}", "residual_ratio": "residual/noise {:.2f}"}
        shown["seconds"] = "{:.0f} s"
        parts = [text.format(self.numbers[key]) for key, text in shown.items() if self.numbers.get(key) is not None]
        parts += [f"not kept: {', '.join(self.lost)}"] if self.lost else []
        return "  ".join([str(self.photo.target), *parts])


@dataclass(frozen=True)
class Condition:
    """What the photos show, for backbones with classes or a text encoder; see Restorer."""

    label: int | str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None


@dataclass(frozen=True)
class RestoreJob:
    """What is done to every photo of a run.

    samples, seed, batch_size, callback: see Restorer. degrade: the inputs are clean; degrade them first and compare the
    result with them. resampled: restore at another size and resize the result. save_trajectory: draw x0_hat and the
    guidance through time. overwrite: redo finished photos and replace any file. any_precision: a finished result stays
    whatever precision it was computed with, because nobody asked for one and another machine may choose another.
    chooser: chooses restorer, planner and class for each photo, in place of those given.
    planner: estimates memory and time of each photo and keeps the memory within what is free; announce receives an
    Outcome with the plan. force: try a photo that does not fit. dry_run: only plan.
    """

    restorer: Any
    task: Task
    method: MethodChoice = MethodChoice()
    condition: Condition = Condition()
    samples: int = 1
    seed: int = 0
    batch_size: int | str = 1
    degrade: bool = False
    resampled: Resampling | None = None
    save_trajectory: bool = False
    overwrite: bool = False
    any_precision: bool = False
    chooser: PriorChooser | None = None
    planner: Planner | None = None
    announce: Callable[[Outcome], None] | None = None
    force: bool = False
    dry_run: bool = False
    callback: Callable[[dict], None] | None = None

    def run(self, photos: Iterable[Photo]) -> Iterator[Outcome]:
        """Restore one photo after another; each result is complete on disk before the next begins.

        Writes NAME (first sample), NAME-sampleK, NAME-mean and NAME-spread with several samples, NAME-degraded,
        NAME-trajectory.png, NAME-guidance.png (with guidance) and the side-car NAME.json. A photo is skipped as
        finished if its side-car has the same input and settings and the result is readable; another result is an error
        unless `overwrite`. A photo that cannot be restored yields an Outcome with its error, and the next one begins.
        Raises RestoreError before the first photo if a file would be lost (see files.check_outputs), and when nothing
        can be written any more.
        """
        photos = list(photos)
        files.check_outputs(photos, [self.outputs(photo) for photo in photos], self.overwrite)
        sources = {photo.source.resolve() for photo in photos}
        for photo in photos:
            started = time.perf_counter()
            try:
                outcome = self._restore(photo)
                pictures = {} if isinstance(outcome, Outcome) else outcome.encode_pictures(photo, self.degrade)
            except RestoreError as error:
                outcome = Outcome(photo, error=str(error))
            if not isinstance(outcome, Outcome):
                with files.remove_replaced(photo.sidecar, sources):
                    outcome = self._write(photo, outcome, pictures, started)
            yield outcome

    def outputs(self, photo: Photo) -> list[Path]:
        """Return every file that may be written for a photo."""
        return photo.outputs(self.samples, self.degrade, self.save_trajectory)

    def _restore(self, photo: Photo) -> Outcome | _Restored:
        files.check_names(photo, self.outputs(photo))
        io.check_source(photo.source, photo.target)
        task = self.task.for_photo(photo.source, self.degrade)
        record = io.read_image(photo.source)
        # Nothing of the result's size is computed before the plan has said that it fits.
        operator = build_for_photo(record, task, degrade=self.degrade, resampling=self.resampled)
        size = record.size if self.degrade else task.extend(record.size)
        shown = tuple(side - 2 * hidden for side, hidden in zip(size, task.margin, strict=True))
        io.check_size(photo.target, shown)
        whole, size = size, (self.resampled.side, self.resampled.side) if self.resampled else shown
        job, note = self, [task.note]
        if self.chooser is not None:
            chosen = self.chooser.choose(record.pixels, size, blind=not self.degrade)
            given = self.condition.label is not None or self.condition.prompt is not None
            condition = self.condition if given else replace(self.condition, label=chosen.label)
            job = replace(self, restorer=chosen.restorer, planner=chosen.planner, condition=condition, chooser=None)
            note.append(chosen.reason)
        return job._restore_task(photo, task, record, operator, (whole, size, shown), "; ".join(filter(None, note)))

    def _restore_task(
        self, photo: Photo, task: Task, record: io.ImageRecord, operator: Any, sizes: tuple, note: str
    ) -> Outcome | _Restored:
        """Restore a photo by this job's restorer. sizes: of the whole image, of the restored one, of what is shown."""
        (whole, size, shown), degrading = sizes, {"degrade": self.degrade, "resampling": self.resampled}
        method = self.method.resolve(self.restorer, operator, task=task.name, size=size, samples=self.samples)
        protocol = self.restorer.protocol(operator, method)
        settings = self._describe_settings(photo, task, protocol)
        expected = {"sha256": disk.hash_file(photo.source), "settings": settings}
        free, network = ("settings.precision",) * self.any_precision, {"network": protocol["network"]}
        if not self.overwrite and files.is_finished(photo, expected, free, network):
            return Outcome(photo, skipped=True)
        if self.restorer.channels == 1:
            check_channels(1 if record.grey else 3, 1, self.restorer.per_channel)
        singly = 1 if self.restorer.channels == 3 or record.grey else 3
        plan = None if self.planner is None else self._plan(photo, task, whole, method, singly, note)
        if self.dry_run:
            return Outcome(photo, plan=plan, note=note)
        noise = {"image_id": photo.image_id, "seed": self.seed, "grey": self.restorer.channels == 1}
        measured = measure_photo(record, task, **degrading, **noise)
        operator, y, size = measured.operator, measured.y, shown
        trajectory = Trajectory(self.callback) if self.save_trajectory else None
        with nullcontext(self.restorer) if plan is None else self.planner.apply(plan) as restorer:
            batch_size = plan.batch if plan is not None and self.batch_size == AUTO else self.batch_size
            options = {"samples": self.samples, "seed": self.seed, "batch_size": batch_size}
            is_plain = self.restorer.kind == "pixels" and self.resampled is None
            if task.keep_known and is_plain and allows_region(method):
                options["region"] = 1 - operator.mask
            options |= {"image_ids": [photo.image_id], "callback": trajectory or self.callback}
            result = restorer(y, operator, method, **options, **dataclasses.asdict(self.condition))
        samples = self.resampled.reduce(result.samples, size) if self.resampled else result.samples
        colour = y.shape[1] == 1 and samples.shape[2] == 3
        samples = samples.expand(-1, -1, 3, -1, -1)  # those of a prior of grey images have one channel
        known = operator.mask if task.keep_known and self.resampled is None else None
        # Of a photo that was degraded here the colours are those of the truth.
        is_grey = record.grey or y.shape[1] == 1
        tint = None if is_grey or self.degrade else estimate_tint(record.pixels, known)
        if tint is not None:  # a photo without colour gains none
            samples = apply_tint(samples, tint)
        if task.keep_known:
            samples = torch.where(task.build(*record.size).mask > 0.5, record.pixels.to(samples), samples)
        result = dataclasses.replace(result, samples=samples)
        estimate = {} if plan is None else {"estimate": plan.describe()}
        hue = {} if tint is None else {"one_hue": True}
        told = {"note": note} if note else {}
        spread = describe_spread(method, result.nfe) if self.samples > 1 else None
        told |= {} if spread is None else {"spread": spread}
        return _Restored(measured, result, trajectory, expected | estimate | hue | told, colour)

    def _describe_settings(self, photo: Photo, task: Task, protocol: dict[str, Any]) -> dict[str, Any]:
        condition = dataclasses.asdict(self.condition)
        if condition["label"] is None:  # side-cars from before there were labels stay valid
            del condition["label"]
        return {key: protocol[key] for key in _DECISIVE if key in protocol} | {
            "task": task.describe(),
            "degrade": self.degrade,
            "image_id": photo.image_id,
            "samples": self.samples,
            "seed": self.seed,
            **condition,
            "reference": self.method.reference,
            "resampled": None if self.resampled is None else dataclasses.asdict(self.resampled),
            "trajectory": self.save_trajectory,
        }

    def _plan(self, photo: Photo, task: Task, size: tuple[int, int], method: Method, singly: int, note: str) -> Plan:
        options = {"samples": self.samples, "batch_size": self.batch_size, "resampled": self.resampled}
        options["singly"] = singly
        with explain_out_of_memory():
            plan = self.planner.plan(task, size, method, **options)
        if self.announce is not None:
            self.announce(Outcome(photo, plan=plan, note=note))
        if not (plan.fits or self.force or self.dry_run):
            raise RestoreError(plan.explain_refusal(photo.source.name))
        return plan

    def _write(self, photo: Photo, restored: _Restored, pictures: dict[Path, bytes], started: float) -> Outcome:
        outputs, lost = [path.name for path in self.outputs(photo)], restored.list_lost(photo)
        if restored.trajectory is not None and not restored.trajectory.guided:
            outputs.remove(photo.companion(SIGNALS, ".png").name)
        sidecar = {"version": get_version(), "finished": False, "input": photo.source.name, "files": outputs}
        sidecar |= restored.facts | ({"not_kept": lost} if lost else {})
        with photo.remove_on_failure(self.samples, self.degrade, self.save_trajectory):
            # The side-car comes first: if this process is killed, it marks the files as this program's, to be redone.
            disk.write_json(photo.sidecar, sidecar)
            for path, content in pictures.items():
                disk.write_bytes(path, content)
            numbers = restored.measure(photo) | {"seconds": time.perf_counter() - started}
            protocol = restored.result.protocol
            written = {path.name: disk.hash_file(path) for path in pictures}
            done = {"finished": True, "written": written, "protocol": protocol}
            disk.write_json(photo.sidecar, sidecar | done | numbers)
        caution = restored.facts.get("spread", {}).get("caution", "")
        return Outcome(photo, numbers=numbers, lost=tuple(lost), caution=caution)


@dataclass
class _Restored:
    """A restored photo that is not written yet. facts: of its side-car. colour: it gained colour, by colorization."""

    measured: Measurement
    result: Restoration
    trajectory: Trajectory | None
    facts: dict[str, Any]
    colour: bool

    def list_lost(self, photo: Photo) -> list[str]:
        return io.list_lost(photo.target, self.measured.record, self.colour)

    def measure(self, photo: Photo) -> dict[str, Any]:
        """Return the numbers of the result; psnr and ssim are those of the written file."""
        result, clean = self.result, self.measured.clean
        ratio = result.residual_ratio
        numbers = {"residual_ratio": None if ratio is None else float(ratio[0, 0])}
        numbers |= {"residual": float(result.residual[0, 0]), "nfe": result.nfe}
        if clean is not None:
            written, clean = io.read_image(photo.target).pixels, clean.expand(-1, 3, -1, -1)
            numbers["psnr"] = float(psnr(written, clean))
            if min(clean.shape[-2:]) >= 11:  # SSIM's window
                numbers["ssim"] = float(ssim(written, clean))
        return {key: value if value is None or math.isfinite(value) else None for key, value in numbers.items()}

    def encode_pictures(self, photo: Photo, degrade: bool) -> dict[Path, bytes]:
        """Return the files of all pictures, the result last."""
        result, record, y, trajectory = self.result, self.measured.record, self.measured.y, self.trajectory
        samples, pictures = result.samples.shape[1], {}

        def encode(path: Path, image: torch.Tensor, **options: Any) -> None:
            pictures[path] = io.encode_image(path, image, **options)

        like = {"like": record, "colour": self.colour}
        if degrade:
            encode(photo.companion(DEGRADED), y[0].expand(3, -1, -1), like=record, exact=True)
        if samples > 1:
            for k in range(1, samples):
                encode(photo.companion(f"-sample{k}"), result.samples[0, k], **like)
            encode(photo.companion(MEAN), result.mean[0], **like)
            # A fixed scale, white for a spread of 0.5 on [-1, 1], so that maps can be compared.
            encode(photo.companion(SPREAD, ".png"), (4 * result.spread[0].mean(0, True) - 1).expand(3, -1, -1))
        if trajectory is not None and trajectory.times:
            guidance = result.protocol["method"]["guidance"] or ()
            encode(photo.companion(TRAJECTORY, ".png"), io.to_tensor(trajectory.estimates(guidance))[0])
            if trajectory.guided:
                encode(photo.companion(SIGNALS, ".png"), io.to_tensor(trajectory.guidance(guidance))[0])
        encode(photo.target, result.samples[0, 0], **like)
        return pictures


def degrade_files(photos: Iterable[Photo], task: Task, *, seed: int = 0, overwrite: bool = False) -> Iterator[Outcome]:
    """Write y = A(x) + n of every input, clamped and rounded to its format's depth, as exactly as the format can.

    A photo whose degraded version exists already, to the byte, is skipped; any other file is an error unless
    `overwrite`. A photo that cannot be degraded yields an Outcome with its error.
    """
    photos = list(photos)
    files.check_outputs(photos, [[photo.target] for photo in photos], overwrite=True)
    for photo in photos:
        try:
            files.check_names(photo, [photo.target])
            io.check_source(photo.source, photo.target)
            one = task.for_photo(photo.source, degrade=True)
            measured = measure_photo(photo.source, one, image_id=photo.image_id, degrade=True, seed=seed)
            y, record = measured.y[0].expand(3, -1, -1), measured.record
            content = io.encode_image(photo.target, y, like=record, exact=True)
            same = photo.target.exists() and photo.target.read_bytes() == content
            if photo.target.exists() and not same and not overwrite:
                raise RestoreError(f"{photo.target} exists already and is another picture: overwrite=True replaces it")
        except RestoreError as error:
            yield Outcome(photo, error=str(error))
            continue
        if not same:
            disk.write_bytes(photo.target, content)
        yield Outcome(photo, lost=tuple(io.list_lost(photo.target, record)))
