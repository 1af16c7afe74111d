"""Versions of the package and of the libraries that affect its results, and hashes of the user's own code."""

from __future__ import annotations

import ast
import functools
import importlib.util
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FunctionType
from typing import Any

from operators import RestoreError
from operators.naming import import_object
from restore.disk import hash_file

DISTRIBUTION = "restore-diffusion"
LIBRARIES = ("torch", "torchvision", "diffusers", "kornia", "numpy", "scipy", "pillow", "lpips", "torch-fidelity")
OWN_NAME = re.compile(r"([A-Za-z_][\w.]*:[A-Za-z_][\w.]*)(?::\d+)?")  # also with a number of steps: "module:spacing:20"
# Code that versions identify: this package's, the libraries' above, and Python's.
_KNOWN = {"restore", "operators", "PIL", "torch_fidelity", *LIBRARIES, *sys.stdlib_module_names} - {"__main__"}


def get_version() -> str:
    """Return the version of the installed package, or "checkout" if it is not installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "checkout"


def collect_versions() -> dict[str, str]:
    """Return the installed versions by name: python, this package and its libraries, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name, distribution in {"restore": DISTRIBUTION, **{library: library for library in LIBRARIES}}.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            continue
    return found


def hash_own_code(*things: Any) -> dict[str, str]:
    """Return {module: SHA-256 of its source} of the code from outside this package that `things` consist of.

    things: functions, classes, "module:attribute" names, objects with such attributes (operators, guidance), and
    mappings and sequences of them. A module's own neighbours that it imports are included: an edited helper changes the
    result too. Libraries that `collect_versions` names, and modules without a file, are not.
    """
    hashes: dict[str, str] = {}
    for owner in _find_owners(things, set()):
        _hash_module(owner, hashes)
    return dict(sorted(hashes.items()))


def _find_owners(thing: Any, seen: set[int]) -> Iterator[str]:
    """The names of the modules that define the parts of a thing; several times if it has several parts of one."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, str):
        if name := OWN_NAME.fullmatch(thing):
            with suppress(RestoreError):  # a text of this form that names nothing
                yield from _find_owners(import_object(name[1], "code"), seen)
    elif isinstance(thing, Mapping):
        for value in list(thing.values()):
            yield from _find_owners(value, seen)
    elif isinstance(thing, (list, tuple, set, frozenset)):
        for value in thing:
            yield from _find_owners(value, seen)
    elif isinstance(thing, functools.partial):
        yield from _find_owners((thing.func, thing.args, thing.keywords), seen)
    elif isinstance(thing, (type, FunctionType)):
        yield thing.__module__
        for base in getattr(thing, "__bases__", ()):
            yield from _find_owners(base, seen)
    else:
        yield from _find_owners(type(thing), seen)
        if _is_own(type(thing).__module__) or type(thing).__module__.partition(".")[0] in ("restore", "operators"):
            yield from _find_owners(getattr(thing, "__dict__", {}), seen)


def _is_own(module: str) -> bool:
    return module.partition(".")[0] not in _KNOWN


def _hash_module(name: str, hashes: dict[str, str], path: Path | None = None) -> None:
    """Add the hash of a module and, unless it is installed, those of the modules of its folder that it imports, now or
    within a function. path: its file, if it may not be loaded yet."""
    module = sys.modules.get(name)
    path = Path(getattr(module, "__file__", None) or "") if path is None else path
    if name in hashes or not _is_own(name) or not path.is_file():
        return
    hashes[name] = hash_file(path)
    if path.suffix != ".py" or _is_installed(path):
        return
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    package = package if module is None else getattr(module, "__package__", None) or ""
    root = path.parents[package.count(".") + 1 if package else 0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, package) if node.level else base
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for imported in names:
            if (neighbour := _find_neighbour(imported, root)) is not None:
                _hash_module(imported, hashes, neighbour)


def _find_neighbour(name: str, root: Path) -> Path | None:
    """Return the file below `root` of a module that is loaded or would be; None if it is none of these."""
    loaded, stem = getattr(sys.modules.get(name), "__file__", None), root.joinpath(*name.split("."))
    files = [Path(loaded)] if loaded else [stem.with_suffix(".py"), stem / "__init__.py"]
    found = (path for path in files if root in path.parents and path.is_file() and not _is_installed(path))
    return next(found, None)


def _is_installed(path: Path) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
