"""The cost profile runs and its variants compute the same step."""

import pytest
import torch

from benchmarks.measure import parse_settings, run_command, run_in_new_process
from benchmarks.profile import VARIANTS, TwoSteps, make_backbone, profile
from operators import RestoreError


@pytest.mark.slow
def test_all_variants_compute_the_same_steps():
    steps = TwoSteps(make_backbone(), 32, 2)
    after = {name: variant(steps)[1] for name, variant in VARIANTS.items()}
    plain, guided = after["DPS, written out"], after["DPS+PAG, two passes"]
    assert torch.allclose(after["DPS"], plain, rtol=1e-4, atol=1e-4)
    for name in ("DPS+PAG, batched", "DPS+PAG, shared prefix"):
        assert torch.allclose(after[name], guided, rtol=1e-4, atol=1e-4), name
    assert (guided - plain).abs().max() > 1e-2, "guidance did nothing"


@pytest.mark.slow
def test_profile_reports_every_variant_and_phase():
    text = profile(size=32, repeats=1, memory_size=0)
    for name in VARIANTS:
        assert f"{name} | " in text
    for phase in ("strong pass", "weak pass", "operator", "backward", "update"):
        assert f"{phase} | " in text
    with pytest.raises(RestoreError, match="divisible by 32"):
        profile(size=100)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("setting", ["size=abc", "repeats=1.5", "device=[cpu]", "foo=1", "size"])
def test_settings_are_checked(setting):
    assert parse_settings(profile, ["size=64", "device=cpu"])["size"] == 64
    with pytest.raises(RestoreError, match=setting.split("=")[0]):
        parse_settings(profile, [setting])
    with pytest.raises(SystemExit, match=setting.split("=")[0]):
        run_command(profile, [setting])


def test_peak_memory_is_that_of_a_new_process():
    code = "import torch; from benchmarks.measure import measure_peak; "
    run = "lambda: torch.ones(2**20, 8).sum()"  # 32 MiB
    assert 31 < run_in_new_process(f"{code}print(measure_peak({run}, 'cpu'))", "ones") < 64
    with pytest.raises(RestoreError, match="ones failed: ZeroDivisionError"):
        run_in_new_process("1 / 0", "ones")
