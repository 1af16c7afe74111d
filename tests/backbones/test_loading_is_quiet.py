"""Loading a model prints nothing, with and without accelerate."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
if {hide}:
    sys.modules["accelerate"] = None
import restore
restore.load("embedded-latent", device="cpu")
"""


@pytest.mark.parametrize("hide", [False, True])
def test_loading_a_latent_model_prints_nothing(hide):
    call = [sys.executable, "-c", CODE.format(hide=hide)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
