"""Loading a model prints nothing without accelerate; tests/backbones/test_lazy_modules.py has the same with it."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
sys.modules["accelerate"] = None
import restore
restore.load("embedded-latent", device="cpu")
"""


def test_loading_a_latent_model_prints_nothing():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
