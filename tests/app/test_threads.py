"""Threads of a command sleep while they wait; a user's own choice stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from restore.app import threads

ROOT = Path(__file__).parents[2]
RUN = """
import os, sys
sys.argv = ["restore", "--version"]
from restore.app.cli import main
try:
    main()
except SystemExit:
    pass
print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)
"""


def test_the_command_sets_it_before_torch_is_loaded():
    environment = {k: v for k, v in os.environ.items() if k not in threads.SETTINGS} | {"PYTHONPATH": str(ROOT)}
    options = {"capture_output": True, "text": True, "env": environment, "check": True}
    assert subprocess.run([sys.executable, "-c", RUN], **options).stdout.splitlines()[-1] == "PASSIVE False"


@pytest.mark.parametrize("name", threads.SETTINGS)
def test_what_the_user_has_set_stays(monkeypatch, name):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    chosen, nothing = {name: "1"}, {}
    threads.let_threads_sleep(chosen)
    threads.let_threads_sleep(nothing)
    assert (chosen, nothing) == ({name: "1"}, {"OMP_WAIT_POLICY": "PASSIVE"})


def test_it_is_not_set_where_it_would_be_without_effect():
    import torch  # noqa: F401

    environment = {}
    threads.let_threads_sleep(environment)
    assert environment == {}
