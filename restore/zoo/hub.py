"""Model folders of the Hugging Face hub, by its own client and in its cache."""

from __future__ import annotations

from pathlib import Path

from operators import RestoreError
from restore.zoo.registry import Hub


def fetch_snapshot(hub: Hub, offline: bool) -> Path | None:
    """Return the folder of a hub model in the Hugging Face cache; None if offline and not complete there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            hub.repo, revision=hub.revision, allow_patterns=list(hub.files) or None, local_files_only=offline
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        if offline and isinstance(error, LocalEntryNotFoundError):
            return None
        raise RestoreError(f"{hub.repo} could not be fetched from the hub: {error}") from error
    missing = [name for name in hub.files if "*" not in name and not (Path(folder) / name).is_file()]
    if missing and not offline:
        raise RestoreError(f"{hub.repo} on the hub has no {', '.join(missing)}")
    return None if missing else Path(folder)


def query_hub_size(hub: Hub) -> int | None:
    """Return the bytes of the files of a hub folder; None if the hub does not tell."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import filter_repo_objects

    try:
        files = HfApi().model_info(hub.repo, revision=hub.revision, files_metadata=True).siblings or []
    except (HfHubHTTPError, OSError, ValueError):
        return None
    kept = filter_repo_objects(files, allow_patterns=list(hub.files) or None, key=lambda file: file.rfilename)
    return sum(file.size or 0 for file in kept) or None
