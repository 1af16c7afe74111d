"""The cache of weights on this machine: pull into it, import into it, find things in it. Imports no torch."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from operators import RestoreError
from operators.naming import suggest
from restore import disk
from restore.zoo import download, registry
from restore.zoo.registry import Hub, Model

# Of a hub pipeline outside the registry: no second copies in other precisions and formats.
_PIPELINE_FILES = ("*.json", "*.txt", "*model.safetensors")
_WEIGHT_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class Located:
    """Where a model is and how to load it.

    kind: one of registry.KINDS. path: the weight file or the model folder; None when it is not on
    this machine yet. hub: the hub folder it would come from. options: keyword arguments of the loader.
    entry: its registry entry, None for the user's own file or folder.
    """

    name: str
    kind: str
    path: Path | None
    hub: Hub | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    entry: Model | None = None


def cache_dir() -> Path:
    """The folder of downloaded weights: $RESTORE_CACHE, else `restore` in $XDG_CACHE_HOME or ~/.cache.

    Hub models are not in it but in the Hugging Face cache ($HF_HOME), shared with other programs.
    """
    chosen = os.environ.get("RESTORE_CACHE")
    return Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "restore").expanduser()


def is_offline(offline: bool | None = None) -> bool:
    """`offline` if given, else whether $RESTORE_OFFLINE or $HF_HUB_OFFLINE is set to 1, true or yes."""
    if offline is not None:
        return offline
    return any(
        os.environ.get(name, "").lower() in ("1", "true", "yes") for name in ("RESTORE_OFFLINE", "HF_HUB_OFFLINE")
    )


def locate(name_or_path: str | Path) -> Located:
    """Resolve a registered name, a model folder, a weight file or a hub id `owner/name`, without the network.

    A registered name wins over a file of that name (write ./name for the file). A folder is a diffusers
    pipeline (model_index.json), of pixels ("adm") or latents ("latent") where its network is a UNet2DModel, or such a
    network or an autoencoder alone (config.json); of a hub id that is not here yet the kind is a guess; files with a
    `model.diffusion_model.` prefix are latent-diffusion, without conditioning ("latent") or with (Stable Diffusion),
    other .pt, .pth and .safetensors files ADM.
    Raises RestoreError for anything else, with the nearest registered names.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    known = registry.read_registry()
    if name in known:
        entry = known[name]
        return Located(name, entry.kind, _present(entry), entry.hub, entry.loading, entry)
    if path.is_dir():
        return Located(name, _kind_of_folder(path), path)
    if path.is_file():
        return Located(name, _kind_of_file(path), path)
    owner_and_name = name.split("/")
    if (
        len(owner_and_name) == 2
        and all(owner_and_name)
        and path.suffix not in _WEIGHT_SUFFIXES
        and name[0] not in "./~"
    ):
        hub = Hub(name, files=_PIPELINE_FILES)
        folder = _snapshot(hub, offline=True)
        return Located(name, "stable-diffusion" if folder is None else _kind_of_folder(folder), folder, hub)
    if path.suffix in _WEIGHT_SUFFIXES or len(owner_and_name) > 1:
        raise RestoreError(f"There is no file or folder {name}.")
    raise RestoreError(f"There is no model, file or folder called {name!r}; {suggest(name, known)}")


def pull(
    name: str, offline: bool | None = None, verify: bool = True, progress: download.Progress | None = None
) -> Path:
    """Make a registered model or hub id available on this machine and return its file or folder.

    What is there already is kept (after checking its SHA-256 unless verify=False; a damaged file is
    fetched again); a cut download continues where it stopped. Two processes pulling the same model
    download it once. Where the registry knows no checksum, the network is built from the file once; its
    checksum is then recorded beside it and verified from then on, so that a file whose publisher replaced it
    is refused like a corrupted one (see `forget_checksum`). offline=True (default: $RESTORE_OFFLINE) never uses the
    network. progress(bytes_so_far, bytes_in_all_or_None) is called while downloading a single file; for hub
    models the hub client shows its own bars.
    Raises RestoreError when the model is not there and cannot be fetched, naming the file, where it is
    published and where to put it.
    """
    found = locate(name)
    offline = is_offline(offline)
    if found.hub is not None:
        folder = _snapshot(found.hub, offline)
        if folder is None:
            raise RestoreError(
                f"{found.name} is not on this machine and the run is offline: fetch {found.hub.repo} once online with "
                f"`restore models pull {found.name}`, or pass the path of a folder you have."
            )
        return folder
    if found.entry is None or found.entry.download is None:
        if found.path is None:
            raise RestoreError(f"The model {name} should come with the package but is missing: install it again.")
        return found.path
    return _pull_file(found.entry, offline, verify, progress)


def import_file(name: str, path: str | Path) -> Path:
    """Verify a weight file fetched by hand and copy it into the cache as the registered model `name`.

    Size and SHA-256 are compared with the registry's or, if it has none, with those recorded at an
    earlier download; the first time they are recorded, once the network has been built from the file.
    Returns the file in the cache. Raises RestoreError for an unreadable, truncated or different file (saying
    expected and actual), one that is not this kind of model, a model that is no single file, and a full
    disk; the cache is unchanged then.
    """
    entry, path = registry.find_model(name), Path(path).expanduser()
    if entry.download is None:
        raise RestoreError(
            f"{name} is not a single file: give its folder itself as the backbone, there is nothing to import."
        )
    if not path.is_file():
        raise RestoreError(f"There is no file {path}.")
    target = _target(entry)
    with _locked(target):
        digest = _check(entry, path)
        if not (target.exists() and target.samefile(path)):
            with path.open("rb") as source, disk.open_atomic(target) as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        _record(entry, digest, f"imported from {path.name}")
    return target


def forget_checksum(name: str) -> None:
    """Drop the checksum recorded when the file of the registered model `name` was first seen.

    For a file that is rightly another one than before; the weights in the cache stay until one replaces them.
    Raises RestoreError when none is recorded.
    """
    entry = registry.find_model(name)
    record = _record_path(_target(entry)) if entry.download is not None else None
    if record is None or not record.exists():
        raise RestoreError(f"No checksum of {name} is recorded on this machine; there is nothing to forget.")
    record.unlink()


def explain_download(entry: Model) -> str:
    """How to get a registered single-file model without this program's downloader."""
    if entry.download is None:
        return ""
    how = entry.download.by_hand or f"Fetch it with a browser from {entry.download.urls[0]}"
    return f"{how.rstrip('.')}, then run `restore models import {entry.name} FILE` (or put it at {_target(entry)})."


def _pull_file(entry: Model, offline: bool, verify: bool, progress: download.Progress | None) -> Path:
    target, source = _target(entry), entry.download
    if not target.exists() and offline:
        raise RestoreError(
            f"{entry.name} needs {target}, which is missing, and the run is offline. {explain_download(entry)}"
        )
    with _locked(target):
        if target.exists():
            try:
                digest = _check(entry, target) if verify else None
                if digest and _recorded(target) is None:  # put there by hand
                    _record(entry, digest, "found in the cache")
                return target
            except RestoreError as error:
                if offline:
                    raise RestoreError(f"{error} The run is offline. {explain_download(entry)}") from error
        first_time = _recorded(target) is None
        help = explain_download(entry) + _first_use(entry)
        digest = download.fetch_file(
            source.urls, target, *_expected(entry), help, progress, accept=lambda part: _require_model(entry, part)
        )
        if first_time:
            _record(entry, digest, "downloaded")
    return target


def _check(entry: Model, path: Path) -> str:
    """The SHA-256 of `path` after everything that can be asked of it; RestoreError otherwise."""
    try:
        digest = download.verify_file(path, *_expected(entry), str(path))
    except RestoreError as error:
        raise RestoreError(f"{error}{_first_use(entry)}") from error
    _require_model(entry, path)
    return digest


def _require_model(entry: Model, path: Path) -> None:
    """Build the network from a file whose checksum nobody knows yet: no photo or web page is kept as weights."""
    if _expected(entry)[1] is not None:
        return
    if entry.kind == "adm":
        from restore.backbones.adm import ADM

        ADM.load(path, **entry.loading)
    elif entry.kind == "latent":
        from restore.backbones.latent import LatentDiffusion

        LatentDiffusion.load(path, **entry.loading)
    else:
        from restore.backbones.stable_diffusion_files import require_checkpoint

        require_checkpoint(path)


def _first_use(entry: Model) -> str:
    if entry.download.sha256 or _recorded(_target(entry)) is None:
        return ""
    return f" The checksum is that of the first file seen here; `restore models forget {entry.name}` drops it."


def _target(entry: Model) -> Path:
    return cache_dir() / entry.name / entry.download.file


def _present(entry: Model) -> Path | None:
    if entry.folder is not None:
        return registry.find_shipped_folder(entry)
    if entry.hub is not None:
        return _snapshot(entry.hub, offline=True)
    target = _target(entry)
    return target if target.is_file() else None


def _expected(entry: Model) -> tuple[int | None, str | None]:
    """Size and SHA-256 from the registry, else from the first time the file was seen here."""
    first = _recorded(_target(entry)) or {}
    return entry.download.size or first.get("size"), entry.download.sha256 or first.get("sha256")


def _recorded(target: Path) -> dict[str, Any] | None:
    path = _record_path(target)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RestoreError(f"{path} is damaged ({error}): delete it and pull the model again.") from error


def _record_path(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _record(entry: Model, sha256: str, how: str) -> None:
    target = _target(entry)
    known = "registry" if entry.download.sha256 else "first use"
    content = {"sha256": sha256, "size": target.stat().st_size, "checksum_from": known, "how": how}
    disk.write_json(_record_path(target), content)


def _locked(target: Path) -> filelock.BaseFileLock:
    """Holds off every other process on this file of the cache; released by the system if we are killed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RestoreError(
            f"cannot create the cache folder {target.parent}: {disk.describe_os_error(error)}; set RESTORE_CACHE to "
            "another one"
        ) from error
    return filelock.FileLock(str(target) + ".lock")


def _snapshot(hub: Hub, offline: bool) -> Path | None:
    """The folder of a hub model in the Hugging Face cache; None when offline and not (completely) there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            hub.repo, revision=hub.revision, allow_patterns=list(hub.files) or None, local_files_only=offline
        )
    except LocalEntryNotFoundError as error:
        if offline:
            return None
        raise RestoreError(
            f"{hub.repo} could not be fetched from the hub and is not in the cache ({error})."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise RestoreError(f"{hub.repo} could not be fetched from the hub: {error}") from error
    missing = [name for name in hub.files if "*" not in name and not (Path(folder) / name).is_file()]
    if missing and not offline:
        raise RestoreError(f"{hub.repo} on the hub has no {', '.join(missing)}.")
    return None if missing else Path(folder)


def _kind_of_folder(folder: Path) -> str:
    for name in ("model_index.json", "config.json"):
        if (folder / name).is_file():
            try:
                content = json.loads((folder / name).read_text(encoding="utf-8"))
                kind = registry.detect_kind(content)
            except (OSError, ValueError, AttributeError) as error:
                raise RestoreError(f"{folder / name} is not a model configuration: {error}") from error
            if kind is not None or name == "model_index.json":
                return kind or "stable-diffusion"  # whose loader says what else it is
    raise RestoreError(
        f"{folder} is no model folder: expected model_index.json (a diffusers pipeline) or the config.json "
        "of a UNet2DModel or an autoencoder."
    )


def _kind_of_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in _WEIGHT_SUFFIXES:
        raise RestoreError(f"{path} is no weight file: expected one ending in {' '.join(_WEIGHT_SUFFIXES)}.")
    if problem := download.find_damage(path):
        raise RestoreError(f"{path} {problem}.")
    names = _names(path)
    if b"model.diffusion_model." in names:
        return "latent" if b"first_stage_model." in names and b"cond_stage_model." not in names else "stable-diffusion"
    return "stable-diffusion" if suffix == ".ckpt" else "adm"


def _names(path: Path) -> bytes:
    """The part of a weight file that holds the names of its tensors, unread; b"" where that is no separate part."""
    if zipfile.is_zipfile(path):  # torch.save
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return archive.read(inside[0]) if inside else b""
    if path.suffix.lower() != ".safetensors":
        return b""
    with path.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        return handle.read(length)
