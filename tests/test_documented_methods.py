"""Commands of the documents that name a downloaded prior do what the words beside them say; those that name none run on
larger pictures too.

Each is parsed and resolved by the real command line, with a stand-in network under the prior's name, up to the method.
"""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from restore import restorer, samplers, zoo
from restore.app import choice, cli, samples
from restore.app.options import split_settings
from restore.guidance import describe_guidance
from restore.method import Method, find_generation
from restore.paths import data_dir

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMES = {"DPS": "dps", "PSLD": "psld", "DiffPIR": "diffpir", "DAPS": "daps", "FlowDPS": "flowdps"}


def list_commands():
    """The lines of all pages that restore or generate."""
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:2] in (["restore", "run"], ["restore", "generate"]):
                    yield page.name, words, line.partition(" # ")[2].strip()


def find_commands(stand_ins):
    """Those with one of the priors that have a stand-in."""
    for page, words, comment in list_commands():
        if "--backbone" in words and words[words.index("--backbone") + 1] in stand_ins:
            yield page, words, comment


@pytest.fixture
def resolve(tmp_path, monkeypatch, command, stand_ins):
    """resolve(words) -> the Method of the command."""
    load_backbone = zoo.load_backbone

    def load(name, **options):
        found, backbone = load_backbone(stand_ins.get(name, name), **options)
        return replace(found, name=name), backbone

    class Resolved(Exception):
        pass

    resolved: list[Method] = []
    resolve_choice = choice.MethodChoice.resolve

    def stop(method):
        resolved.append(method)
        raise Resolved

    monkeypatch.setattr(restorer.zoo, "load_backbone", load)
    monkeypatch.setattr(choice.MethodChoice, "resolve", lambda *given, **more: stop(resolve_choice(*given, **more)))

    def generate(out, model, *, steps, ddim_eta, guidance, **options):
        stop(replace(find_generation(model.name, steps, ddim_eta), guidance=guidance))

    monkeypatch.setattr(samples, "generate_files", generate)
    monkeypatch.chdir(tmp_path)
    for name in ("face.png", "photo.png", "00014.png", "samples/00014.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(data_dir() / "photos" / "astronaut-face-64.png", tmp_path / name)

    def run(words):
        try:
            pytest.fail(f"{shlex.join(words)}: {command(*words[1:])[2]}")
        except Resolved:
            return resolved.pop()

    return run


def test_commands_of_published_priors_resolve_to_what_is_written_beside_them(resolve, stand_ins):
    checked = 0
    for page, words, comment in find_commands(stand_ins):
        method = resolve(words)
        told = (page, " ".join(words), comment, method)
        first = comment.split(";")[0]  # what follows is about another command
        named = [NAMES[name] for name in NAMES if re.search(rf"(?<!\w){name}(?!\w)", first)]
        assert not named or named == [samplers.sampler_name(method.sampler)], told
        terms = [next(iter(term)) for term in describe_guidance(method.guidance) or []]
        if named or "PAG" in first:
            assert ("PAG" in first) == ("pag" in terms), told
        for source in re.findall(r"Table \d+|App\. [A-E]\.\d", first):
            assert source in method.source, told
            checked += 1
        if words[1] == "run" and "sd-1.5" in words:  # trained at 512; the published results are solved there
            assert words[words.index("--solve-at") + 1] == "512", told
    assert checked >= 4


def test_a_generation_command_takes_the_published_layers(resolve):
    for backbone, steps, eta, layers in (
        (
            "adm-imagenet-256",
            250,
            None,
            ["input_blocks.14.1", "input_blocks.16.1", "input_blocks.17.1", "middle_block.1"],
        ),
        ("sd-1.5", 50, 0.0, ["mid_block.attentions.0.transformer_blocks.0.attn1"]),
    ):
        method = resolve(shlex.split(f"restore generate --backbone {backbone} --pag-scale 1 -o samples/"))
        assert (method.steps, method.parameters) == (steps, {"ddim_eta": eta})
        assert describe_guidance(method.guidance) == [{"pag": {"scale": 1.0, "layers": layers}}]


def test_commands_without_a_prior_resolve_for_larger_pictures_too(resolve):
    """Up to 64 pixels a face gets another prior, with another sampler and other settings."""
    picture = Image.open(data_dir() / "photos" / "chelsea.jpg").crop((100, 60, 196, 156))
    checked = 0
    for page, words, _ in list_commands():
        if words[1] != "run" or "--backbone" in words:
            continue
        given = typer.main.get_command(cli.app).commands["run"].make_context("run", words[2:]).params
        for name in split_settings(given["inputs"])[0]:
            path = Path(name) / "a.png" if name.endswith("/") else Path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        if given["mask"] is not None:
            Image.fromarray(np.pad(np.zeros((8, 8), np.uint8), 44, constant_values=255)).save(given["mask"])
        if given["kernel"] is not None:
            np.save(given["kernel"], np.full((3, 5), 1 / 15))
        if (given["guidance"] or "").endswith(".yaml"):
            Path(given["guidance"]).parent.mkdir(parents=True, exist_ok=True)
            Path(given["guidance"]).write_text("{pag: {scale: 1, layers: i5}}")
        assert resolve(words), (page, words)
        checked += 1
    assert checked >= 12
