"""Restoring, degrading and generating on files: what the command line does, as functions."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

import operators
from operators import RestoreError
from restore import disk
from restore import guidance as guidances
from restore.app import files
from restore.app.files import DEGRADED, MEAN, SIGNALS, SPREAD, TRAJECTORY, Photo
from restore.app.trajectory import Trajectory
from restore.guidance import Guidance
from restore.guidance.layers import Strength
from restore.images import io
from restore.images.resampling import Resampling
from restore.images.tint import apply_tint, estimate_tint
from restore.memory import Plan, Planner
from restore.metrics.single import psnr, ssim
from restore.restoration import explain_out_of_memory
from restore.task import Task, measure_photo
from restore.versions import get_version

# Of a Restorer's protocol: what makes a result another one. The rest (threads, batch size, ...) concerns rounding.
_DECISIVE = ("backbone", "weights", "precision", "operator", "noise", "method")


@dataclass(frozen=True)
class Outcome:
    """What happened to one photo. numbers: residual_ratio, nfe, seconds, with `degrade` psnr and ssim; error: the
    sentence why there is no result; plan: what it would take, of a photo that was only planned."""

    photo: Photo
    skipped: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    plan: Plan | None = None

    def line(self) -> str:
        if self.plan is not None:
            return f"{self.photo.target}  {self.plan.format()}"
        if self.skipped:
            return f"{self.photo.target}  (finished before)"
        shown = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.3f}", "residual_ratio": "residual/noise {:.2f}"}
        shown["seconds"] = "{:.0f} s"
        parts = [text.format(self.numbers[key]) for key, text in shown.items() if self.numbers.get(key) is not None]
        return "  ".join([str(self.photo.target), *parts])


@dataclass(frozen=True)
class ChangedPAG:
    """The preset's guidance with these values of PAG in place of its own; None keeps the preset's."""

    scale: float | None = None
    layers: str | Sequence[str] | None = None
    target: str | Mapping[str, Any] | None = None
    strength: Strength | None = None

    def applied(self, preset: Guidance | None, layers: Sequence[str]) -> Guidance | None:
        """layers: PAG's where the preset has no PAG. Other terms of the preset stay. RestoreError: see PAG."""
        changes = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        terms = guidances.describe_guidance(preset) or []
        ours = [term["pag"] for term in terms if "pag" in term]
        if len(ours) > 1:
            raise RestoreError("the preset has several PAG terms: say all of them by guidance=")
        if not ours and self.scale is None:
            raise RestoreError(f"{next(iter(changes))}= needs pag_scale=: the preset uses no PAG")
        if ours:
            ours[0].update(changes)
        else:
            terms.insert(0, {"pag": {"layers": list(layers), **changes}})
        return guidances.build_guidance(terms)


def restore_files(
    photos: Iterable[Photo],
    restorer: Any,
    task: Task,
    *,
    parameters: dict[str, Any] | None = None,
    degrade: bool = False,
    sampler: str | Callable | None = None,
    quality: str | None = None,
    guidance: Guidance | ChangedPAG | None | str = "preset",
    steps: int | str | None = None,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 1,
    label: int | str | None = None,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    data: str | None = None,
    reference: bool = False,
    resampled: Resampling | None = None,
    overwrite: bool = False,
    save_trajectory: bool = False,
    callback: Callable[[dict], None] | None = None,
    planner: Planner | None = None,
    announce: Callable[[Outcome], None] | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Iterator[Outcome]:
    """Restore one file after the other; each result is complete on the disk before the next begins.

    degrade: the inputs are clean; they are degraded first and the result is compared with them. resampled: restore at
    another size and bring the result back. The other arguments are those of `Restorer`.
    planner: estimates memory and time of each photo before it is restored, and keeps it within the memory there is;
    announce: is given the plan; force: go on where it does not fit; dry_run: plan only, nothing is written.
    Writes NAME (first sample), NAME-sampleK, NAME-mean and NAME-spread with several samples, NAME-degraded,
    NAME-trajectory.png, NAME-guidance.png (where there is guidance) and the side-car NAME.json. A photo counts as
    finished, and is skipped, when its side-car says the same input and settings and the result is readable; another
    result is an error unless `overwrite`.
    A photo that cannot be restored yields an Outcome with its error and the next one begins. Raises RestoreError
    before the first where a file would be lost (see files.check_outputs), and where nothing can be written any more.
    """
    photos = list(photos)
    files.check_outputs(photos, [photo.outputs(samples, degrade, save_trajectory) for photo in photos], overwrite)
    every = task
    for photo in photos:
        started, trajectory = time.perf_counter(), Trajectory(callback) if save_trajectory else None
        try:
            task = every.for_photo(photo.source, degrade)
            noise = {"image_id": photo.image_id, "seed": seed}
            measurement = measure_photo(photo.source, task, degrade=degrade, resampling=resampled, **noise)
            record, clean, operator, y = vars(measurement).values()
            options = {"task": task.name, "sampler": sampler, "quality": quality, "data": data}
            chosen, asked = guidance, {**options, "steps": steps, "reference": reference, "parameters": parameters}
            asked |= {"samples": samples, "size": operators.image_shape(operator, y)[-2:]}
            if isinstance(guidance, ChangedPAG):
                chosen = guidance.applied(restorer.method(operator, **asked).guidance, restorer.default_layers())
            method = restorer.method(operator, **asked, guidance=chosen)
            protocol = restorer.protocol(operator, method)
            settings = {key: protocol[key] for key in _DECISIVE} | {
                "task": task.describe(),
                "degrade": degrade,
                "image_id": photo.image_id,
                "samples": samples,
                "seed": seed,
                **({} if label is None else {"label": label}),  # as before, where there is none
                "prompt": prompt,
                "negative_prompt": negative_prompt,
                "reference": reference,
                "resampled": None if resampled is None else dataclasses.asdict(resampled),
                "trajectory": save_trajectory,
            }
            expected = {"sha256": disk.hash_file(photo.source), "settings": settings}
            if not overwrite and files.is_finished(photo, expected):
                yield Outcome(photo, skipped=True)
                continue
            plan = None
            if planner is not None:
                shape = tuple(side * (1 if degrade else task.factor) for side in record.size)
                counts = {"samples": samples, "batch_size": batch_size, "resampled": resampled}
                with explain_out_of_memory():
                    plan = planner.plan(task, shape, method, **counts)
                if announce is not None:
                    announce(Outcome(photo, plan=plan))
                if not plan.fits and not force and not dry_run:
                    raise RestoreError(plan.explain_refusal(photo.source.name))
            if dry_run:
                yield Outcome(photo, plan=plan)
                continue
            with nullcontext(restorer) if plan is None else planner.apply(plan) as chosen_restorer:
                result = chosen_restorer(
                    y,
                    operator,
                    **options,
                    guidance=chosen,
                    steps=steps,
                    samples=samples,
                    seed=seed,
                    image_ids=[photo.image_id],
                    batch_size=batch_size,
                    label=label,
                    prompt=prompt,
                    negative_prompt=negative_prompt,
                    reference=reference,
                    callback=trajectory or callback,
                    **(parameters or {}),
                )
        except RestoreError as error:
            yield Outcome(photo, error=str(error))
            continue
        if resampled:
            factor = 1 if degrade else task.factor
            own = tuple(side * factor for side in record.size)
            result = dataclasses.replace(result, samples=resampled.reduce(result.samples, own))
        tint = None if record.grey or y.shape[1] == 1 else estimate_tint(record.pixels)
        if tint is not None:  # what has no colour gains none
            result = dataclasses.replace(result, samples=apply_tint(result.samples, tint))
        numbers = _numbers(result, clean)
        written = [path.name for path in photo.outputs(samples, degrade, save_trajectory)]
        if trajectory is not None and not trajectory.guided:
            written.remove(photo.companion(SIGNALS, ".png").name)
        sidecar = {
            "version": get_version(),
            "finished": False,
            "input": photo.source.name,
            "files": written,
            **expected,
            **({} if plan is None else {"estimate": plan.describe()}),
            **({} if tint is None else {"one_hue": True}),
        }
        with photo.remove_on_failure(samples, degrade, save_trajectory):
            # The side-car comes first: what a kill leaves is known as this program's and made again.
            disk.write_json(photo.sidecar, sidecar)
            _write_pictures(photo, record, result, y, degrade, trajectory)
            numbers["seconds"] = time.perf_counter() - started
            disk.write_json(photo.sidecar, sidecar | {"finished": True, "protocol": result.protocol, **numbers})
        yield Outcome(photo, numbers=numbers)


def _numbers(result: Any, clean: torch.Tensor | None) -> dict[str, Any]:
    numbers = {
        "residual_ratio": None if result.residual_ratio is None else float(result.residual_ratio[0, 0]),
        "residual": float(result.residual[0, 0]),
        "nfe": result.nfe,
    }
    if clean is not None:
        numbers["psnr"] = float(psnr(result.samples[:, 0], clean))
        if min(clean.shape[-2:]) >= 11:  # SSIM's window
            numbers["ssim"] = float(ssim(result.samples[:, 0], clean))
    return {key: value if value is None or math.isfinite(value) else None for key, value in numbers.items()}


def _write_pictures(
    photo: Photo,
    record: io.ImageRecord,
    result: Any,
    y: torch.Tensor,
    degrade: bool,
    trajectory: Trajectory | None,
) -> None:
    """All pictures of one photo, the result last."""
    samples = result.samples.shape[1]
    like = {"like": record, "colour": y.shape[1] == 1}  # a grey photo keeps what colour was the task to find
    if degrade:
        io.write_image(photo.companion(DEGRADED), y[0].expand(3, -1, -1), like=record)
    if samples > 1:
        for k in range(1, samples):
            io.write_image(photo.companion(f"-sample{k}"), result.samples[0, k], **like)
        io.write_image(photo.companion(MEAN), result.mean[0], **like)
        # Spread in units of the pixel range, white = 0.5: a fixed scale, so that maps can be compared.
        io.write_image(photo.companion(SPREAD, ".png"), (4 * result.spread[0].mean(0, True) - 1).expand(3, -1, -1))
    if trajectory is not None and trajectory.steps:
        pictures = {TRAJECTORY: trajectory.estimates()}
        if trajectory.guided:
            pictures[SIGNALS] = trajectory.guidance(result.protocol["method"]["guidance"])
        for ending, picture in pictures.items():
            io.write_image(photo.companion(ending, ".png"), io.to_tensor(picture)[0])
    io.write_image(photo.target, result.samples[0, 0], **like)


def degrade_files(photos: Iterable[Photo], task: Task, *, seed: int = 0, overwrite: bool = False) -> Iterator[Outcome]:
    """Write y = A(x) + n of every input, clamped and rounded to its format's depth.

    A photo whose degraded version is there already, to the byte, is skipped; a file that is anything else is an error
    unless `overwrite`. Errors of one photo are in its Outcome, as for `restore_files`.
    """
    photos = list(photos)
    files.check_outputs(photos, [[photo.target] for photo in photos], overwrite=True)
    for photo in photos:
        try:
            one = task.for_photo(photo.source, True)
            measurement = measure_photo(photo.source, one, image_id=photo.image_id, degrade=True, seed=seed)
            record, y = measurement.record, measurement.y
            content = io.encode_image(photo.target, y[0].expand(3, -1, -1), like=record)
            there = photo.target.exists() and photo.target.read_bytes() == content
            if photo.target.exists() and not there and not overwrite:
                raise RestoreError(
                    f"{photo.target} is there already and is another picture: overwrite=True replaces it"
                )
        except RestoreError as error:
            yield Outcome(photo, error=str(error))
            continue
        if not there:
            disk.write_bytes(photo.target, content)
        yield Outcome(photo)
