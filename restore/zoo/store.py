"""The cache of weights on this machine: locate, download, import. Imports no torch."""

from __future__ import annotations

import os
import re
import shutil
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import filelock

from operators import RestoreError
from operators.naming import suggest
from restore import disk
from restore.paths import data_dir
from restore.zoo import download, registry
from restore.zoo.hub import PIPELINE_FILES, fetch_pipeline, fetch_snapshot, query_hub_size
from restore.zoo.registry import Hub, Model

_CONFIGURATION_FILES = ("model_index.json", "*/config.json")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHT_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class Located:
    """Where a model is and how to load it.

    kind: one of registry.KINDS. path: the weight file or model folder, None if it is not on this machine. hub: the hub
    folder it comes from. options: keyword arguments of the loader. entry: its registry entry, None for a user's own.
    """

    name: str
    kind: str
    path: Path | None
    hub: Hub | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    entry: Model | None = None


def cache_dir() -> Path:
    """Return the folder of downloaded weights: $RESTORE_CACHE, else `restore` in $XDG_CACHE_HOME or ~/.cache.

    Hub models are in the Hugging Face cache ($HF_HOME) instead, shared with other programs.
    """
    folder = os.environ.get("RESTORE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "restore"
    return Path(folder).expanduser()


def is_offline(offline: bool | None = None) -> bool:
    """Return `offline` if given, else whether $RESTORE_OFFLINE or $HF_HUB_OFFLINE is 1, true or yes."""
    values = (os.environ.get(name, "") for name in ("RESTORE_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value.lower() in ("1", "true", "yes") for value in values) if offline is None else offline


def locate(name_or_path: str | Path) -> Located:
    """Find a registered name, a model folder, a weight file or a hub id `owner/name`, without the network.

    A registered name wins over a file of that name (write ./name for the file). A folder is a diffusers pipeline
    (model_index.json), of pixels ("adm") or latents ("latent") if its network is a UNet2DModel, or a single network or
    autoencoder (config.json). Files with tensors named `model.diffusion_model.` are latent diffusion, without
    conditioning ("latent") or with it (Stable Diffusion); other weight files are ADM. The kind of a hub id that is not
    in the cache is a guess. Raises RestoreError for anything else, with the nearest registered name.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    known = registry.read_registry()
    if name in known:
        entry = known[name]
        return Located(name, entry.kind, _find_present(entry), _pin(entry), entry.loading, entry)
    if path.is_dir():
        return Located(name, _detect_folder_kind(path), path)
    if path.is_file():
        return Located(name, _detect_file_kind(path), path)
    parts, is_weights = name.split("/"), path.suffix in _WEIGHT_SUFFIXES
    if len(parts) == 2 and all(parts) and not is_weights and name[0] not in "./~":
        hub = Hub(name, files=PIPELINE_FILES)
        folder = fetch_pipeline(hub, offline=True)
        return Located(name, "stable-diffusion" if folder is None else _detect_folder_kind(folder), folder, hub)
    if is_weights or len(parts) > 1:
        raise RestoreError(f"there is no file or folder {name}")
    raise RestoreError(f"there is no model, file or folder {name!r}; {suggest(name, known)}")


def pull(
    name: str,
    offline: bool | None = None,
    verify: bool = True,
    progress: download.Progress | None = None,
    variant: str | None = None,
) -> Path:
    """Make a registered model or hub id available on this machine and return its file or folder.

    A file in the cache is kept if its SHA-256 is right (verify=False: unchecked) and fetched again otherwise; a cut
    download is resumed, and processes that pull the same model download it once. If the registry has no checksum, the
    network is built from the file, and its checksum is recorded: a file replaced by its publisher is then refused like
    a corrupted one (see `forget_checksum`). offline=True (default: see `is_offline`) never uses the network.
    progress(bytes so far, bytes in all or None): called during the download of a file; the hub client shows bars.
    variant: of a hub id's weight files, such as "fp16". Raises RestoreError if the model cannot be fetched, with the
    file, its publisher and where to put it.
    """
    found, offline = locate(name), is_offline(offline)
    if found.hub is not None:
        if found.entry is None:
            folder = fetch_pipeline(found.hub, offline, variant)
        elif (folder := fetch_snapshot(found.hub, offline)) is not None:
            _record_commit(found.entry, folder)
        if folder is None:
            raise RestoreError(
                f"{found.name} is not on this machine and the run is offline: fetch {found.hub.repo} once online with "
                f"`restore models pull {found.name}`, or give the path of a folder you have"
            )
        return folder
    if found.entry is None or found.entry.download is None:
        return found.path
    return _pull_file(found.entry, offline, verify, progress)


def pull_configuration(name: str, offline: bool | None = None) -> Path:
    """Return the folder or file of a model; of a hub model that is not here, its configuration files alone.

    Raises RestoreError as `pull` does.
    """
    found = locate(name)
    if found.path is not None or found.hub is None or is_offline(offline):
        return found.path or pull(name, offline)
    return fetch_snapshot(Hub(found.hub.repo, found.hub.revision, _CONFIGURATION_FILES), offline=False)


def import_file(name: str, path: str | Path) -> Path:
    """Verify a weight file fetched by hand, copy it into the cache as the registered model `name`, return the copy.

    Its checks and records are those of `pull`. Raises RestoreError, and leaves the cache unchanged, if the file is
    unreadable, truncated, different or another kind of model, if the model is not a single file, or the disk is full.
    """
    entry, path = registry.find_model(name), Path(path).expanduser()
    if entry.download is None:
        raise RestoreError(f"{name} is not a single file; give its folder as the backbone instead of importing it")
    if not path.is_file():
        raise RestoreError(f"there is no file {path}")
    target = _cache_path(entry)
    with _lock(target):
        digest = _verify(entry, path, str(path))
        if not (target.exists() and target.samefile(path)):
            with path.open("rb") as source, disk.open_atomic(target) as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        _write_record(entry, digest, f"imported from {path.name}")
    return target


def forget_checksum(name: str) -> None:
    """Remove the checksum, or the hub's commit, recorded when the registered model `name` was first seen, to accept
    another one.

    The weights stay in the cache until they are replaced. Raises RestoreError if nothing is recorded.
    """
    entry = registry.find_model(name)
    record = None if entry.folder is not None else _record_path(entry)
    if record is None or not record.exists():
        raise RestoreError(f"no checksum or commit of {name} is recorded on this machine: nothing to forget")
    record.unlink()


def explain_download(entry: Model) -> str:
    """Return how to get the file of a registered model without this program's downloader; "" if it is not a file."""
    if entry.download is None:
        return ""
    how = entry.download.by_hand or f"Fetch it with a browser from {entry.download.urls[0]}"
    return f"{how.rstrip('.')}, then run `restore models import {entry.name} FILE` (or put it at {_cache_path(entry)})."


def query_size(found: Located, offline: bool | None = None) -> int | None:
    """Return the bytes that a registered model's or hub model's download has, as registered or as its server states;
    None if unknown."""
    if found.hub is not None:
        return None if is_offline(offline) else query_hub_size(found.hub)
    if found.entry is None or found.entry.download is None:
        return None
    known = find_expected(found.entry)[0]
    return known if known or is_offline(offline) else download.query_size(found.entry.download.urls)


def _pull_file(entry: Model, offline: bool, verify: bool, progress: download.Progress | None) -> Path:
    target = _cache_path(entry)
    if not target.exists() and offline:
        raise RestoreError(f"{entry.name}: {target} is missing and the run is offline. {explain_download(entry)}")
    with _lock(target):
        if target.exists():
            try:
                digest = _verify(entry, target, str(target)) if verify else None
                if digest and _read_record(entry) is None:  # put there by hand
                    _write_record(entry, digest, "found in the cache")
                return target
            except RestoreError as error:
                if offline:
                    raise RestoreError(f"{error}. The run is offline. {explain_download(entry)}") from error
        first_time = _read_record(entry) is None
        size, advice = find_expected(entry)[0], explain_download(entry)
        check = partial(_verify, entry, name=target.name)
        digest = download.fetch_file(entry.download.urls, target, size, check, advice, progress)
        if first_time:
            _write_record(entry, digest, "downloaded")
    return target


def _verify(entry: Model, path: Path, name: str) -> str:
    """Return the SHA-256 of a weight file after all checks, by its name in messages. Raises RestoreError."""
    try:
        digest = download.verify_file(path, *find_expected(entry), name)
    except RestoreError as error:
        if entry.download.sha256 or _read_record(entry) is None:
            raise
        advice = f"the checksum is that of the first file seen here; `restore models forget {entry.name}` removes it"
        raise RestoreError(f"{error}; {advice}") from error
    if (
        find_expected(entry)[1] is None
    ):  # no checksum is known: build the network, so that no web page is kept as weights
        from restore.backbones import adm, latent, pipeline_files

        if entry.kind in ("adm", "latent"):
            (adm.ADM if entry.kind == "adm" else latent.LatentDiffusion).load(path, **entry.loading)
        else:
            pipeline_files.require_checkpoint(path)
    return digest


def find_expected(entry: Model) -> tuple[int | None, str | None]:
    """Return size and SHA-256 from the registry, else from the first time the file was seen here."""
    first = _read_record(entry) or {}
    return entry.download.size or first.get("size"), entry.download.sha256 or first.get("sha256")


def _cache_path(entry: Model) -> Path:
    return cache_dir() / entry.name / entry.download.file


def _record_path(entry: Model) -> Path:
    return cache_dir() / entry.name / "commit.json" if entry.hub is not None else Path(f"{_cache_path(entry)}.json")


def _pin(entry: Model) -> Hub | None:
    """Return the hub folder of an entry at the commit of its first download, unless the registry names one itself."""
    record = None if entry.hub is None or _COMMIT.fullmatch(entry.hub.revision) else _read_record(entry)
    return replace(entry.hub, revision=record["commit"]) if record else entry.hub


def _record_commit(entry: Model, folder: Path) -> None:
    if _COMMIT.fullmatch(folder.name) and not _COMMIT.fullmatch(entry.hub.revision) and _read_record(entry) is None:
        disk.make_folder(_record_path(entry).parent)
        disk.write_json(_record_path(entry), {"repo": entry.hub.repo, "commit": folder.name, "how": "first download"})


def _read_record(entry: Model) -> dict[str, Any] | None:
    path = _record_path(entry)
    record = disk.read_json(path)
    if record is None and path.exists():
        raise RestoreError(f"{path} is damaged; delete it and pull the model again")
    return record


def _write_record(entry: Model, sha256: str, how: str) -> None:
    source = "registry" if entry.download.sha256 else "first use"
    size = _cache_path(entry).stat().st_size
    disk.write_json(_record_path(entry), {"sha256": sha256, "size": size, "checksum_from": source, "how": how})


def _lock(target: Path) -> filelock.BaseFileLock:
    """Lock this file of the cache against other processes; the system releases it if the process is killed."""
    try:
        disk.make_folder(target.parent)
    except RestoreError as error:
        raise RestoreError(f"{error}: set RESTORE_CACHE=FOLDER") from error
    return filelock.FileLock(str(target) + ".lock")


def _find_present(entry: Model) -> Path | None:
    if entry.folder is not None:
        folder = data_dir() / entry.folder
        if not folder.is_dir():
            raise RestoreError(f"the model {entry.name} must be in {folder}, but is not; install the package again")
        return folder
    if entry.hub is not None:
        return fetch_snapshot(_pin(entry), offline=True)
    return _cache_path(entry) if _cache_path(entry).is_file() else None


def _detect_folder_kind(folder: Path) -> str:
    for name in ("model_index.json", "config.json"):
        if (folder / name).is_file():
            try:
                kind = registry.detect_kind(disk.read_json(folder / name, required=True))
            except (RestoreError, AttributeError, IndexError, KeyError) as error:
                raise RestoreError(f"{folder / name} is not a model configuration: {error}") from error
            if kind is not None or name == "model_index.json":
                return kind or "stable-diffusion"  # whose loader explains what else it is
    raise RestoreError(
        f"{folder} must be a model folder, with model_index.json or the config.json of a UNet2DModel or autoencoder"
    )


def _detect_file_kind(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in _WEIGHT_SUFFIXES:
        raise RestoreError(f"a weight file must end in {' '.join(_WEIGHT_SUFFIXES)}, got {path}")
    if problem := download.find_damage(path):
        raise RestoreError(f"{path} {problem}")
    names = read_tensor_names(path)
    if any(name in names for name in (b"conditioner.", b"text_encoders.", b"joint_blocks.", b"double_blocks.")):
        raise RestoreError(f"{path} must be a folder of a pipeline to be read, as a model of SDXL, SD3 or FLUX")
    if b"model.diffusion_model." in names:
        return "latent" if b"first_stage_model." in names and b"cond_stage_model." not in names else "stable-diffusion"
    return "stable-diffusion" if suffix == ".ckpt" and b"time_embed.0.weight" not in names else "adm"


def read_tensor_names(path: Path) -> bytes:
    """Return the part of a weight file that holds the names of its tensors, unparsed; b"" if there is none."""
    if zipfile.is_zipfile(path):  # torch.save
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return archive.read(inside[0]) if inside else b""
    if path.suffix.lower() != ".safetensors":
        return b""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length)
