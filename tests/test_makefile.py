"""What `make` would run on a fresh machine."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def list_installs(*arguments):
    command = ["make", "--dry-run", "--always-make", "VENV=absent", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "pip install" in line and "--upgrade pip" not in line]


def test_the_demo_installs_no_extra():
    (line,) = list_installs("demo")
    assert line.endswith(" -e .") and "constraints.txt" in line


def test_torch_alone_comes_from_an_index_of_the_users():
    index = "https://download.pytorch.org/whl/cpu"
    for goal in ("demo", "test"):
        torch, rest = list_installs(goal, f"TORCH_INDEX={index}")[-2:]
        assert torch.endswith(f"--index-url {index} torch torchvision") and index not in rest
    assert index in (ROOT / "README.md").read_text(encoding="utf-8")
