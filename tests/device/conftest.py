"""The fixture `sim`: the pretended accelerator of tests/sim_device.py, and what has happened on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import sim_device


def pytest_collection_modifyitems(items):
    """Last in a run: torch cannot forget a device, whose autograd has a thread of its own."""
    here = Path(__file__).parent
    items.sort(key=lambda item: here in item.path.parents)  # the sort is stable


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
