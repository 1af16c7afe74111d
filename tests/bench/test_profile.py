"""The cost profile runs and its variants compute the same step."""

import pytest
import torch

from operators import RestoreError
from restore.bench.profile import VARIANTS, profile


def test_profile_reports_every_variant_and_phase():
    text = profile(size=32, repeats=1, memory_size=0, psld=False)
    for name in VARIANTS:
        assert f"{name} | " in text
    for phase in ("strong pass", "weak pass", "operator", "backward", "update"):
        assert f"{phase} | " in text
    with pytest.raises(RestoreError, match="divisible by 32"):
        profile(size=100)
    assert torch.is_grad_enabled()
