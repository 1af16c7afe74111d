"""Restoring, degrading and generating on files: what the command line does, as functions."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

import operators
from operators import RestoreError
from restore import atomic, method
from restore.app import files
from restore.guidance import CFG, PAG
from restore.images import grids, io
from restore.images.resampling import Resampled
from restore.paths import configs_dir
from restore.samplers.noise import derive_seed

# Side-cars and pictures written beside a result are named after it with these endings.
SIDECAR, DEGRADED, TRAJECTORY = ".json", "-degraded", "-trajectory"


@dataclass(frozen=True)
class Job:
    """One input file and the file its result goes to. The image id, and so its noise, is the input's stem."""

    source: Path
    target: Path

    @property
    def sidecar(self) -> Path:
        return self.target.with_suffix(SIDECAR)

    def beside(self, ending: str, suffix: str | None = None) -> Path:
        return self.target.with_name(f"{self.target.stem}{ending}{suffix or self.target.suffix}")


@dataclass(frozen=True)
class Outcome:
    """What happened to one file: `numbers` holds residual_ratio, nfe, seconds, with --degrade psnr and ssim."""

    job: Job
    skipped: bool
    numbers: dict[str, Any]

    def line(self) -> str:
        if self.skipped:
            return f"{self.job.target}  (finished before; --overwrite to redo)"
        shown = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.3f}", "residual_ratio": "residual/noise {:.2f}"}
        parts = [text.format(self.numbers[key]) for key, text in shown.items() if self.numbers.get(key) is not None]
        return "  ".join([str(self.job.target), *parts, f"{self.numbers['seconds']:.0f} s"])


def plan(inputs: Sequence[str], out: str | Path, png: bool = False) -> list[Job]:
    """Jobs for files, folders and globs. Raises RestoreError before anything runs: no match, two inputs
    with the same output, an output folder that cannot be written."""
    if not inputs:
        raise RestoreError("no input image given")
    sources = files.expand_inputs(inputs)
    return [Job(*pair) for pair in zip(sources, files.output_paths(sources, out, png=png), strict=True)]


def task_config(task: str, settings: dict[str, Any], *, mask: Path | None = None, kernel: Path | None = None) -> dict:
    """The operator configuration of a task, with `settings` that it knows taken out of the dictionary.

    task: a file of configs/task, or sr2, sr3, ... for other factors. mask and kernel replace the
    task's own. Raises RestoreError for an unknown task or a file that does not fit it.
    """
    folder = configs_dir() / "task"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    name = task
    if task.startswith("sr") and task[2:].isdigit() and task not in known:
        name = "sr4"
    elif task == "inpaint" and mask is None:
        name = "inpaint-box"
    elif task not in known:
        near = difflib.get_close_matches(task, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}, srN"
        raise RestoreError(f"unknown task '{task}'; {hint}")
    config = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"))
    if name == "sr4":
        config["factor"] = int(task[2:])
    if mask is not None:
        if not config["name"].startswith("inpainting"):
            raise RestoreError(f"--mask does not apply to task {task}; it belongs to inpaint")
        config = {"name": "inpainting_mask", "noise": config.get("noise"), "mask": Path(mask)}
    if kernel is not None:
        if "blur" not in config["name"]:
            raise RestoreError(f"--kernel does not apply to task {task}; it belongs to blur")
        config = {"name": "blur", "noise": config.get("noise"), "kernel": io.read_kernel(kernel)}
    elif config["name"] == "blur":
        raise RestoreError("task blur needs --kernel FILE")
    if "sigma" in settings:  # the noise's standard deviation on [-1, 1]
        sigma = settings.pop("sigma")
        config["noise"] = {"name": "gaussian", "sigma": sigma} if sigma else None
    for key in [key for key in settings if key in operators.options(config["name"])]:
        config[key] = settings.pop(key)
    return config


def build_operator(config: dict, height: int, width: int):
    """The operator for an image of this size; a mask given as a file is read and checked against it."""
    config = dict(config)
    if isinstance(config.get("mask"), Path):
        config["mask"] = io.read_mask(config["mask"], (height, width))
    return operators.build(config, image_size=(height, width))


def _measurement(job: Job, config: dict, degrade: bool, seed: int, resampled: Resampled | None = None):
    """(record, clean or None, operator, y): the input is the clean photo with `degrade`, else y itself."""
    record = io.read_image(job.source)
    height, width = record.size
    if degrade:
        clean = resampled.truth(record.pixels) if resampled else record.pixels
        x = resampled.enlarged(clean, job.source.name) if resampled else clean
        if resampled and isinstance(config.get("mask"), Path):
            config = config | {"mask": resampled.enlarged_mask(io.read_mask(config["mask"], record.size))}
        operator = build_operator(config, *x.shape[-2:])
        generator = torch.Generator().manual_seed(derive_seed(seed, job.source.stem, "degrade"))
        return record, clean, operator, operator(x, generator)
    factor = config.get("factor", 1)
    if config["name"] in ("inpainting_box", "inpainting_random"):
        raise RestoreError(
            f"{job.source.name}: inpainting a damaged photo needs --mask FILE (white: known pixels); "
            "with --degrade the task cuts its own hole into a clean photo"
        )
    operator = build_operator(config, height * factor, width * factor)
    y = record.pixels.mean(1, keepdim=True) if config["name"] == "colorization" else record.pixels
    if config["name"] == "inpainting_mask":
        y = operator.A(y)
    if resampled:
        operator = resampled.measuring(operator, (height * factor, width * factor), job.source.name)
    return record, None, operator, y


def restore_files(
    jobs: Iterable[Job],
    restorer,
    config: dict,
    *,
    parameters: dict[str, Any] | None = None,
    degrade: bool = False,
    sampler: str | None = None,
    pag_scale: float | None = None,
    layers: str | None = None,
    steps: int | str | None = None,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 1,
    data: str | None = None,
    reference: bool = False,
    resampled: Resampled | None = None,
    overwrite: bool = False,
    save_trajectory: bool = False,
    callback: Callable[[dict], None] | None = None,
) -> Iterator[Outcome]:
    """Restore one file after the other; each result is complete on the disk before the next begins.

    config: from `task_config`. degrade: the inputs are clean; they are degraded first and the result
    is compared with them. resampled: restore at another size and bring the result back (protocol512).
    The other arguments are those of `Restorer`. Finished files (result and side-car exist) are skipped
    unless `overwrite`. Writes NAME (first sample), NAME-sampleK, NAME-mean and NAME-spread with several
    samples, NAME-degraded, NAME-trajectory.png and the side-car NAME.json.
    Raises RestoreError; files finished before it are kept.
    """
    for job in jobs:
        if job.target.exists() and job.sidecar.exists() and not overwrite:
            yield Outcome(job, True, {})
            continue
        started = time.perf_counter()
        record, clean, operator, y = _measurement(job, config, degrade, seed, resampled)
        guidance = choose_guidance(restorer, operator.name, sampler, pag_scale, layers, data)
        frames: list[torch.Tensor] = []
        result = restorer(
            y,
            operator,
            sampler=sampler,
            guidance=guidance,
            steps=steps,
            samples=samples,
            seed=seed,
            image_ids=[job.source.stem],
            batch_size=batch_size,
            data=data,
            reference=reference,
            callback=_recording(callback, frames if save_trajectory else None),
            **(parameters or {}),
        )
        if resampled:
            factor = 1 if degrade else config.get("factor", 1)
            own = tuple(side * factor for side in record.size)
            result = dataclasses.replace(result, samples=resampled.back(result.samples, own))
            result.protocol["resampled"] = dataclasses.asdict(resampled)
        colour = config["name"] == "colorization"
        numbers = {
            "residual_ratio": None if result.residual_ratio is None else float(result.residual_ratio[0, 0]),
            "residual": float(result.residual[0, 0]),
            "nfe": result.nfe,
        }
        if clean is not None:
            from restore.metrics.single import psnr, ssim

            numbers["psnr"] = float(psnr(result.samples[:, 0], clean))
            if min(clean.shape[-2:]) >= 11:  # SSIM's window
                numbers["ssim"] = float(ssim(result.samples[:, 0], clean))
            shown = y if y.shape[1] == 3 else y.expand(-1, 3, -1, -1)
            io.write_image(job.beside(DEGRADED), shown[0], like=record)
        if samples > 1:
            for k in range(1, samples):
                io.write_image(job.beside(f"-sample{k}"), result.samples[0, k], like=record, colour=colour)
            io.write_image(job.beside("-mean"), result.mean[0], like=record, colour=colour)
            # Spread in units of the pixel range, white = 0.5: a fixed scale, so that maps can be compared.
            io.write_image(job.beside("-spread", ".png"), (4 * result.spread[0].mean(0, True) - 1).expand(3, -1, -1))
        if save_trajectory:
            strip = grids.strip([io.to_pil(x) for x in frames])
            io.write_image(job.beside(TRAJECTORY, ".png"), io.to_tensor(strip)[0])
        io.write_image(job.target, result.samples[0, 0], like=record, colour=colour)
        numbers["seconds"] = time.perf_counter() - started
        sidecar = {
            "version": version(),
            "input": job.source.name,
            "task": {key: value if _plain(value) else repr(value) for key, value in config.items()},
            "degraded_here": degrade,
            "image_id": job.source.stem,
            "protocol": result.protocol,
            **numbers,
        }
        atomic.write_json(job.sidecar, sidecar)
        yield Outcome(job, False, numbers)


def choose_guidance(restorer, task: str, sampler: str | None, pag_scale: float | None, layers: str | None, data=None):
    """The preset's guidance with the scale and layers given on the command line in place of its own."""
    if pag_scale is None and layers is None:
        return "preset"
    preset = method.find(restorer.name, task, sampler or restorer.default_sampler, data)
    pag = dict((preset.guidance or {}).get("pag") or {})
    if pag_scale is not None:
        pag["scale"] = pag_scale
    if layers is not None:
        pag["layers"] = layers
    if not pag.get("layers"):
        pag["layers"] = restorer.default_layers()
    if pag.get("scale") is None:
        raise RestoreError("--layers needs --pag-scale: the preset uses no PAG")
    return PAG(**pag)


def degrade_files(jobs: Iterable[Job], config: dict, *, seed: int = 0, overwrite: bool = False) -> Iterator[Path]:
    """Write y = A(x) + n of every input, clamped and rounded to its format's depth."""
    for job in jobs:
        if overwrite or not job.target.exists():
            record, _, _, y = _measurement(job, config, True, seed)
            io.write_image(job.target, y[0] if y.shape[1] == 3 else y[0].expand(3, -1, -1), like=record)
        yield job.target


def generate_files(
    out: str | Path,
    restorer,
    *,
    n: int,
    pag_scale: float = 0.0,
    layers: str | None = None,
    cfg_scale: float = 0.0,
    labels: Sequence[int] | None = None,
    steps: int | str = 250,
    ddim_eta: float | None = None,
    seed: int = 0,
    batch_size: int = 1,
    callback: Callable[[dict], None] | None = None,
) -> Iterator[Path]:
    """Samples of the prior as sample-0000.png, ... in the folder `out`, each with a side-car."""
    terms = []
    if pag_scale:
        terms.append(PAG(pag_scale, layers=layers or restorer.default_layers()))
    if cfg_scale:
        terms.append(CFG(cfg_scale))
    guidance = sum(terms[1:], terms[0]) if terms else None
    if labels is not None and len(labels) == 1:
        labels = list(labels) * n
    out = Path(out)
    files.writable_folder(out)
    images = restorer.generate(
        n,
        guidance=guidance,
        steps=steps,
        seed=seed,
        labels=labels,
        ddim_eta=ddim_eta,
        batch_size=batch_size,
        callback=callback,
    )
    for i, image in enumerate(images):
        path = out / f"sample-{i:04d}.png"
        io.write_image(path, image)
        protocol = {"version": version(), "backbone": restorer.name, "steps": steps, "ddim_eta": ddim_eta}
        protocol |= {"seed": seed, "index": i, "guidance": None if guidance is None else repr(guidance)}
        atomic.write_json(path.with_suffix(SIDECAR), protocol | {"label": None if labels is None else labels[i]})
        yield path


def version() -> str:
    """Version of the installed package, or "checkout" when it runs uninstalled."""
    try:
        return importlib.metadata.version("restore")
    except importlib.metadata.PackageNotFoundError:
        return "checkout"


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, dict, list))


def _recording(callback, frames: list | None):
    """A callback that also keeps ten x0_hat of the first sample, evenly spread over the steps."""
    if frames is None:
        return callback

    def record(step: dict) -> None:
        every = max(1, step["steps"] // 10)
        if step["first"] == 0 and (step["step"] % every == 0 or step["step"] == step["steps"] - 1):
            frames.append(step["x0_hat"][0].float().cpu())
        if callback is not None:
            callback(step)

    return record
