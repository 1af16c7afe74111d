"""The known checkpoints: one YAML file each in configs/model/, read into plain records."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from operators import RestoreError
from operators.naming import check_known, suggest
from restore.paths import configs_dir, data_dir

KINDS = ("adm", "latent", "stable-diffusion", "sd3", "flux", "dit", "autoencoder")

# The kind by how the class of a pipeline, its transformer or a network alone begins.
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
    """One file of weights: its name, the addresses to try in order, and what is known of its content.

    size in bytes and sha256 are None where the publisher states neither and nobody could check: the
    values seen at the first download are then recorded beside the file and verified ever after.
    """

    file: str
    urls: tuple[str, ...]
    size: int | None = None
    sha256: str | None = None
    by_hand: str | None = None


@dataclass(frozen=True)
class Hub:
    """A model folder on the Hugging Face hub; `files` are the patterns of the files needed."""

    repo: str
    revision: str = "main"
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class PublishedGuidance:
    """Published settings of Perturbed-Attention Guidance for this network, and where they are from."""

    layers: tuple[str, ...]
    scale: float
    source: str


@dataclass(frozen=True)
class Model:
    """An entry of the registry. Exactly one of `folder` (shipped, below data/), `download`, `hub` is set.

    kind: one of KINDS. resolution: pixels per side it was trained at.
    subject: what its training pictures show, a plural; narrow: and nothing else.
    options: keyword arguments of the loader that cannot be read off the weights. notes: what a user should know.
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
    guidance: PublishedGuidance | None = None
    citation: str | None = None
    notes: str | None = None
    subject: str | None = None
    narrow: bool = False

    @property
    def class_conditional(self) -> bool:
        return self.classes is not None

    @property
    def loading(self) -> dict[str, Any]:
        """Keyword arguments of the loader."""
        return {**(self.options or {}), **({"resolution": self.resolution} if self.kind == "adm" else {})}


def read_registry(folder: Path | None = None) -> dict[str, Model]:
    """All registered models by name, sorted; from `folder` instead of the shipped configs/model if given.

    Raises RestoreError for a YAML file with an unknown, missing or misplaced key.
    """
    return {path.stem: _read(path) for path in sorted((folder or configs_dir() / "model").glob("*.yaml"))}


def find_model(name: str, folder: Path | None = None) -> Model:
    """The entry called `name`; RestoreError with the nearest name when there is none."""
    known = read_registry(folder)
    if name not in known:
        raise RestoreError(f"There is no model called {name!r}; {suggest(name, known)}")
    return known[name]


def _read(path: Path) -> Model:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise RestoreError(f"{path} is not a readable YAML file: {error}") from error
    except Exception as error:  # the YAML parser's own errors share no base with OmegaConf's
        if type(error).__module__.split(".")[0] != "yaml":
            raise
        raise RestoreError(f"{path} is not a readable YAML file: {error}") from error
    nested = {"download": Download, "hub": Hub, "guidance": PublishedGuidance}
    if not isinstance(content, dict):
        raise RestoreError(f"{path} must hold the keys of a model, not a {type(content).__name__}.")
    values = {"name": path.stem} | content
    for key, record in nested.items():
        if values.get(key) is not None:
            values[key] = _record(record, values[key], path, f"{key}.")
    entry = _record(Model, values, path, "")
    check_known([entry.kind], KINDS, f"{path}: unknown kind")
    if entry.name != path.stem:
        raise RestoreError(f"{path}: the name {entry.name!r} must be the file's.")
    if sum(source is not None for source in (entry.folder, entry.download, entry.hub)) != 1:
        raise RestoreError(f"{path}: set exactly one of folder, download and hub.")
    sha256 = entry.download.sha256 if entry.download else None
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise RestoreError(f"{path}: download.sha256 must be 64 hexadecimal digits.")
    return entry


def _record(record: type, values: Any, path: Path, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise RestoreError(f"{path}: {prefix.rstrip('.')} must hold keys, not a {type(values).__name__}.")
    known = [prefix + item.name for item in fields(record)]
    check_known([f"{prefix}{key}" for key in values], known, f"{path}: unknown key")
    try:
        return record(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except TypeError as error:
        missing = re.findall("'(\\w+)'", str(error))
        raise RestoreError(f"{path}: {', '.join(prefix + key for key in missing)} is missing.") from error


def detect_kind(content: Mapping[str, Any]) -> str | None:
    """The kind of model that a diffusers model_index.json or config.json describes; None for what is not known."""
    if "unet" in content:
        latent = any(part in content for part in ("vqvae", "vae"))
        return ("latent" if latent else "adm") if "UNet2DModel" in str(content["unet"]) else "stable-diffusion"
    names = [str(content.get("_class_name")), str((content.get("transformer") or ["", ""])[1])]
    # DiT comes last: its transformer had a general name when the published folders were written.
    return next((kind for part, kind in CLASSES.items() if any(name.startswith(part) for name in names)), None)


def find_shipped_folder(entry: Model) -> Path:
    """The folder of a model that comes with the package; RestoreError when it is not there."""
    folder = data_dir() / str(entry.folder)
    if not folder.is_dir():
        raise RestoreError(
            f"The model {entry.name} should be in {folder}, which is missing: install the package again."
        )
    return folder
