"""The tests on the pretended accelerator, in a process of their own: see tests/device/conftest.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sim_device

FOLDER = Path(__file__).parent / "device"


@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_device(marker):
    if (reason := sim_device.missing()) is not None:
        pytest.skip(reason)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-m",
        marker,
        str(FOLDER),
    ]
    done = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]
