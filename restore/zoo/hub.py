"""Model folders of the Hugging Face hub, by its own client and in its cache."""

from __future__ import annotations

import re
from pathlib import Path

from operators import RestoreError
from restore import disk
from restore.zoo.registry import Hub

# Files of a pipeline outside the registry: no second copies in other precisions and formats.
_CONFIGURATION, _WEIGHTS = ("*.json", "*.txt", "*spiece.model"), ("*model.safetensors", "*model-*-of-*.safetensors")
PIPELINE_FILES = (*_CONFIGURATION, *_WEIGHTS)
PICKLES = ("*model.bin", "*model-*-of-*.bin")  # where there are no safetensors
UNUSED = ("safety_checker/*",)
_NETWORKS = ("unet", "transformer", "vae")


def list_transport_errors() -> tuple[type[Exception], ...]:
    """Return what the hub's client raises if it cannot fetch: its own errors' bases are those of its transport."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError, ValueError)


def fetch_snapshot(hub: Hub, offline: bool) -> Path | None:
    """Return the folder of a hub model in the Hugging Face cache; None if offline and not complete there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            hub.repo,
            revision=hub.revision,
            allow_patterns=list(hub.files) or None,
            ignore_patterns=list(UNUSED),
            local_files_only=offline,
        )
    except list_transport_errors() as error:
        if offline and isinstance(error, LocalEntryNotFoundError):
            return None
        raise RestoreError(f"{hub.repo} could not be fetched from the hub: {error}") from error
    missing = [name for name in hub.files if "*" not in name and not (Path(folder) / name).is_file()]
    if missing and not offline:
        raise RestoreError(f"{hub.repo} on the hub has no {', '.join(missing)}")
    return None if missing else Path(folder)


def fetch_pipeline(hub: Hub, offline: bool, variant: str | None = None) -> Path | None:
    """Return the folder of a pipeline or network outside the registry, as `fetch_snapshot` does; variant: of the files'
    names, such as "fp16". Pickles, or weights without the variant, are fetched where the hub has no others."""
    own = [name.replace("model", f"model.{variant}") if variant else name for name in _WEIGHTS]
    files = (*_CONFIGURATION, *own)
    folder = fetch_snapshot(Hub(hub.repo, hub.revision, files), offline)
    if folder is not None and not is_whole(folder, variant):
        if offline:
            return None
        folder = fetch_snapshot(Hub(hub.repo, hub.revision, (*files, *_WEIGHTS, *PICKLES)), offline)
    return folder


def is_whole(folder: Path, variant: str | None = None) -> bool:
    """Return whether a folder, which may be what another program or an interrupted one fetched, has the configuration
    and the weights of every network."""
    index = disk.read_json(folder / "model_index.json")
    parts = [""] if index is None else [part for part in _NETWORKS if (index.get(part) or [None])[0] is not None]
    return all((folder / part / "config.json").is_file() and _has_weights(folder / part, variant) for part in parts)


def _has_weights(folder: Path, variant: str | None) -> bool:
    tag = rf"\.{re.escape(variant)}" if variant else ""
    file = re.compile(rf".*model{tag}(?:-\d+-of-(?P<shards>\d+))?\.(?:safetensors|bin)")
    found = [match for path in folder.iterdir() if (match := file.fullmatch(path.name))]
    return any(match["shards"] is None or len(found) >= int(match["shards"]) for match in found)


def query_hub_size(hub: Hub) -> int | None:
    """Return the bytes of the files of a hub folder; None if the hub does not tell."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    try:
        files = HfApi().model_info(hub.repo, revision=hub.revision, files_metadata=True).siblings or []
    except list_transport_errors():
        return None
    kept = filter_repo_objects(files, allow_patterns=list(hub.files) or None, key=lambda file: file.rfilename)
    return sum(file.size or 0 for file in kept) or None
