"""Makes the helpers that lie beside the test folders importable, and gives every test the same number of threads."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _threads():
    """Rounding depends on the number of threads: no test may leave its own behind."""
    torch.set_num_threads(THREADS)
