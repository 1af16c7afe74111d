"""Folders of the package's YAML files and small data, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from operators import RestoreError

_PACKAGE = Path(__file__).resolve().parent


EXTRA = "restore.json"  # beside a network: what its configuration does not hold, and how it was loaded


def configs_dir() -> Path:
    """The folder of the YAML files (`model/`, `task/`, ...). Raises RestoreError if the installation has none."""
    return _find_shipped("configs")


def data_dir() -> Path:
    """The folder of embedded priors, sample photos and masks. Raises RestoreError if the installation has none."""
    return _find_shipped("data")


def _find_shipped(name: str) -> Path:
    # A wheel has restore/_configs and restore/_data; a checkout has configs/ and data/ beside restore/.
    folders = (_PACKAGE / f"_{name}", _PACKAGE.parent / name)
    for folder in folders:
        if folder.is_dir():
            return folder
    raise RestoreError(f"the installation must have {folders[0]} or {folders[1]}; install the package again")
