"""The pages of samplers and guidances agree with the code: options, defaults, calls, evaluations, pictures."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from PIL import Image

import operators
import restore
from operators import ranges
from restore import guidance as guidances
from restore import samplers
from restore.app import cli, options
from restore.bench.config import load_config
from restore.guidance import base, estimator, targets
from restore.method import Situation, find_preset
from restore.samplers.generate import generate
from restore.task import load_task

DOCS = Path(__file__).parents[1] / "docs"
SAMPLERS = [*samplers.SAMPLERS, "generate"]
GUIDANCE = {
    "pag": guidances.PAG,
    "cfg": guidances.CFG,
    "sag": guidances.SAG,
    "tpg": guidances.TPG,
    "tsg": guidances.TSG,
    "autoguidance": guidances.Autoguidance,
    "swg": guidances.SWG,
    "slg": guidances.SLG,
    "ssg": guidances.SSG,
    "tag": guidances.TAG,
    "tsr": guidances.TSR,
}
PAGES = [("samplers", name) for name in SAMPLERS] + [("guidance", name) for name in [*GUIDANCE, "seg"]]
# What makes a run short.
SHORT = {
    "daps": {"ode_steps": 2, "mcmc_steps": 2},
    "pnpdm": {"iterations": 2},
    "resample": {"every": 2, "travel": 1, "pixel_iterations": 1, "latent_iterations": 1},
}


def page(kind, name):
    return (DOCS / kind / f"{name}.md").read_text(encoding="utf-8")


def table(text, first):
    """The rows of the table whose first column is headed `first`: name -> the other cells."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.startswith(f"| {first} |"))
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name.strip("`")] = cells
    rows.pop(next(iter(rows)))  # the rule below the head
    return rows


def literal(text):
    return float("inf") if text == "inf" else ast.literal_eval(text)


def check_options(text, function, parameters):
    """Names, defaults and ranges in a page are those of the signature."""
    rows, hints = table(text, "option"), ranges.read_hints(function)
    assert set(rows) == set(parameters) <= set(hints)
    for name, (default, allowed, *rest) in rows.items():
        assert len(rest) == 2 and all(rest), name
        assert hints[name] is Any or allowed == ranges.describe(hints[name]), name
        known = parameters[name].default
        if known is inspect.Parameter.empty:
            assert default == "required", name
        else:
            stated = literal(default.strip("`"))
            assert (type(stated), stated) == (type(known), known), name


def block(text, language):
    """The one line of the block in that language below the page's last heading."""
    (line,) = re.findall(rf"^```{language}\n(.*)\n```$", text.split("## Calling it")[1], re.MULTILINE)
    return line


def command(line):
    """The options of a `restore` command, read by the command line itself."""
    verb, *words = shlex.split(line)[1:]
    return typer.main.get_command(cli.app).commands[verb].make_context(verb, words).params


def keywords(line):
    (call,) = (node for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call))
    return call.args, {word.arg: ast.literal_eval(word.value) for word in call.keywords}


@pytest.fixture(scope="module")
def measured():
    operator = operators.SuperResolution(4, noise=operators.GaussianNoise(0.05))
    return restore.load("embedded"), operator, operator(torch.zeros(1, 3, 64, 64), torch.Generator().manual_seed(0))


def test_every_sampler_and_guidance_has_a_page():
    assert set(GUIDANCE) == set(guidances.TERMS)
    for kind in ("samplers", "guidance"):
        assert {path.stem for path in (DOCS / kind).glob("*.md")} == {name for k, name in PAGES if k == kind}
        overview = (DOCS / f"{kind}.md").read_text(encoding="utf-8")
        assert all(f"]({kind}/{name}.md)" in overview for k, name in PAGES if k == kind)


@pytest.mark.parametrize("name", SAMPLERS)
def test_options_of_a_sampler(name):
    function = generate if name == "generate" else samplers.find_sampler(name)
    check_options(page("samplers", name), function, samplers.sampler_parameters(function))


@pytest.mark.parametrize("name", GUIDANCE)
def test_options_of_a_guidance(name):
    """Python's signature, which is what YAML takes, with every field of a term."""
    stated = dict(inspect.signature(GUIDANCE[name]).parameters)
    check_options(page("guidance", name), GUIDANCE[name], stated)
    assert GUIDANCE[name] is guidances.TERMS[name]
    assert inspect.signature(base.Term).parameters.keys() <= stated.keys()


def test_targets_and_their_options():
    check_options(page("guidance", "seg"), targets.seg, inspect.signature(targets.seg).parameters)
    rows = table(page("guidance", "pag"), "target")
    assert set(rows) == set(targets.TARGETS)
    for name, (_, given) in rows.items():
        stated = dict((item + "=").split("=")[:2] for item in re.findall(r"`([^`]+)`", given))
        known = inspect.signature(targets.TARGET_FAMILIES[name]).parameters if name in targets.TARGET_FAMILIES else {}
        assert set(stated) == set(known)
        for option, default in stated.items():
            required = known[option].default is inspect.Parameter.empty
            assert literal(default) == known[option].default if default else required


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_the_calls_of_a_sampler_say_the_same(name):
    text = page("samplers", name)
    given = command(block(text, "bash"))
    _, settings = options.split_settings(given["inputs"])
    task = load_task(given["task"], settings)
    options.check_settings(settings, given["sampler"], given)
    said = (given["sampler"], options.parse_steps(given["steps"]), settings)
    kind = "pixels" if given["backbone"] == "embedded" else "latents"
    situation = Situation(given["backbone"], task.config["name"], given["task"], kind)
    preset = find_preset(situation, given["sampler"])
    assert preset.override(steps=said[1], parameters=settings).sampler == name

    _, python = keywords(block(text, "python"))
    guidance = python.pop("guidance", "preset")
    assert guidance == ("preset" if given["pag_scale"] is None else None)
    assert (python.pop("sampler"), python.pop("steps"), python) == said

    entry = yaml.safe_load(block(text, "yaml"))
    config = {"name": "n", "backbone": "embedded", "data": {"folder": "f"}, "tasks": {"sr4": "sr4"}, "methods": entry}
    loaded = load_config(config)["methods"][name]
    assert (loaded["sampler"], loaded["steps"], loaded["parameters"]) == said


def test_the_calls_of_generation_say_the_same():
    text = page("samplers", "generate")
    given = command(block(text, "bash"))
    (n,), python = keywords(block(text, "python"))
    eta = options.parse_ddim_eta(given["ddim_eta"])
    assert (given["n"], given["steps"], eta) == (ast.literal_eval(n), *python.values())
    assert set(python) <= set(inspect.signature(restore.Restorer.generate).parameters)
    entry = yaml.safe_load(block(text, "yaml"))
    config = {"name": "n", "kind": "generation", "backbone": "embedded", "tasks": {"t": {"count": 2}}, "methods": entry}
    config["metrics"] = {"names": ["kid_vgg16"], "reference": "f", "allow_small": True}
    loaded = load_config(config)["methods"]["ddim"]
    assert (loaded["steps"], loaded["parameters"]["eta"]) == (given["steps"], eta)


@pytest.mark.parametrize("name", [*GUIDANCE, "seg"])
def test_the_calls_of_a_guidance_say_the_same(name, measured):
    text = page("guidance", name)
    given = command(block(text, "bash"))
    pag = [given[key] or None for key in ("pag_scale", "layers", "target", "strength")]
    found = options.parse_guidance(given["guidance"], *pag)
    found = found.apply(None, []) if given["guidance"] is None else found
    python = guidances.as_guidance(eval(block(text, "python"), {"restore": restore}))
    assert found == python == guidances.build_guidance(yaml.safe_load(block(text, "yaml"))["guidance"])
    if given["backbone"] == "embedded":
        with estimator(measured[0].backbone, found):  # its layers and windows fit
            pass


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_are_as_the_page_says(name, measured):
    most, formula = re.search(r"\*\*Evaluations:\*\*(?: (at most))? `([^`]+)`", page("samplers", name)).groups()
    restorer, operator, y = measured
    if name == "generate":
        steps = []
        restorer.generate(1, steps=3, callback=steps.append)
        assert formula == "steps" and len(steps) == 3
        return
    values = {"steps": 6, **SHORT.get(name, {})}
    steps = "karras:6" if name == "pnpdm" else 6
    result = restorer(y, operator, sampler=name, guidance=None, steps=steps, **SHORT.get(name, {}))
    expected = eval(formula, {}, values)
    assert result.nfe <= expected if most else result.nfe == expected


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_evaluations_of_presets_are_as_the_overview_says(name, measured):
    overview = (DOCS / "samplers.md").read_text(encoding="utf-8")
    restorer, operator, y = measured
    (stated,) = re.findall(rf"^\|.*samplers/{name}\.md.*?(\d+)[^|]*\|$", overview, re.MULTILINE)
    if name == "pnpdm":  # whose formula is a bound
        assert restorer(y, operator, sampler=name, guidance=None).nfe == int(stated)
        return
    formula = re.search(r"\*\*Evaluations:\*\* `([^`]+)`", page("samplers", name))[1]
    kind = "latents" if name in ("psld", "resample") else "pixels"
    prior = "embedded-latent" if name == "psld" else "embedded"
    preset = find_preset(Situation(prior, "super_resolution", "sr4", kind), name).override(guidance=None)
    own = {key: item.default for key, item in samplers.sampler_parameters(name).items()}
    steps = len(restorer.backbone.schedule.timesteps(preset.steps))
    assert int(stated) == eval(formula, {}, {**own, **preset.parameters, "steps": steps})


@pytest.fixture(scope="module")
def pictures():
    spec = importlib.util.spec_from_file_location("make_pictures", DOCS / "make_pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_short_and_has_its_picture_or_says_why_not(pictures):
    drawn, total = {*pictures.SAMPLERS, *pictures.LATENT_SAMPLERS, *pictures.GUIDANCE, "generate"}, 0
    for kind, name in PAGES:
        text, path = page(kind, name), DOCS / kind / f"{name}.png"
        assert text.count("\n") < 80, name
        assert (f"]({name}.png)" in text) == path.is_file() == (name in drawn), name
        assert path.is_file() or re.search(r"^No picture: \w", text, re.MULTILINE), name
        size = path.stat().st_size if path.is_file() else 0
        assert size < 40_000, name
        total += size
    assert total < 600_000


@pytest.mark.parametrize(
    ("kind", "name"), [("samplers", "ddrm"), ("samplers", "generate"), ("guidance", "tsg"), ("", "pag-samples")]
)
def test_pictures_are_drawn_by_their_script(kind, name, pictures, measured, tmp_path):
    restorer = measured[0] if kind else restore.load("embedded-latent")
    path = pictures.draw_picture(restorer, name, tmp_path, steps=2)
    assert path == tmp_path / kind / f"{name}.png"
    with Image.open(path) as new, Image.open(DOCS / kind / f"{name}.png") as committed:
        assert new.size == committed.size and len(new.getcolors()) > 16
