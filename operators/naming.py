"""Names typed by users, looked up in a table or imported as `module:attribute`; a wrong one names its neighbours."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from operators.errors import RestoreError

# Folders in which "module:attribute" is found besides Python's own path. Not on that path: an `import pillow_heif` of a
# library must never run a file of that name in the user's folder.
MODULE_FOLDERS: list[str] = []
AUTO = "auto"  # in place of what is chosen for the user, by the photo, the memory or the machine


def suggest(name: Any, known: Iterable[str]) -> str:
    """Return "did you mean 'sr4'?" for the nearest known name, or the list of all if none is near."""
    known = [str(item) for item in known]
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    near.sort(key=lambda item: sorted(item) != sorted(str(name)))  # swapped letters first: 'pga' is 'pag', not 'tpg'
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none'}"


def lookup(name: Any, table: Mapping[str, Any], what: str) -> Any:
    """Return table[name], or the attribute that "module:attribute" imports.

    what: what the table holds, for the message ("sampler"). Raises RestoreError for an unknown name, with the nearest
    known one, and for a module or attribute that does not exist.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    if isinstance(name, str) and ":" in name:
        return import_object(name, what)
    raise RestoreError(f"unknown {what} '{flatten(name)}'; {suggest(name, table)} (your own: module:attribute)")


def import_object(name: str, what: str) -> Any:
    """Return the object that "module:attribute" names. Raises RestoreError if it cannot be imported."""
    module, _, attribute = name.partition(":")
    try:
        top = module.partition(".")[0]
        is_installed = top in sys.modules or importlib.util.find_spec(top) is not None
        with nullcontext() if is_installed else _extend_path():
            value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise RestoreError(f"the {what} '{flatten(name)}' cannot be imported: {flatten(error)}") from None
    return value


@contextmanager
def _extend_path() -> Iterator[None]:
    sys.path.extend(MODULE_FOLDERS)
    try:
        yield
    finally:
        for folder in MODULE_FOLDERS:
            sys.path.reverse()  # the last of equal entries is the one that was added
            sys.path.remove(folder)
            sys.path.reverse()


def check_known(names: Iterable[Any], known: Iterable[str], what: str) -> None:
    """Raise RestoreError for the first of `names` that is not known; what: e.g. "sampler dps has no parameter"."""
    known = list(known)
    for name in names:
        if name not in known:
            raise RestoreError(f"{what} '{flatten(name)}'; {suggest(name, known)}")


def flatten(value: Any) -> str:
    return " ".join(str(value).split())
