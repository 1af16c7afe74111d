"""What must be written beside a number so that others can reproduce it, and how two such protocols differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from operators import RestoreError
from restore.disk import LEFTOVER

# Differences that leave numbers comparable: they name the circumstances of a run rather than what was measured.
CIRCUMSTANCES = ("versions", "device")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, keys joined by dots, lists of mappings by their index; other lists are values."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, child in value.items():
        flat |= flatten(child, f"{prefix}.{key}" if prefix else str(key))
    return flat or ({prefix: {}} if prefix else {})


def find_differences(a: Mapping[str, Any], b: Mapping[str, Any], *, circumstances: bool = False) -> dict[str, tuple]:
    """Return where two protocols or configurations differ: dotted key to the pair of values, None for a missing one.

    circumstances: also report package versions and the device, which leave results comparable.
    """
    left, right = flatten(a), flatten(b)
    keys = [key for key in {**left, **right} if circumstances or key.split(".")[0] not in CIRCUMSTANCES]
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def check_folder(folder: Path, existing: Mapping[str, Any] | None, identity: Mapping[str, Any], what: str) -> None:
    """Raise RestoreError if `folder` holds anything but the run with this identity.

    existing: the identity of the run it holds, None if there is no run. what: the name of such a run.
    """
    if existing is None:
        if folder.exists() and any(not path.match(LEFTOVER) for path in folder.iterdir()):
            raise RestoreError(f"{folder} is not empty and holds no {what}; give another out=FOLDER")
    elif changes := find_differences(existing, identity, circumstances=True):
        raise RestoreError(
            f"{folder} holds another {what} ({format_differences(changes)}); give out=FOLDER for the new one, or undo"
            " the change to continue"
        )


def find_conflicts(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple]:
    """Return what keeps two runs out of one table: differences in images, measurement, range and metrics.

    Methods, and tasks that only one run has, may differ: a table compares them. A task of the same name must be the
    same task.
    """
    shared = set(a.get("tasks", {})) & set(b.get("tasks", {}))

    def select(protocol: Mapping[str, Any]) -> dict[str, Any]:
        parts = {k: v for k, v in protocol.items() if k not in ("methods", "backbone", "tasks")}
        return parts | {"tasks": {k: v for k, v in protocol.get("tasks", {}).items() if k in shared}}

    return find_differences(select(a), select(b))


def format_differences(differences: Mapping[str, tuple], limit: int = 12) -> str:
    """Return differences on one line: `methods.dps.steps: 1000 there, 250 here`."""
    parts = [f"{key}: {_shorten(a)} there, {_shorten(b)} here" for key, (a, b) in list(differences.items())[:limit]]
    return "; ".join(parts + [f"and {len(differences) - limit} more"] * (len(differences) > limit))


def _shorten(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
