"""The shape of the house: what imports what, how long files and signatures are."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from restore import samplers

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for folder in ("operators", "restore", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")
)
# A lower floor first; a module imports from its own floor and from those before it.
FLOORS = (
    ("operators",),
    ("disk", "paths", "versions", "config"),
    ("images",),
    ("backbones",),
    ("guidance",),
    ("samplers",),
    ("method", "zoo"),
    ("protocol", "restoration", "restorer", "task", "repair", "batch", "calibration"),
    ("memory", "metrics", "integrations"),
    ("bench", "training"),
    ("report",),
    ("search",),
    ("app",),
)
CONTRACT = 8  # arguments that every sampler takes: prior, operator, y, noise, steps, guidance, condition, callback


def imports(tree, module_level_only=True):
    nodes = tree.body if module_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def floor_of(name):
    parts = name.split(".")
    part = parts[0] if parts[0] == "operators" else parts[1] if parts[0] == "restore" and len(parts) > 1 else None
    return next((i for i, floor in enumerate(FLOORS) if part in floor), None)


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.relative_to(ROOT).parts[0] in ("restore", "operators")], ids=str
)
def test_imports_point_downwards(path):
    relative = path.relative_to(ROOT).with_suffix("")
    own = floor_of(".".join(relative.parts))
    if own is None:
        return
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        floor = floor_of(name)
        assert floor is None or floor <= own, f"{relative} imports {name}"


def test_every_package_has_a_floor():
    parts = {path.relative_to(ROOT).parts[1].removesuffix(".py") for path in FILES if ROOT / "restore" in path.parents}
    assert parts - {"__init__"} == {part for floor in FLOORS for part in floor} - {"operators"}


def test_files_hold_one_idea():
    long = {str(path.relative_to(ROOT)): n for path in FILES if (n := len(path.read_text("utf-8").splitlines())) > 350}
    assert not long


def functions(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            names = [argument.arg for argument in given if argument.arg not in ("self", "cls")]
            yield node, names + [extra.arg for extra in (node.args.vararg, node.args.kwarg) if extra is not None]


def test_signatures_can_be_remembered():
    """Twelve parameters at most, sixteen in the app; samplers twelve of their own.

    Not counted: the call of a Restorer, which is the one-liner of every document, and the verbs of the command line.
    """
    for path in FILES:
        package, *rest = path.relative_to(ROOT).parts
        if package not in ("restore", "operators"):
            continue
        limit = 16 if rest[0] == "app" else 12 + CONTRACT * (rest[0] == "samplers" and rest[-1] != "steps.py")
        for node, names in functions(path):
            is_verb = rest[:2] == ["app", "cli.py"] or rest[:2] == ["app", "research.py"]
            if (rest == ["restorer.py"] and node.name == "__call__") or is_verb:
                continue
            assert len(names) <= limit, f"{path.relative_to(ROOT)}: {node.name} takes {len(names)} parameters"


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_samplers_words_are_not_longer_than_its_body(name):
    """Not counting the signature's line of each own parameter; what all share is said in restore.samplers."""
    source = inspect.getsource(samplers.find_sampler(name)).splitlines()
    node = next(n for n in ast.walk(ast.parse("\n".join(source))) if isinstance(n, ast.FunctionDef))
    words = node.body[0].end_lineno - len(samplers.sampler_parameters(name))
    assert words <= len(source) - node.body[0].end_lineno


WALK = re.compile(r"^\d\. \*\*(.+?)\*\*(.*?)(?=^\d\.|^## )", re.MULTILINE | re.DOTALL)


def test_a_newcomers_walks_are_short_and_true():
    """Every file of a walk exists and holds what is named there."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    walks = WALK.findall(text[text.index("### Three walks") :])
    lengths = []
    for _, walk in walks:
        files = re.findall(r"`([\w/]+\.py)`(?: \(((?:`\w+`(?:,\s+)?)+)\))?", walk)
        lengths.append(len(files))
        for name, definitions in files:
            source = (ROOT / "restore" / name).read_text(encoding="utf-8")
            for definition in re.findall(r"\w+", definitions):
                assert f"def {definition}(" in source, (name, definition)
    assert len(walks) == 3 and all(n <= limit for n, limit in zip(lengths, (4, 8, 10), strict=True)), lengths
