"""Code in the current folder runs only if the user names it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from operators import naming
from restore.paths import data_dir

ROOT = Path(__file__).parents[2]
SAMPLER = "def mine(prior, operator, y, *, noise, steps, **_):\n    return operator.A_adjoint(y)\n"


def test_a_module_beside_the_photo_is_not_imported_by_a_library(tmp_path):
    """Pillow's and transformers' optional modules: one of that name in the folder is somebody else's code."""
    entry = tmp_path / "bin" / "entry.py"  # like an entry point: the current folder is not on Python's path
    folder = tmp_path / "downloaded"
    for path in (entry.parent, folder):
        path.mkdir()
    entry.write_text("from restore.app.cli import main\nmain()\n")
    shutil.copy(data_dir() / "photos" / "astronaut-face-64.png", folder / "old.png")
    (folder / "own.py").write_text(SAMPLER)
    for name in ("pillow_heif", "sentencepiece", "google"):
        (folder / f"{name}.py").write_text(f"open('executed-{name}', 'w').close()\n")
    run = ["run", "old.png", "--task", "denoise", "--sampler", "own:mine", "--steps", "1", "-o", "out"]
    for arguments in (["look", "old.png"], run):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(entry), *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (folder / "out" / "old.png").is_file() and not list(folder.glob("executed-*"))


def test_what_is_installed_is_imported_without_the_users_folder(tmp_path, monkeypatch):
    """Shipped samplers are named like the user's own, as module:function; what they import is not looked for there."""
    seen = {}

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            seen[name] = str(tmp_path) in sys.path

    (tmp_path / "users_own_module.py").write_text("value = 1\n")
    monkeypatch.setattr(naming, "MODULE_FOLDERS", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "json.tool", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    before = list(sys.path)
    assert callable(naming.import_object("json.tool:main", "thing")) and seen["json.tool"] is False
    assert naming.import_object("users_own_module:value", "thing") == 1 and seen["users_own_module"] is True
    assert sys.path == before
