"""Every option of every guidance, combination and target, with values inside and outside of its range and of wrong
types: one sentence names it, or the guided estimate is finite and real."""

import dataclasses
import inspect
import math

import pytest
import torch

from operators import RestoreError
from restore.guidance import COMBINATIONS, TERMS, Guidance, Term, WeakPass, build_guidance, estimator, targets

VALUES = (-1, -1e-6, 0.0, 0, 1e-6, 0.5, 1.0, 1, 1.5, 3, 500, 1e6, math.nan, math.inf, -math.inf, True, None)
VALUES += (
    "abc",
    "0.5",
    "",
    "nowhere:f",
    "m1",
    [1],
    [500, 200],
    [200, 500],
    [1, 2, 3],
    ["a", "b"],
    {"a": 1},
    {"i7": {0: 1}},
)
OWN = {
    "pag": {"layers": "m1", "target": "random_mask"},
    "tpg": {"layers": "m1"},
    "swg": {"window": 16},
    "slg": {"layers": "m1"},
}
BASE = {field.name for field in dataclasses.fields(Term)}
TERM_OPTIONS = [("pag", "scale"), ("pag", "interval"), ("pag", "schedule")]
for term, kind in TERMS.items():  # another model's name is looked up, null needs a network with classes
    own = {field.name for field in dataclasses.fields(kind) if field.init} - BASE - {"model", "null"}
    TERM_OPTIONS += [(term, key) for key in sorted(own)]
PARTS = [
    ("combine", name, key)
    for name, kind in COMBINATIONS.items()
    if isinstance(kind, type)
    for key in inspect.signature(kind).parameters
]
PARTS += [
    ("target", name, key)
    for name, family in targets.TARGET_FAMILIES.items()
    for key in inspect.signature(family).parameters
]


def refusal(model, x, config):
    """The sentence by which a guidance is refused; None if its estimate is finite and real."""
    try:
        with torch.no_grad(), estimator(model, build_guidance(config)) as estimate:
            eps = estimate(x, 300)[1]
    except RestoreError as error:
        assert "\n" not in str(error)
        return str(error)
    assert eps.is_floating_point() and eps.shape == x.shape and torch.isfinite(eps).all()
    return None


@pytest.mark.parametrize(("name", "key"), TERM_OPTIONS)
def test_every_option_of_a_term(model, x, name, key):
    config = {"scale": 1.0, **OWN.get(name, {})}
    for value in VALUES:
        sentence = refusal(model, x, {name: {**config, key: value}})
        words = (key.rstrip("s"), repr(value), name, "attention layer")
        assert sentence is None or any(word in sentence for word in words), value


@pytest.mark.parametrize(("kind", "name", "key"), PARTS)
def test_every_option_of_a_combination_and_a_target(model, x, kind, name, key):
    for value in VALUES:
        part = {kind: {name: {key: value}}}
        pag = {"scale": 1.0, "layers": "m1"}
        sentence = refusal(model, x, {"pag": pag, **part} if kind == "combine" else {"pag": {**pag, **part}})
        assert sentence is None or key in sentence, value


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tsg": {"scale": 1, "s": "abc"}}, "s of tsg must be a finite number >= 0, got 'abc'"),
        ({"tsg": {"scale": 1, "noise": -1}}, "noise of tsg must be a whole number >= 0, got -1"),
        ({"pag": {"scale": 1, "layers": 5}}, "layers of pag must be a name or a list of names, got 5"),
        ({"pag": {"scale": True, "layers": "m1"}}, "scale of pag must be a finite number, got True"),
        ({"pag": {"scale": 1, "layers": "m1", "interval": 500}}, "interval of pag must be .* or None, got 500"),
        ({"pag": {"scale": 1, "layers": "m1", "heads": [0.5]}}, "heads of pag must be a whole number >= 0"),
        ({"pag": {"scale": 1, "layers": "m1", "noise": -1}}, "noise of pag must be a whole number >= 0, .*, got -1"),
        ({"pag": {"scale": 1, "layers": "m1", "scope": "text"}}, "scope of pag 'text'; known: joint, image, cross"),
        ({"sag": {"scale": 1, "taps": 4}}, "taps of sag must be an odd number >= 1 or None, got 4"),
        ({"swg": {"scale": 1, "window": "8"}}, "window of swg must be a whole number >= 1, got '8'"),
        ({"swg": {"scale": 1, "window": 8, "overlap": 1}}, r"overlap of swg must be a number in \[0, 1\), got 1"),
        ({"autoguidance": {"scale": 1, "model": 5}}, "model of autoguidance must be a name, .* got 5"),
        ({"pag": {"scale": 1, "layers": "m1", "target": {"blur": {"kernel": 4}}}}, "kernel.* odd.*, got 4"),
        ({"pag": {"scale": 1, "layers": "m1", "target": {"noise": {"sigma": "a"}}}}, "sigma of target noise must be"),
        ({"cfg": {"scale": 1}, "combine": {"apg": {"momentum": -1}}}, r"momentum of apg must be .* \(-1, 1\), got -1"),
    ],
)
def test_sentences(config, message):
    with pytest.raises(RestoreError, match=message):
        build_guidance(config)


def test_infinite_ends_of_an_interval():
    assert build_guidance({"cfg": {"scale": 1, "interval": [math.inf, 300]}}).terms[0].scale_at(999, None) == 1


def test_a_users_term_is_held_to_its_annotations():
    @dataclasses.dataclass(frozen=True)
    class Dimmed(Term):
        by: float = 0.1

        def bind(self, backbone):
            return WeakPass(lambda x_t, t, condition, strong: (1 - self.by) * strong.eps)

    assert Guidance((Dimmed(1.0, by=1),)).terms[0].by == 1
    with pytest.raises(RestoreError, match="by of dimmed must be a finite number, got '0.1'"):
        Dimmed(1.0, by="0.1")
