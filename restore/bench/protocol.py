"""What must be written beside a number so that somebody else can obtain it, and how two such protocols differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Differences that leave numbers comparable: they name the circumstances of a run rather than what was measured.
CIRCUMSTANCES = ("versions", "device")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots, lists of mappings by their index; other lists are values."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, child in value.items():
        flat |= flatten(child, f"{prefix}.{key}" if prefix else str(key))
    return flat or ({prefix: {}} if prefix else {})


def differences(a: Mapping[str, Any], b: Mapping[str, Any], *, circumstances: bool = False) -> dict[str, tuple]:
    """Where two protocols (or configs) differ: dotted key to the pair of values, None where a side has no such key.

    circumstances: also report package versions and the device, which leave results comparable.
    """
    left, right = flatten(a), flatten(b)
    result = {}
    for key in [*left, *(key for key in right if key not in left)]:
        if not circumstances and key.split(".")[0] in CIRCUMSTANCES:
            continue
        if left.get(key) != right.get(key):
            result[key] = (left.get(key), right.get(key))
    return result


def comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple]:
    """What keeps two runs out of one table: differences in images, measurement, scale and metrics.

    Methods, and tasks that only one run has, are what a table compares, so they may differ; a task of the same
    name must be the same task.
    """
    shared = set(a.get("tasks", {})) & set(b.get("tasks", {}))

    def relevant(protocol: Mapping[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in protocol.items() if k not in ("methods", "backbone", "tasks")}
        return kept | {"tasks": {k: v for k, v in protocol.get("tasks", {}).items() if k in shared}}

    return differences(relevant(a), relevant(b))


def format_differences(found: Mapping[str, tuple], names: tuple[str, str] = ("there", "here"), limit: int = 12) -> str:
    """`differences` as short lines: `methods.dps.steps: 1000 there, 250 here`."""
    lines = [
        f"{key}: {_short(pair[0])} {names[0]}, {_short(pair[1])} {names[1]}"
        for key, pair in list(found.items())[:limit]
    ]
    if len(found) > limit:
        lines.append(f"and {len(found) - limit} more")
    return "; ".join(lines)


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
