"""Names given by people: looked up in a table, or imported as `module:attribute`; a wrong one names its neighbours."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from operators.errors import RestoreError


def suggest(name: Any, known: Iterable[str]) -> str:
    """ "did you mean 'sr4'?", or everything that is known where nothing is near."""
    known = [str(item) for item in known]
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    near.sort(key=lambda item: sorted(item) != sorted(str(name)))  # swapped letters first: 'pga' is 'pag', not 'tpg'
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none'}"


def lookup(name: Any, table: Mapping[str, Any], what: str) -> Any:
    """table[name], or the attribute that "module:attribute" imports.

    what: the kind of thing in words ("sampler"), for the message. Raises RestoreError for an unknown name (with
    the nearest known one), and for a module or attribute that is not there.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    if isinstance(name, str) and ":" in name:
        return import_object(name, what)
    raise RestoreError(f"unknown {what} '{_line(name)}'; {suggest(name, table)} (your own: module:attribute)")


def import_object(name: str, what: str) -> Any:
    """The object "module:attribute" names. Raises RestoreError when it cannot be imported."""
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise RestoreError(f"the {what} '{_line(name)}' cannot be imported: {_line(error)}") from None
    return found


def check_known(names: Iterable[Any], known: Iterable[str], what: str) -> None:
    """Raises RestoreError for the first of `names` that is not known; what: e.g. "sampler dps has no parameter"."""
    known = list(known)
    for name in names:
        if name not in known:
            raise RestoreError(f"{what} '{_line(name)}'; {suggest(name, known)}")


def _line(value: Any) -> str:
    """`value` in words, in one line."""
    return " ".join(str(value).split())
