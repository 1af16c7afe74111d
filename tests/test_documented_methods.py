"""Commands of the documents that name a downloaded prior do what the words beside them say.

Each is parsed and resolved by the real command line, with a stand-in network under the prior's name, up to the method.
"""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from restore import restorer, samplers, zoo
from restore.app import choice, samples
from restore.guidance import describe_guidance
from restore.method import Method, find_generation
from restore.paths import data_dir

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMES = {"DPS": "dps", "PSLD": "psld", "DiffPIR": "diffpir", "DAPS": "daps", "FlowDPS": "flowdps"}


def find_commands(stand_ins):
    """The lines of all pages that restore or generate with one of the priors that have a stand-in."""
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                backbone = words[words.index("--backbone") + 1] if "--backbone" in words else None
                if words[:2] in (["restore", "run"], ["restore", "generate"]) and backbone in stand_ins:
                    yield page.name, words, line.partition(" # ")[2].strip()


@pytest.fixture
def resolve(tmp_path, monkeypatch, command, stand_ins):
    """resolve(words) -> the Method of the command."""
    load_backbone = zoo.load_backbone

    def load(name, **options):
        found, backbone = load_backbone(stand_ins[name], **options)
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
        with pytest.raises(Resolved):
            command(*words[1:])
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
