"""A task: an operator's configuration, looked up by name, built for an image's size, and measured."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import operators
from operators import RestoreError, validate
from operators.naming import AUTO, suggest
from restore.backbones.ambient import neutral_state
from restore.config import read_yaml
from restore.disk import hash_file
from restore.images import io, masks
from restore.images.compression import read_compression
from restore.images.estimate import SMALLEST, estimate_noise
from restore.images.findings import inspect_photo
from restore.images.masks import Mask
from restore.images.resampling import Resampling, resize_image, stretch_range
from restore.paths import configs_dir
from restore.repair import choose_repair, read_auto
from restore.samplers.noise import measurement_generator

ROUNDING = 1 / (127.5 * 12**0.5)  # standard deviation on [-1, 1] of the rounding to 8 bits
BLURS = ("gaussian_blur", "motion_blur", "blur", "compose")
ESTIMATED = {"name": "gaussian", "sigma": AUTO}  # noise whose level is estimated from the photo
# Operators' names in place of a task's, as earlier versions and other packages have them.
ALIASES = {
    "inpainting": "inpaint",
    "inpainting_mask": "inpaint",
    "inpainting_box": "inpaint-box",
    "inpainting_random": "inpaint-random",
    "gaussian_blur": "gaussian-blur",
    "motion_blur": "motion-blur",
    "denoising": "denoise",
    "colorization": "colorize",
    "clipping": "hdr",
    "phase_retrieval": "phase-retrieval",
    "nonlinear_blur": "nonlinear-blur",
    "jpeg_rounding": "jpeg-rounding",
}


@dataclass(frozen=True)
class Task:
    """What is restored. name: of configs/task, for presets. config: as operators.build_operator takes it; its mask may
    be a Mask file that is not read yet. blind: nobody said how noisy the photos are, so each is measured. keep_known:
    the pixels that a mask leaves are those of the photo, noise and all. note: what was seen in a photo, in words.
    compression: of JPEG in the photo, as `read_compression` returns it, where its file does not say it."""

    name: str
    config: dict[str, Any]
    blind: bool = False
    keep_known: bool = False
    note: str = ""
    compression: dict[str, Any] | None = None

    @property
    def factor(self) -> int:
        """How many times larger than the photo its restoration is."""
        return operators.read_extent(self.config)[0]

    @property
    def margin(self) -> tuple[int, int]:
        """Rows and columns at each side of the restored image that are not shown: beyond an unknown border."""
        return operators.read_extent(self.config)[1]

    def extend(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size (H, W) of the image that is restored from a photo of this size, with its margin."""
        factor, margin = operators.read_extent(self.config)
        return tuple(factor * side + 2 * more for side, more in zip(size, margin, strict=True))

    def build(self, height: int, width: int) -> Any:
        """Return the operator for an image of this size, margin included. Raises RestoreError if a mask file does not
        fit it."""
        config = dict(self.config)
        if isinstance(config.get("mask"), Mask):
            config["mask"] = config["mask"].read((height, width))
        return operators.build_operator(config, image_size=(height, width))

    def for_photo(self, photo: Path, degrade: bool = False) -> Task:
        """Return the task with this photo's own mask and, if they are "auto" or nothing was said, its estimated mask
        and noise level. A blind task keeps the noise of its file below `estimate.SMALLEST` pixels and with `degrade`.

        A photo that is not to be degraded was cut from the world: the border of a blur is unknown, unless it is given.

        Raises RestoreError for "auto" with a photo that is to be degraded first.
        """
        if self.config["name"] == AUTO:
            found = inspect_photo(photo, self.config["sensitivity"], self.compression)
            repair = choose_repair(found, self.config["sigma"])
            config = operators.forget_border(repair.config)
            return Task(self.name, config, keep_known=repair.keep_known, note=repair.describe())
        config, mask = dict(self.config), self.config.get("mask")
        is_estimated = config.get("noise") == ESTIMATED
        if degrade and (is_estimated or (isinstance(mask, Mask) and mask.sensitivity is not None)):
            raise RestoreError("mask=auto and sigma=auto look at a damaged photo; this one is to be degraded first")
        if isinstance(mask, Mask):
            config["mask"] = mask.for_photo(photo)
        config = _read_quality(config, photo, degrade, self.compression)
        if not degrade:
            config = operators.forget_border(config)
        blind = self.blind and not degrade
        pixels = io.read_image(photo).pixels if is_estimated or blind else None
        if is_estimated or (blind and min(pixels.shape[-2:]) >= SMALLEST):
            mask = config.get("mask")
            known = mask.read(tuple(pixels.shape[-2:])) if isinstance(mask, Mask) else None
            sigma = estimate_noise(pixels, known)
            if config["name"] in BLURS:  # an inverse that believes every digit has nothing but ringing
                sigma = max(sigma, ROUNDING)
            sigma = float(f"{sigma:.3g}")
            config["noise"] = {"name": "gaussian", "sigma": sigma} if sigma else None
        return Task(self.name, config, keep_known=blind and config["name"] == "inpainting_mask")

    def describe(self) -> dict[str, Any]:
        """Return the configuration for JSON, with files and arrays as hashes of their content."""
        kept = {"keep_known": True} if self.keep_known else {}
        return {"task": self.name, **{key: _describe(value) for key, value in self.config.items()}, **kept}


def read_task(name: str) -> dict[str, Any]:
    """Return the operator's mapping of a shipped task (configs/task), or of a YAML file or text between braces.

    Raises RestoreError for an unknown task and unreadable YAML.
    """
    files = {path.stem: path for path in sorted((configs_dir() / "task").glob("*.yaml"))}
    name = ALIASES.get(name, name)
    factor = None
    if name.startswith("sr") and name[2:].isdecimal() and name not in files:
        name, factor = "sr4", int(name[2:])
    if name not in files and not _is_yaml(name):
        raise RestoreError(f"unknown task '{name}'; {suggest(name, [*files, 'srN'])} (or a YAML file)")
    config = read_yaml(files.get(name, name), "task")
    if not isinstance(config, dict) or "name" not in config:
        raise RestoreError(f"task {name} must name its operator, got no 'name'; try {{name: gaussian_blur}}")
    return config if factor is None else config | {"factor": factor}


def load_task(
    task: str,
    settings: dict[str, Any] | None = None,
    *,
    mask: Path | None = None,
    kernel: Path | None = None,
    invert_mask: bool = False,
    mask_threshold: int | None = None,
    blind: bool = False,
) -> Task:
    """Return a task with the `settings` that its operator knows, which are removed from the dictionary.

    task: a file of configs/task; sr2, sr3, ... for other factors; a YAML file, or its text between braces;
        "module:attribute", a user's operator; "auto": what is found in each photo (restore.repair).
    mask, kernel: files that replace the task's own. A mask may be a folder of masks with the photos' names, or "auto":
        proposed from each photo (restore.images.damage), with the setting `sensitivity`.
    invert_mask, mask_threshold: see restore.images.masks.read_mask.
    settings: the operator's options, and `sigma`, the noise's standard deviation on [-1, 1]; "auto" estimates it from
        each photo (restore.images.estimate).
    blind: what a shipped task says of the noise is for photos that are to be degraded; in others it is measured, unless
        `settings` say it, and the known pixels of an inpainting are kept as they are.
    Raises RestoreError for an unknown task and files that do not fit it.
    """
    settings = {} if settings is None else settings
    task = ALIASES.get(task, task)
    if task == AUTO:
        return Task(AUTO, read_auto(settings, blind, mask=mask, kernel=kernel))
    blind = blind and "sigma" not in settings and ":" not in task and not _is_yaml(task)
    if task == "inpaint" and mask is None:
        config = read_task("inpaint-box")
    elif ":" in task and not _is_yaml(task):
        config = {"name": task}
    else:
        config = read_task(task)
    if _is_yaml(task):
        task = str(config["name"]) if "{" in task else Path(task).stem
    if mask is not None:
        config = _use_mask(config, task, Mask(Path(mask), invert_mask, mask_threshold), settings)
    elif invert_mask or mask_threshold is not None:
        raise RestoreError("invert_mask= and mask_threshold= need mask=FILE")
    if kernel is not None:
        if str(config["name"]).replace("-", "_") not in ("blur", "gaussian_blur", "motion_blur"):
            raise RestoreError(f"kernel={kernel} does not apply to task {task}; it belongs to blur")
        kept = {key: value for key, value in config.items() if key in ("noise", "border", "image_size", "adjoint")}
        config = kept | {"name": "blur", "kernel": masks.read_kernel(kernel)}
    elif config["name"] == "blur" and "kernel" not in config:
        raise RestoreError("task blur needs kernel=FILE")
    if "sigma" in settings:
        sigma = settings.pop("sigma")
        config["noise"] = {"name": "gaussian", "sigma": sigma} if sigma else None
    for key in [key for key in settings if key in operators.operator_options(config["name"])]:
        config[key] = settings.pop(key)
    if config.get("noise") != ESTIMATED:
        operators.build_noise(config.get("noise"))
    return Task(task, config, blind)


def _read_quality(config: dict[str, Any], photo: Path, degrade: bool, known: dict[str, Any] | None) -> dict[str, Any]:
    """The configuration with what is known, or the photo's file says, of its JPEG compression for quality=auto."""
    if config["name"] == "compose":
        parts = [_read_quality(part, photo, degrade, known) for part in operators.read_parts(config)]
        return {**config, "operators": parts}
    if config["name"] != "jpeg" or config.get("quality") != AUTO:
        return config
    found = None if degrade else known or read_compression(photo)
    if found is None:
        reason = "this one is to be degraded first" if degrade else f"{Path(photo).name} is none that says it"
        raise RestoreError(f"quality=auto is read from a JPEG file, but {reason}; try quality=40")
    loss = operators.JPEGNoise(**found).estimate_loss(io.read_image(photo).pixels)
    return {key: value for key, value in config.items() if key != "quality"} | found | {"loss": float(f"{loss:.3g}")}


def _use_mask(config: dict[str, Any], task: str, mask: Mask, settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an inpainting task with a mask file."""
    if not str(config["name"]).startswith("inpainting"):
        raise RestoreError(f"mask={mask.path} does not apply to task {task}; it belongs to inpaint")
    if str(mask.path) == AUTO:
        if mask.invert or mask.threshold is not None:
            raise RestoreError("invert_mask= and mask_threshold= are for a mask from a file, not for mask=auto")
        sensitivity = validate.require_number(settings.pop("sensitivity", 0.5), "sensitivity", low=0.0, high=1.0)
        mask = replace(mask, sensitivity=sensitivity)
    elif not mask.path.is_dir():
        mask.read()
    kept = {key: value for key, value in config.items() if key in ("noise", "adjoint")}
    return kept | {"name": "inpainting_mask", "mask": mask}


@dataclass(frozen=True)
class Measurement:
    """A photo as it is restored. record: the file's picture. clean: (1, C, H, W), the truth of a degraded photo as far
    as y shows it, else None. y: measurement (1, ...) of `operator`."""

    record: io.ImageRecord
    clean: torch.Tensor | None
    operator: Any
    y: torch.Tensor


def build_for_photo(
    record: io.ImageRecord, task: Task, *, degrade: bool = False, resampling: Resampling | None = None
) -> Any:
    """Return the operator of `measure_photo`, without computing anything of the picture's size.

    Raises RestoreError if the task needs a mask that is not given.
    """
    if degrade:
        if resampling is None:
            return task.build(*record.size)
        resampling.check_square(record.size, record.path.name)
        if any(task.margin):
            raise RestoreError("border must be 'reflect' or 'circular' for solve_at= with degrade=True, got 'unknown'")
        if isinstance(task.config.get("mask"), Mask):
            mask = resize_image(task.config["mask"].read(record.size), resampling.side, method="nearest")
            task = Task(task.name, task.config | {"mask": mask})
        return task.build(resampling.side, resampling.side)
    if task.config["name"] in ("inpainting_box", "inpainting_random"):
        raise RestoreError(
            f"{record.path.name}: inpainting a damaged photo needs mask=FILE (white: known pixels); "
            "with degrade=True the task cuts its own hole into a clean photo"
        )
    if task.config["name"] == "phase_retrieval":
        raise RestoreError(f"{record.path.name}: phase retrieval needs magnitudes, got a photo; try degrade=True")
    size = tuple(task.factor * side for side in record.size)
    operator = task.build(*task.extend(record.size))
    return resampling.adapt_operator(operator, size, record.path.name) if resampling else operator


@neutral_state("cpu")
def measure_photo(
    photo: Path | io.ImageRecord,
    task: Task,
    *,
    image_id: str,
    degrade: bool = False,
    seed: int = 0,
    resampling: Resampling | None = None,
    grey: bool = False,
) -> Measurement:
    """Return a photo, read or to be read, as a measurement: degraded by the task with `degrade`, else as it is.

    image_id, seed: of the measurement's noise. resampling: restore at another size. grey: measure a grey photo in one
        channel, for a prior of grey images.
    Raises RestoreError if the photo cannot be read or the task needs a mask that is not given.
    """
    record = photo if isinstance(photo, io.ImageRecord) else io.read_image(photo)
    adapted = build_for_photo(record, task, degrade=degrade, resampling=resampling)
    pixels = record.pixels[:, :1] if grey and record.grey else record.pixels
    if degrade:
        clean = stretch_range(pixels) if resampling and resampling.stretch else pixels
        x = resampling.enlarge(clean, record.path.name) if resampling else clean
        y = degrade_image(adapted, x, record.grey, measurement_generator(seed, image_id))
        return Measurement(record, operators.cut_margin(adapted, clean), adapted, y)
    size = task.extend(record.size)
    operator = task.build(*size) if resampling else adapted
    with torch.no_grad():
        channels = operator.A(torch.zeros(1, pixels.shape[1], *size, dtype=torch.float32)).shape[1]
        y = io.to_tensor(pixels, channels=1) if channels == 1 else pixels
        last = (task.config.get("operators") or [task.config])[-1]
        if last["name"] == "inpainting_mask":
            mask = last["mask"].read(record.size) if isinstance(last["mask"], Mask) else last["mask"]
            y = y * mask.to(y)
    return Measurement(record, None, adapted, y)


def degrade_image(operator: Any, x: torch.Tensor, grey: bool, generator: torch.Generator) -> torch.Tensor:
    """Return the measurement of a picture x (1, 3, H, W).

    grey: the picture has one channel, three times; so has its noise then, or the grey file that is written of it would
    show the mean of three noises, which is weaker.
    """
    noise = operators.find_noise(operator)
    if not grey or noise is None:
        return operator(x, generator)
    y = operator.A(x)
    if y.ndim != 4 or not torch.allclose(y, y[:, :1].expand_as(y), atol=1e-5):  # an operator of colours
        return noise(y, generator)
    return noise(y[:, :1], generator).expand_as(y).contiguous()


def _is_yaml(task: str) -> bool:
    return task.lower().endswith((".yaml", ".yml")) or task.lstrip().startswith("{")


def _describe(value: Any) -> Any:
    if isinstance(value, Mask):
        options = {"invert": value.invert or None, "threshold": value.threshold, "sensitivity": value.sensitivity}
        given = {key: option for key, option in options.items() if option is not None}
        return {"file": value.path.name, "sha256": hash_file(value.path), **given}
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().numpy().tobytes()
        return {"shape": list(value.shape), "sha256": hashlib.sha256(content).hexdigest()}
    if isinstance(value, dict):
        return {key: _describe(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_describe(item) for item in value]
    return value if isinstance(value, (type(None), bool, int, float, str)) else repr(value)
