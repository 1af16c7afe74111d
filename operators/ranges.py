"""What values a parameter takes, declared once as its annotation: read by checks, their messages and the documents.

    def sampler(..., lam: Positive = 1.75, tau: Positive | None = None, gradient: Literal["added", "score"] = "added")

An annotation is made of float, int, bool, str, None, Callable, Literal, unions, Sequence, Mapping and tuple, and of
Annotated[..., Range(...)] for numbers and Annotated[..., Names(...)] for names in a table. Nothing else is checked.
A number is finite, unless its Range has that infinity as an end; True is no number.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from operators.errors import RestoreError
from operators.naming import check_known, flatten, lookup

F = TypeVar("F", bound=Callable)


@dataclass(frozen=True)
class Range:
    """An interval of numbers: from low to high, these included, and above ... below, these excluded; None: no limit.

    odd: only odd numbers.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    odd: bool = False

    def __contains__(self, value: float) -> bool:
        return (
            (math.isfinite(value) or value in (self.low, self.high))
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and not (self.odd and value % 2 == 0)
        )

    @property
    def is_closed(self) -> bool:
        """Whether it says by its ends which numbers are too large, infinity included."""
        return self.high is not None or (self.low is not None and self.below is not None)

    def __str__(self) -> str:
        """Write "in [0, 1)", "> 0" or "<= 2"; nothing without limits."""
        low, high = (self.low if self.above is None else self.above), (self.high if self.below is None else self.below)
        if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
            left, right = "[" if self.above is None else "(", "]" if self.below is None else ")"
            return f" in {left}{low:g}, {high:g}{right}"
        if low is not None and math.isfinite(low):
            return f" {'>=' if self.above is None else '>'} {low:g}"
        return "" if high is None or math.isinf(high) else f" {'<=' if self.below is None else '<'} {high:g}"


class Names:
    """The names in a table, which may grow; "module:attribute" is one, too, which is looked up where it is used."""

    def __init__(self, table: Mapping[str, Any]):
        self.table = table


Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(1)]
Seed = Annotated[int, Range(0)]


def read_hints(function: Callable) -> dict[str, Any]:
    """Return the annotations of a function or of a dataclass by name; {} if they cannot be read."""
    try:
        return get_type_hints(function, include_extras=True)
    except Exception:  # a user's annotation may name what exists for a type checker only
        return {}


def check(value: Any, hint: Any, name: str) -> None:
    """Raise RestoreError, which calls it by `name`, if a value does not fit an annotation."""
    if fits(value, hint):
        return
    for names in _find_names(hint) if isinstance(value, str) else ():
        lookup(value, names.table, name) if isinstance(names, Names) else check_known([value], names, f"unknown {name}")
    raise RestoreError(f"{name} must be {describe(hint)}, got {flatten(repr(value))[:200]}")


def check_values(values: Mapping[str, Any], hints: Mapping[str, Any], owner: str = "") -> None:
    """Raise RestoreError for the first of the values by name that does not fit; owner: words behind the name."""
    for name, value in values.items():
        if name in hints:
            check(value, hints[name], name + owner)


def enforce_ranges(function: F) -> F:
    """Check the arguments of every call against their annotations: a decorator.

    Raises RestoreError also if numbers within their ranges are so large or small that they overflow.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        hints = read_hints(function)
        check_values(given, hints)
        try:
            return function(*args, **kwargs)
        except (OverflowError, ZeroDivisionError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "without overflow" not in str(error):  # torch's word for it
                raise
            sizes = ", ".join(f"{key}={value!r}" for key, value in given.items() if key in hints)
            raise RestoreError(f"parameters must be of a moderate size, got {sizes}: {flatten(error)}") from error

    return call


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is one that the annotation allows."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, *limits = args
        ranges = [limit for limit in limits if isinstance(limit, Range)]
        if ranges:
            return _is_number(value, kind) and all(value in limit for limit in ranges)
        tables = [names.table for names in limits if isinstance(names, Names)]
        is_name = isinstance(value, str) and bool(tables) and ":" not in value
        return fits(value, kind) and (not is_name or any(value in table for table in tables))
    if origin in (Union, types.UnionType):
        return any(fits(value, member) for member in args)
    if origin is Literal:
        return any(value is option or (isinstance(value, str) and value == option) for option in args)
    if hint in (float, int):
        return _is_number(value, hint) and math.isfinite(value)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint in (None, type(None)):
        return value is None
    if hint is Callable or origin is Callable:
        return callable(value)
    if origin is tuple:
        is_pair = isinstance(value, (list, tuple)) and len(value) == len(args)
        return is_pair and all(map(fits, value, args))
    if origin is Sequence:
        is_list = isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))
        return is_list and all(fits(item, args[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(fits(item, args[1]) for item in value.values())
    return True


def describe(hint: Any) -> str:
    """Return in words what an annotation allows: "a number > 0 or None"."""
    return _join(dict.fromkeys(_list_words(hint)))


def _list_words(hint: Any) -> list[str]:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for limit in args[1:]:
            if isinstance(limit, Range):
                whole = "an odd number" if limit.odd else "a whole number"
                word = whole if args[0] is int else "a number" if limit.is_closed else "a finite number"
                return [word + str(limit)]
        names = [name for names in args[1:] if isinstance(names, Names) for name in [*names.table, "module:function"]]
        return names + [word for word in _list_words(args[0]) if not (names and word == "a name")]
    if origin in (Union, types.UnionType):
        words = [word for member in args for word in _list_words(member)]
        return sorted(words, key=lambda word: word == "None")
    if origin is Literal:
        return [str(option) for option in args]
    if origin is tuple:
        return [f"[{', '.join(map(describe, args))}]"]
    if origin is Sequence:
        return ["a list of " + describe(args[0]).replace("a whole number", "whole numbers").replace("a name", "names")]
    plain = {float: "a finite number", int: "a whole number", str: "a name", type(None): "None", Callable: "a function"}
    if hint is bool:
        return ["true", "false"]
    return [plain.get(hint) or plain.get(origin) or {Mapping: "a mapping"}.get(origin or hint, "any")]


def _join(words) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _is_number(value: Any, kind: Any) -> bool:
    kinds = numbers.Integral if kind is int else numbers.Real
    return isinstance(value, kinds) and not isinstance(value, bool) and not math.isnan(value)


def _find_names(hint: Any) -> list[Names | tuple[str, ...]]:
    """The tables of names and the options of Literals within an annotation."""
    if get_origin(hint) is Literal:
        return [get_args(hint)]
    if get_origin(hint) is Annotated:
        return [limit for limit in get_args(hint)[1:] if isinstance(limit, Names)]
    if get_origin(hint) in (Union, types.UnionType):
        return [names for member in get_args(hint) for names in _find_names(member)]
    return []
