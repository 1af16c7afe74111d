"""Tasks: an operator's configuration by name, from a file, or for a mask or kernel of the user's; and measurements."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import operators
from operators import RestoreError, validate
from operators.naming import suggest
from restore.app.files import Photo
from restore.disk import hash_file
from restore.images import io, masks
from restore.images.estimate import estimate_noise
from restore.images.masks import Mask
from restore.images.resampling import Resampling
from restore.paths import configs_dir
from restore.samplers.noise import measurement_generator

AUTO = "auto"
ESTIMATED = {"name": "gaussian", "sigma": AUTO}  # until the photo is there


@dataclass(frozen=True)
class Task:
    """What is restored. name: looks presets up. config: for build_operator; its mask may be a file's Mask."""

    name: str
    config: dict[str, Any]

    @property
    def factor(self) -> int:
        """How many times larger than the photo its restoration is."""
        return self.config.get("factor", 1)

    def build(self, height: int, width: int) -> Any:
        """The operator for an image of this size; a mask given as a file is read and checked against it."""
        config = dict(self.config)
        if isinstance(config.get("mask"), Mask):
            config["mask"] = config["mask"].read((height, width))
        return operators.build_operator(config, image_size=(height, width))

    def of(self, photo: Path, degrade: bool = False) -> Task:
        """The task of this photo: its own mask, and what is to be found out from it.

        Raises RestoreError where something of a photo that is to be degraded first would be estimated.
        """
        config, mask = dict(self.config), self.config.get("mask")
        estimated = config.get("noise") == ESTIMATED
        if degrade and (estimated or (isinstance(mask, Mask) and mask.sensitivity is not None)):
            raise RestoreError("mask=auto and sigma=auto look at a damaged photo; this one is to be degraded first")
        if isinstance(mask, Mask):
            config["mask"] = mask.of(photo)
        if estimated:
            sigma = float(f"{estimate_noise(io.read_image(photo).pixels):.3g}")
            config["noise"] = {"name": "gaussian", "sigma": sigma} if sigma else None
        return Task(self.name, config)

    def describe(self) -> dict[str, Any]:
        """The configuration, ready for JSON: files and arrays by the hash of their content."""
        return {"task": self.name, **{key: _described(value) for key, value in self.config.items()}}


def find_task(
    task: str,
    settings: dict[str, Any] | None = None,
    *,
    mask: Path | None = None,
    kernel: Path | None = None,
    invert_mask: bool = False,
    mask_threshold: int | None = None,
) -> Task:
    """A task with the `settings` that its operator knows, which are taken out of the dictionary.

    task: a file of configs/task; sr2, sr3, ... for other factors; a YAML file of one's own, or its text between
    braces; "module:attribute", an operator of one's own. mask and kernel replace the task's own; a mask may be a folder
    of masks with the photos' names, or "auto": proposed from each photo, see restore.images.damage, with the setting
    `sensitivity`; invert_mask, mask_threshold: see restore.images.masks.read_mask. The setting sigma="auto": estimated
    from each photo, see restore.images.estimate.estimate_noise.
    Raises RestoreError for an unknown task or a file that does not fit it.
    """
    known = {path.stem: path for path in sorted((configs_dir() / "task").glob("*.yaml"))}
    settings = {} if settings is None else settings
    name, factor = task, None
    if task.startswith("sr") and task[2:].isdecimal() and task not in known:
        task, factor = "sr4", int(task[2:])
    if task == "inpaint" and mask is None:
        task = "inpaint-box"
    if task in known or _is_yaml(task):
        config = read_yaml(known.get(task, task), "task")
        name = name if task in known else str(config.get("name")) if "{" in task else Path(task).stem
    elif ":" in task:
        config = {"name": task}
    else:
        raise RestoreError(f"unknown task '{task}'; {suggest(task, [*known, 'srN'])} (or a YAML file)")
    if not isinstance(config, dict) or "name" not in config:
        raise RestoreError(f"task {task} lacks its operator's name, such as {{name: gaussian_blur}}")
    if factor is not None:
        config["factor"] = factor
    kind = str(config["name"])
    if mask is not None:
        if not kind.startswith("inpainting"):
            raise RestoreError(f"mask={mask} does not apply to task {name}; it belongs to inpaint")
        given = Mask(Path(mask), invert_mask, mask_threshold)
        if str(mask) == AUTO:
            if invert_mask or mask_threshold is not None:
                raise RestoreError("invert_mask= and mask_threshold= are for a mask from a file, not for mask=auto")
            sensitivity = validate.require_number(settings.pop("sensitivity", 0.5), "sensitivity", low=0.0, high=1.0)
            given = replace(given, sensitivity=sensitivity)
        config = {"name": "inpainting_mask", "noise": config.get("noise"), "mask": given}
        if given.sensitivity is None and not given.path.is_dir():
            given.read()
    elif invert_mask or mask_threshold is not None:
        raise RestoreError("invert_mask= and mask_threshold= need mask=FILE")
    if kernel is not None:
        if "blur" not in kind:
            raise RestoreError(f"kernel={kernel} does not apply to task {name}; it belongs to blur")
        config = {"name": "blur", "noise": config.get("noise"), "kernel": masks.read_kernel(kernel)}
    elif kind == "blur" and "kernel" not in config:
        raise RestoreError("task blur needs kernel=FILE")
    if "sigma" in settings:  # the noise's standard deviation on [-1, 1]
        sigma = settings.pop("sigma")
        config["noise"] = {"name": "gaussian", "sigma": sigma} if sigma else None
    for key in [key for key in settings if key in operators.operator_options(config["name"])]:
        config[key] = settings.pop(key)
    if config.get("noise") != ESTIMATED:
        operators.build_noise(config.get("noise"))
    return Task(name, config)


def read_yaml(source: str | Path, what: str) -> Any:
    """The mapping or list of a YAML file, or of YAML text between braces or brackets. Raises RestoreError."""
    text = str(source)
    try:
        loaded = OmegaConf.create(text) if text.lstrip()[:1] in ("{", "[") else OmegaConf.load(text)
        return OmegaConf.to_container(loaded, resolve=True)
    except FileNotFoundError:
        raise RestoreError(f"There is no file {text}.") from None
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RestoreError(f"the {what} {text} is not readable YAML: {reason}") from None


def measured(
    photo: Photo, task: Task, degrade: bool, seed: int, resampled: Resampling | None = None
) -> tuple[io.ImageRecord, torch.Tensor | None, Any, torch.Tensor]:
    """(record, clean or None, operator, y): the input is the clean photo with `degrade`, else y itself."""
    record = io.read_image(photo.source)
    height, width = record.size
    if degrade:
        clean = resampled.prepare_truth(record.pixels) if resampled else record.pixels
        x = resampled.enlarge(clean, photo.source.name) if resampled else clean
        if resampled and isinstance(task.config.get("mask"), Mask):
            mask = resampled.enlarge_mask(task.config["mask"].read(record.size))
            task = Task(task.name, task.config | {"mask": mask})
        operator = task.build(*x.shape[-2:])
        return record, clean, operator, operator(x, measurement_generator(seed, photo.image_id))
    if task.config["name"] in ("inpainting_box", "inpainting_random"):
        raise RestoreError(
            f"{photo.source.name}: inpainting a damaged photo needs mask=FILE (white: known pixels); "
            "with degrade=True the task cuts its own hole into a clean photo"
        )
    size = (height * task.factor, width * task.factor)
    operator = task.build(*size)
    with torch.no_grad():
        channels = operator.A(torch.zeros(1, 3, *size)).shape[1]
        y = io.to_tensor(record.pixels, channels=1) if channels == 1 else record.pixels
        if task.config["name"] == "inpainting_mask":
            y = operator.A(y)
    if resampled:
        operator = resampled.adapt_operator(operator, size, photo.source.name)
    return record, None, operator, y


def _is_yaml(task: str) -> bool:
    return task.lower().endswith((".yaml", ".yml")) or task.lstrip().startswith("{")


def _described(value: Any) -> Any:
    if isinstance(value, Mask):
        described = {"file": value.path.name, "sha256": hash_file(value.path)}
        more = {"invert": value.invert or None, "threshold": value.threshold, "sensitivity": value.sensitivity}
        return described | {key: option for key, option in more.items() if option is not None}
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().numpy().tobytes()
        return {"shape": list(value.shape), "sha256": hashlib.sha256(content).hexdigest()}
    return value if isinstance(value, (type(None), bool, int, float, str, list, dict)) else repr(value)
