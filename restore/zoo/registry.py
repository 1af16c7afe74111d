"""The registry of known checkpoints: one YAML file each in configs/model/, read into plain records."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from operators import RestoreError
from operators.naming import check_known, suggest
from restore.config import read_yaml
from restore.paths import configs_dir

KINDS = ("adm", "latent", "stable-diffusion", "sd3", "flux", "dit", "autoencoder", "metric", "pipeline")

# The kind by the beginning of the class name of a network or a pipeline. DiT comes last: in published folders its
# transformer has a general name.
CLASSES = {
    "UNet2DModel": "adm",
    "Autoencoder": "autoencoder",
    "VQModel": "autoencoder",
    "SD3Transformer": "sd3",
    "FluxTransformer": "flux",
    "DiT": "dit",
}


@dataclass(frozen=True)
class Download:
    """A weight file: its name, the addresses to try in order, size in bytes and SHA-256 or its first digits.

    size and sha256 are None if the publisher states neither: the values of the first download are then recorded beside
    the file and verified from then on. names: other names under which the file is published.
    """

    file: str
    urls: tuple[str, ...]
    size: int | None = None
    sha256: str | None = None
    by_hand: str | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hub:
    """A model folder on the Hugging Face hub; `files` are the patterns of the files needed."""

    repo: str
    revision: str = "main"
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A registered model. Exactly one of `folder` (shipped, below data/), `download` and `hub` is set.

    kind: one of KINDS. resolution: pixels per side it was trained at. subject: what its training images show, in the
    plural; narrow: whether it knows only that. options: keyword arguments of the loader that the weights do not tell.
    notes: what a user should know. verified: whether this package was run with the real weights. precision: what
    `restore run` and the page compute with if nobody says; "auto" where bf16 was measured to restore as well.
    """

    name: str
    kind: str
    title: str
    page: str
    licence: str
    resolution: int
    folder: str | None = None
    download: Download | None = None
    hub: Hub | None = None
    parameters: int | None = None
    classes: int | None = None
    options: Mapping[str, Any] | None = None
    citation: str | None = None
    notes: str | None = None
    subject: str | None = None
    narrow: bool = False
    verified: bool = False
    precision: str = "fp32"

    @property
    def loading(self) -> dict[str, Any]:
        """Keyword arguments of the loader."""
        return {**(self.options or {}), **({"resolution": self.resolution} if self.kind == "adm" else {})}


def read_registry(folder: Path | None = None) -> dict[str, Model]:
    """Return all registered models by name, sorted; from `folder` instead of configs/model if given.

    Raises RestoreError for unreadable YAML and for unknown, missing and misplaced keys.
    """
    paths = sorted((folder or configs_dir() / "model").glob("*.yaml"))
    return {path.stem: _read_model(path, path.stat().st_mtime_ns) for path in paths}


def find_model(name: str) -> Model:
    """Return the registered model `name`. Raises RestoreError, with the nearest name, if there is none."""
    known = read_registry()
    if name not in known:
        raise RestoreError(f"unknown model {name!r}; {suggest(name, known)}")
    return known[name]


def detect_kind(content: Mapping[str, Any]) -> str | None:
    """Return the kind of the model that a diffusers model_index.json or config.json describes, None if unknown."""
    if "unet" in content:
        latent = any(part in content for part in ("vqvae", "vae"))
        return ("latent" if latent else "adm") if "UNet2DModel" in str(content["unet"]) else "stable-diffusion"
    names = [str(content.get("_class_name")), str((content.get("transformer") or ["", ""])[1])]
    return next((kind for part, kind in CLASSES.items() if any(name.startswith(part) for name in names)), None)


@functools.cache
def _read_model(path: Path, modified: int) -> Model:
    """Return what a file holds, which is read again only if it was modified."""
    content = read_yaml(path, "model")
    if not isinstance(content, dict):
        raise RestoreError(f"{path} must hold the keys of a model, got a {type(content).__name__}")
    values = {"name": path.stem} | content
    for key, record in {"download": Download, "hub": Hub}.items():
        if values.get(key) is not None:
            values[key] = _build_record(record, values[key], path, f"{key}.")
    entry = _build_record(Model, values, path, "")
    check_known([entry.kind], KINDS, f"{path}: unknown kind")
    if entry.name != path.stem:
        raise RestoreError(f"{path}: name must be {path.stem!r}, the file's, got {entry.name!r}")
    if sum(source is not None for source in (entry.folder, entry.download, entry.hub)) != 1:
        raise RestoreError(f"{path}: exactly one of folder, download and hub must be set")
    sha256 = entry.download.sha256 if entry.download else None
    if sha256 is not None and not re.fullmatch("[0-9a-f]{8,64}", str(sha256)):
        raise RestoreError(f"{path}: download.sha256 must be 8 to 64 hexadecimal digits in quotes, got {sha256!r}")
    return entry


def _build_record(record: type, values: Any, path: Path, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise RestoreError(f"{path}: {prefix.rstrip('.')} must hold keys, got a {type(values).__name__}")
    known = [prefix + item.name for item in fields(record)]
    check_known([f"{prefix}{key}" for key in values], known, f"{path}: unknown key")
    try:
        return record(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except TypeError as error:
        missing = re.findall("'(\\w+)'", str(error))
        raise RestoreError(f"{path}: {', '.join(prefix + key for key in missing)} is missing") from error
