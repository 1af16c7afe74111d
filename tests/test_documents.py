"""The documents are true: their Python runs, their commands succeed, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import typer
import yaml

import restore
from restore.app import cli
from restore.app.choice import PAGOverride
from restore.app.options import check_settings, parse_guidance, split_settings
from restore.guidance import build_guidance, estimator
from restore.paths import data_dir
from restore.task import load_task

ROOT = Path(__file__).parents[1]
COMING_FROM = ROOT / "docs" / "coming-from.md"
RUN = [*sorted((ROOT / "docs" / "tutorials").glob("*.md")), ROOT / "CONTRIBUTING.md", COMING_FROM]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    """Python blocks share one namespace; of the commands those of `restore` run. `py`, `sh` and `text` are not run."""
    shutil.copytree(data_dir() / "photos", tmp_path / "data" / "photos")
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(page.stem.replace("-", "_"))
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look their module up
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    for language, text in blocks:
        if language == "python":
            exec(compile(text, f"{page.name}: {text.splitlines()[0]}", "exec", dont_inherit=True), module.__dict__)
            continue
        for line in text.splitlines():
            if line.startswith("restore "):
                monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
                with pytest.raises(SystemExit) as stop:
                    cli.main()
                assert not stop.value.code, (line, capsys.readouterr().err)


def test_readme_is_short_and_its_python_runs_as_printed(tmp_path, monkeypatch):
    assert len(README.split()) <= 700
    shutil.copytree(data_dir() / "photos", tmp_path / "data" / "photos")
    monkeypatch.chdir(tmp_path)
    (example,) = [text for language, text in BLOCK.findall(README) if language == "python"]
    exec(compile(example, "README.md", "exec", dont_inherit=True), {})
    assert (tmp_path / "restored.png").is_file()


PAGES = [*ROOT.glob("*.md"), *(page for name in ("data", "docs", "benchmarks") for page in (ROOT / name).rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


def test_programs_that_the_documents_name_exist():
    texts = (page.read_text(encoding="utf-8") for page in PAGES)
    named = {name for text in texts for name in re.findall(r"\b(?:tests|benchmarks)/[\w/]+\.py\b", text)}
    assert len(named) > 3 and not [name for name in named if not (ROOT / name).is_file()]


def test_commands_beside_those_of_other_repositories_are_understood():
    """They need downloaded weights, so only their options, task and settings are checked."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", COMING_FROM.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for line in [line for block in blocks for line in block.splitlines()]:
        verb, *words = shlex.split(line)[1:]
        given = typer.main.get_command(cli.app).commands[verb].make_context(verb, words).params
        if verb == "run":
            _, settings = split_settings(given["inputs"])
            load_task(given["task"], settings)
            check_settings(settings, given["sampler"], given)
    assert len(blocks) == 3


def test_guidance_of_the_guidance_page_is_understood():
    """Its YAML and its commands, bound to the shipped prior where they are for it."""
    text = (ROOT / "docs" / "guidance.md").read_text(encoding="utf-8")
    backbone = restore.load("embedded").backbone
    blocks = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for block in blocks:
        guidance = build_guidance(yaml.safe_load(block)["guidance"])
        if "cfg" not in block:
            with estimator(backbone, guidance):
                pass
    commands = [line for _, block in BLOCK.findall(text) for line in block.splitlines() if line.startswith("restore ")]
    for line in commands:
        words = shlex.split(line)
        given = {name: words[words.index(name) + 1] for name in words if name.startswith("--") and name != "--degrade"}
        pag = [given.get(name) for name in ("--layers", "--target", "--strength")]
        guidance = parse_guidance(given.get("--guidance"), 1.0 if "--pag-scale" in given else None, *pag)
        if isinstance(guidance, PAGOverride):
            guidance = guidance.apply(None, [])
        with estimator(backbone, None if "--backbone" in given else guidance):
            pass
    assert len(blocks) >= 3 and len(commands) >= 3


def test_site_is_built_without_a_warning(tmp_path):
    """Every page is in the menu, every link and anchor exists, every name in the API pages is documented."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "api" / "samplers" / "index.html").read_text(encoding="utf-8")
    pages = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [page for page in pages if page.as_posix() not in menu]
    assert "restore.samplers.diffpir.diffpir" in api and "Zhu et al. 2023" in api
