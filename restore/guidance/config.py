"""Guidance from plain data (YAML, the command line) and back."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from operators import RestoreError
from operators.naming import check_known, lookup
from restore.guidance.base import Guidance, Term
from restore.guidance.branches import BRANCHES
from restore.guidance.combine import COMBINATIONS, weighted_sum
from restore.guidance.options import changed, described, made, named, plain

TERM = [item.name for item in dataclasses.fields(Term) if item.name != "branch"]


def build(config: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> Guidance | None:
    """{"pag": {"scale": 1.0, "layers": "i9"}, "cfg": {...}}, or a list of such terms, as a Guidance; nothing -> None.

    A list has one-key mappings {"pag": {...}} or mappings {"name": "pag", ...}, several of a name if need be. A name
    is one of BRANCHES or "module:Class"; the options are the branch's own and scale, interval, schedule of Term.
    "combine" beside the terms is a combination: "apg", {"rescale": {"phi": 0.5}}, "module:function".
    Raises RestoreError, in one sentence, for whatever does not fit.
    """
    if isinstance(config, Mapping):
        entries = [config] if "name" in config else [{name: options} for name, options in config.items()]
    elif isinstance(config, Sequence) and not isinstance(config, str):
        entries = list(config)
    elif config is None:
        entries = []
    else:
        raise RestoreError(
            f"guidance is a mapping such as {{pag: {{scale: 1.0, layers: i9}}}} or a list, not {config!r}"
        )
    terms, combine = [], "sum"
    for entry in entries:
        if isinstance(entry, Mapping) and list(entry) == ["combine"]:
            combine = entry["combine"]
        else:
            terms.append(_term(entry))
    return Guidance(tuple(terms), combine) if terms else None


def _term(entry: Any) -> Term:
    name, options = named(entry, "guidance term")
    make, what = lookup(name, BRANCHES, "guidance"), f"guidance.{name}"
    own = inspect.signature(make).parameters
    check_known(options, [*TERM, *own], f"{what} has no option")
    if "scale" not in options:
        raise RestoreError(f"{what} needs the option 'scale'")
    branch = made(make, {key: value for key, value in options.items() if key in own}, what)
    return Term(branch, **{key: value for key, value in options.items() if key in TERM})


def describe(guidance: Guidance | None) -> list[dict[str, Any]] | None:
    """What `build` takes, JSON-ready, defaults left out; None for no guidance.

    Where every part is plain data or a function of a module, build(describe(g)) == g; tensors are described by
    shape and hash.
    """
    if guidance is None:
        return None
    entries: list[dict[str, Any]] = []
    for term in guidance.terms:
        name, own = described(term.branch, BRANCHES)
        scale = changed(dataclasses.replace(term, branch=None))
        scale.pop("branch", None)
        entries.append({name: {**scale, **own}})
    if guidance.combine is not weighted_sum:
        name, options = described(guidance.combine, COMBINATIONS)
        entries.append({"combine": {name: options} if options else name})
    return entries


def chosen(value: Any, preset: Guidance | None) -> Guidance | None:
    """The guidance meant by an argument: None, a Guidance, or "preset" for the preset's. RestoreError for any other."""
    if value is None or isinstance(value, Guidance):
        return value
    if isinstance(value, str) and value == "preset":
        return preset
    raise RestoreError(
        'guidance is None (no guidance), "preset" or a guidance such as restore.PAG(1.0, layers="i9"), '
        f"not {plain(value)!r}"
    )
