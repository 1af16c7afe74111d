"""A prior in float64 and a batch for it."""

from __future__ import annotations

import pytest
import torch
from weak_passes import double_adm


@pytest.fixture(scope="module")
def model():
    return double_adm()


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
