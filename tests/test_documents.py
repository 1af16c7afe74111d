"""The documents are true: their Python runs, their commands end well, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from restore.app import cli
from restore.paths import data_dir

ROOT = Path(__file__).parents[1]
RUN = [*sorted((ROOT / "docs" / "tutorials").glob("*.md")), ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    """Python blocks share one namespace; of the commands those of `restore` run, in the same folder."""
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


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md", *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


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
