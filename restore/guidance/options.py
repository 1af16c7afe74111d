"""Objects given by name and options, as YAML writes them: construct them, and describe them again."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from operators import RestoreError
from operators.naming import check_known
from operators.ranges import check_values, read_hints


def parse_spec(spec: Any, what: str) -> tuple[str, dict[str, Any]]:
    """Return (name, options) of "name", {name: options} or {"name": name, **options}; RestoreError for others."""
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and "name" in spec:
        return str(spec["name"]), {key: value for key, value in spec.items() if key != "name"}
    if isinstance(spec, Mapping) and len(spec) == 1:
        ((name, options),) = spec.items()
        if options is None or isinstance(options, Mapping):
            return str(name), dict(options or {})
    raise RestoreError(f"{what} must be a name, {{name: options}} or a mapping with 'name', got {spec!r}")


def construct(make: Callable, options: Mapping[str, Any], what: str) -> Any:
    """Return make(**options). Raises RestoreError for an unknown option, one out of range, and a missing one."""
    known = inspect.signature(make).parameters
    check_known(options, known, f"{what} has no option")
    missing = [name for name, item in known.items() if item.default is item.empty and name not in options]
    if missing:
        raise RestoreError(f"{what} needs the option '{missing[0]}'")
    if inspect.isfunction(make):
        check_values(options, read_hints(make), f" of {what}")
    return make(**options)


def check_options(part: Any) -> None:
    """Raise RestoreError if a field of a dataclass, such as a term, is out of its range (see operators.ranges)."""
    check_values(vars(part), read_hints(type(part)), f" of {type(part).__name__.lower()}")


def describe_spec(value: Any, table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return (name, options) of a function or of a frozen dataclass, JSON-ready and without defaults.

    The name is that in `table`, else "module:qualname".
    """
    kind = value if inspect.isroutine(value) else type(value)
    name = next((key for key, entry in table.items() if entry is kind), f"{kind.__module__}:{kind.__qualname__}")
    options = {}
    for item in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        option = getattr(value, item.name)
        if item.init and (isinstance(option, torch.Tensor) or option != item.default):
            options[item.name] = to_plain(option)
    return name, options


def to_plain(value: Any) -> Any:
    """Return `value` JSON-ready: functions as "module:qualname", tensors by shape and hash."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        digest = hashlib.sha256(data.view(torch.uint8).numpy().tobytes() if data.ndim else str(data).encode())
        return f"tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} sha256 {digest.hexdigest()[:16]}"
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}:{kind.__qualname__}"


def freeze(value: Any) -> Any:
    """Return lists as tuples, also inside mappings, so that values compare equal after a round trip through YAML."""
    if isinstance(value, Mapping):
        return {key: freeze(item) for key, item in value.items()}
    return tuple(freeze(item) for item in value) if isinstance(value, (list, tuple)) else value
