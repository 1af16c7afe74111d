"""Guidance from plain data (YAML, the command line) and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from operators import RestoreError
from operators.naming import lookup
from restore.guidance.autoguidance import Autoguidance
from restore.guidance.base import Guidance, Term, as_guidance
from restore.guidance.cfg import CFG
from restore.guidance.combine import COMBINATIONS, weighted_sum
from restore.guidance.options import construct, describe_spec, parse_spec, to_plain
from restore.guidance.pag import PAG
from restore.guidance.sag import SAG
from restore.guidance.slg import SLG
from restore.guidance.ssg import SSG
from restore.guidance.swg import SWG
from restore.guidance.tag import TAG
from restore.guidance.tpg import TPG
from restore.guidance.tsg import TSG
from restore.guidance.tsr import TSR

LAYER_NAMES = ("layers", "heads", "strength")  # options whose texts name layers
TERMS: dict[str, type[Term]] = {
    "pag": PAG,
    "cfg": CFG,
    "sag": SAG,
    "tpg": TPG,
    "tsg": TSG,
    "autoguidance": Autoguidance,
    "swg": SWG,
    "slg": SLG,
    "ssg": SSG,
    "tag": TAG,
    "tsr": TSR,
}


def build_guidance(config: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> Guidance | None:
    """Return the Guidance of {"pag": {"scale": 1.0, "layers": "i9"}, "cfg": {...}}, or of a list of such terms.

    A list has one-key mappings {"pag": {...}} or mappings {"name": "pag", ...}, and may repeat a name. A name is one
    of TERMS or "module:Class"; the options are the fields of that class. "combine" beside the terms is a combination:
    "apg", {"rescale": {"phi": 0.5}}, "module:function". Without terms the result is None.
    Raises RestoreError for unknown names, unknown, missing or wrong options, and data of another form.
    """
    terms, combine = [], "sum"
    for entry in list_entries(config):
        if isinstance(entry, Mapping) and list(entry) == ["combine"]:
            combine = entry["combine"]
            continue
        name, options = parse_spec(entry, "guidance term")
        term = construct(lookup(name, TERMS, "guidance"), options, f"guidance.{name}")
        if not isinstance(term, Term):
            raise RestoreError(f"guidance.{name} must be a subclass of restore.guidance.Term, got {to_plain(term)}")
        terms.append(term)
    return Guidance(tuple(terms), combine) if terms else None


def list_entries(config: Any) -> list[Any]:
    """Return every form that build_guidance takes as a list of terms. Raises RestoreError for data of another form."""
    if isinstance(config, Mapping):
        return [config] if "name" in config else [{name: options} for name, options in config.items()]
    if config is None or (isinstance(config, Sequence) and not isinstance(config, str)):
        return list(config or ())
    raise RestoreError(f"guidance must be a mapping {{pag: {{scale: 1.0, layers: i9}}}} or a list, got {config!r}")


def require_known_names(config: Any) -> None:
    """Raise RestoreError for data of a guidance that names code to import, as no file of somebody else's may.

    Names of layers, which have a colon before heads, are never imported.
    """
    for entry in list_entries(config):
        is_combine = isinstance(entry, Mapping) and list(entry) == ["combine"]
        name, options = ("combine", entry["combine"]) if is_combine else parse_spec(entry, "guidance term")
        if isinstance(options, Mapping):
            options = {key: value for key, value in options.items() if key not in LAYER_NAMES}
        for text in (name, *_list_texts(options)):
            if ":" in text:
                raise RestoreError(f"guidance from a file must name what restore has, got '{text}'; try it in Python")


def _list_texts(value: Any) -> list[str]:
    """Return the strings in plain data, keys included."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    elif not isinstance(value, (list, tuple)):
        return [value] if isinstance(value, str) else []
    return [text for item in value for text in _list_texts(item)]


def describe_guidance(guidance: Term | Guidance | None) -> list[dict[str, Any]] | None:
    """Return what `build_guidance` takes, JSON-ready and without defaults; None for no guidance.

    build_guidance(describe_guidance(g)) == g if every part is plain data or a function of a module; tensors are
    described by shape and hash.
    """
    guidance = as_guidance(guidance)
    if guidance is None:
        return None
    entries: list[dict[str, Any]] = [dict([describe_spec(term, TERMS)]) for term in guidance.terms]
    if guidance.combine is not weighted_sum:
        name, options = describe_spec(guidance.combine, COMBINATIONS)
        entries.append({"combine": {name: options} if options else name})
    return entries


def resolve_guidance(value: Any, preset: Guidance | None) -> Guidance | None:
    """Return the guidance meant by an argument: None, a guidance, or "preset". Raises RestoreError otherwise."""
    if isinstance(value, str) and value == "preset":
        return preset
    if value is None or isinstance(value, (Term, Guidance)):
        return as_guidance(value)
    raise RestoreError(f'guidance must be None, "preset" or a guidance such as PAG(1.0, "i9"), got {to_plain(value)!r}')
