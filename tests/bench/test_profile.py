"""The cost profile runs and its variants compute the same step."""

import pytest
import torch

from operators import RestoreError
from restore.bench.profile import VARIANTS, Bench, ffhq_backbone, profile


def test_all_variants_compute_the_same_steps():
    bench = Bench(ffhq_backbone(), 32, 2)
    after = {name: variant(bench)[1] for name, variant in VARIANTS.items()}
    plain, guided = after["DPS, written out"], after["DPS+PAG, two passes"]
    assert torch.allclose(after["DPS"], plain, rtol=1e-4, atol=1e-4)
    for name in ("DPS+PAG, batched", "DPS+PAG, shared prefix"):
        assert torch.allclose(after[name], guided, rtol=1e-4, atol=1e-4), name
    assert (guided - plain).abs().max() > 1e-2, "guidance did nothing"


def test_profile_reports_every_variant_and_phase():
    text = profile(size=32, repeats=1, memory_size=0, psld=False)
    for name in VARIANTS:
        assert f"{name} | " in text
    for phase in ("strong pass", "weak pass", "operator", "backward", "update"):
        assert f"{phase} | " in text
    with pytest.raises(RestoreError, match="divisible by 32"):
        profile(size=100)
    assert torch.is_grad_enabled()
