"""Where the package keeps its YAML files and its small data: in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from operators import RestoreError

_PACKAGE = Path(__file__).resolve().parent


def configs_dir() -> Path:
    """The folder of the YAML files (`model/`, `task/`, ...). RestoreError when the installation lost it."""
    return _shipped("configs")


def data_dir() -> Path:
    """The folder of the embedded prior, the sample photos and masks. RestoreError when it is missing."""
    return _shipped("data")


def _shipped(name: str) -> Path:
    # A wheel carries restore/_configs and restore/_data; a checkout has configs/ and data/ beside restore/.
    for folder in (_PACKAGE / f"_{name}", _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise RestoreError(
        f"The installation has no {name} folder (looked for {_PACKAGE / f'_{name}'} and {_PACKAGE.parent / name}): "
        "install the package again from its wheel or run it from a complete checkout."
    )
