"""Things given by a name and options, as YAML writes them: found, made, and described again."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from operators import RestoreError
from operators.naming import check_known


def named(spec: Any, what: str) -> tuple[str, dict[str, Any]]:
    """(name, options) of "name", {name: options} or {"name": name, ...options}. RestoreError for anything else."""
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and "name" in spec:
        return str(spec["name"]), {key: value for key, value in spec.items() if key != "name"}
    if isinstance(spec, Mapping) and len(spec) == 1:
        ((name, options),) = spec.items()
        if options is None or isinstance(options, Mapping):
            return str(name), dict(options or {})
    raise RestoreError(f"a {what} is a name, {{name: options}} or a mapping with 'name', not {spec!r}")


def made(make: Callable, options: Mapping[str, Any], what: str) -> Any:
    """make(**options). Raises RestoreError for an option it does not know, and for one it needs and is not given."""
    known = inspect.signature(make).parameters
    check_known(options, known, f"{what} has no option")
    missing = [name for name, item in known.items() if item.default is item.empty and name not in options]
    if missing:
        raise RestoreError(f"{what} needs the option '{missing[0]}'")
    return make(**options)


def described(thing: Any, table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, options) of a function or of a frozen dataclass, whose defaults are left out; JSON-ready.

    The name is the one in `table`, else "module:qualname".
    """
    kind = thing if inspect.isroutine(thing) else type(thing)
    name = next((key for key, value in table.items() if value is kind), f"{kind.__module__}:{kind.__qualname__}")
    if not dataclasses.is_dataclass(thing):
        return name, {}
    return name, changed(thing)


def changed(thing: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, JSON-ready."""
    given = {}
    for item in dataclasses.fields(thing):
        value = getattr(thing, item.name)
        if item.init and (isinstance(value, torch.Tensor) or value != item.default):
            given[item.name] = plain(value)
    return given


def plain(value: Any) -> Any:
    """JSON-ready: functions as "module:qualname", tensors by shape and hash."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        digest = hashlib.sha256(data.view(torch.uint8).numpy().tobytes() if data.ndim else str(data).encode())
        return f"tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} sha256 {digest.hexdigest()[:16]}"
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}:{kind.__qualname__}"


def frozen(value: Any) -> Any:
    """Lists as tuples, also inside mappings: what is equal after a way through YAML."""
    if isinstance(value, Mapping):
        return {key: frozen(item) for key, item in value.items()}
    return tuple(frozen(item) for item in value) if isinstance(value, (list, tuple)) else value
