"""What annotations allow, and the words for it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from operators import RestoreError
from operators.ranges import Count, Names, Positive, Range, Share, check, describe, enforce_ranges, fits

ANY = (
    0,
    1,
    -1,
    0.5,
    1.5,
    math.nan,
    math.inf,
    -math.inf,
    True,
    "a",
    "b",
    "m:f",
    None,
    [1],
    ["a"],
    (1, 2),
    {"a": 1},
    abs,
)


@pytest.mark.parametrize(
    ("hint", "allowed", "words"),
    [
        (float, (0, 1, -1, 0.5, 1.5), "a finite number"),
        (int, (0, 1, -1), "a whole number"),
        (bool, (True,), "true or false"),
        (Share, (0, 1, 0.5), "a number in [0, 1]"),
        (Positive | None, (1, 0.5, 1.5, None), "a finite number > 0 or None"),
        (Count, (1,), "a whole number >= 1"),
        (Annotated[float, Range(0, below=1)], (0, 0.5), "a number in [0, 1)"),
        (Annotated[float, Range(above=0, high=math.inf)], (1, 0.5, 1.5, math.inf), "a number > 0"),
        (Annotated[float, Range(high=0)], (0, -1), "a number <= 0"),
        (Annotated[int, Range(-1, odd=True)], (1, -1), "an odd number >= -1"),
        (Literal["a", "c"], ("a",), "a or c"),
        (Annotated[str | Callable, Names({"a": 1})], ("a", "m:f", abs), "a, module:function or a function"),
        (str | Sequence[str], ("a", "b", "m:f", ["a"]), "a name or a list of names"),
        (tuple[float, float] | None, (None, (1, 2)), "[a finite number, a finite number] or None"),
        (Share | Mapping[str, Share], (0, 1, 0.5, {"a": 1}), "a number in [0, 1] or a mapping"),
    ],
)
def test_what_fits(hint, allowed, words):
    assert [value for value in ANY if fits(value, hint)] == list(allowed) and describe(hint) == words
    assert all(fits(value, Any) for value in ANY)


def test_numbers_of_numpy():
    assert fits(np.float32(0.5), Share) and fits(np.int64(2), Count)
    assert not fits(np.float64(2.0), Count) and not fits(np.float32("nan"), float)


def test_sentences():
    for value, hint, message in [
        (2, Share, r"^x must be a number in \[0, 1\], got 2$"),
        ("sigm", Literal["sigma", "tau"], "unknown x 'sigm'; did you mean 'sigma'"),
        (["a\nb"], float, r"^x must be a finite number, got \['a\\nb'\]$"),
    ]:
        with pytest.raises(RestoreError, match=message):
            check(value, hint, "x")


def test_a_function_with_ranges():
    @enforce_ranges
    def power(x, lam: Positive = 1.0):
        return x**lam

    assert power(2.0, 3) == 8 and power(2.0) == 2
    with pytest.raises(RestoreError, match="lam must be"):
        power(2.0, 0)
    with pytest.raises(RestoreError, match="parameters must be of a moderate size, got lam=1e\\+200"):
        power(2.0, lam=1e200)
