"""The fixture `sim`: the pretended accelerator of tests/sim_device.py, and what has happened on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import sim_device

HERE = Path(__file__).resolve().parent


def pytest_ignore_collect(collection_path, config):
    """Only if nothing else is asked for: torch must know the device before its first backward pass, and cannot forget
    it. tests/test_device.py runs this folder in a process of its own."""
    asked = [Path(arg.split("::")[0]).resolve() for arg in config.args]
    return None if all(HERE in (path, *path.parents) for path in asked) else True


@pytest.fixture(scope="session")
def sim_registered():
    """Make the device known to torch."""
    if (reason := sim_device.missing()) is not None:
        pytest.skip(reason)
    sim_device.register()


@pytest.fixture
def sim(sim_registered):
    """Yield the Counts of what the test does on the device."""
    with sim_device.watch() as counts:
        yield counts
