"""precision=auto: bf16 where the processor has it. Only the probe of the processor is replaced, no arithmetic."""

from __future__ import annotations

import platform
import warnings

import pytest
import torch
from omegaconf import OmegaConf

import restore
from operators import RestoreError
from restore.backbones.precision import choose_precision, has_native_bf16, name_precision
from restore.paths import configs_dir
from restore.zoo.registry import read_registry

PRIORS = ("embedded-photo", "embedded")


@pytest.fixture(params=[True, False], ids=["native", "emulated"])
def native(request, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    return request.param


def test_auto_is_what_the_processor_has(native, tiny_adm):
    assert has_native_bf16("cpu") == native and not has_native_bf16("meta")
    expected = torch.bfloat16 if native else torch.float32
    assert choose_precision("auto", "cpu") == expected
    assert name_precision(expected) == ("bf16" if native else "fp32")
    x = torch.zeros(1, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # auto has nothing to warn of
        restorer = restore.load(tiny_adm, device="cpu", precision="auto")
    by_name = restore.load(tiny_adm, device="cpu", precision=name_precision(expected))
    assert restorer.backbone.dtype == expected
    assert torch.equal(restorer.backbone.predict(x, 10.0).eps, by_name.backbone.predict(x, 10.0).eps)
    assert restore.load(tiny_adm, device="cpu").backbone.dtype == torch.float32  # the default keeps its bytes


def test_a_prior_that_restores_as_well_in_bf16_says_so(native):
    """What `restore run` and the page load with; in Python only who says precision=None."""
    own = {name: restore.load(name, device="cpu", precision=None).backbone.dtype for name in PRIORS}
    assert own == {"embedded-photo": torch.bfloat16 if native else torch.float32, "embedded": torch.float32}
    assert restore.load("embedded-photo", device="cpu").backbone.dtype == torch.float32
    assert all(entry.precision in ("auto", "fp32") for entry in read_registry().values())


def test_a_path_has_no_precision_of_its_own(native, tiny_adm):
    assert restore.load(tiny_adm, device="cpu", precision=None).backbone.dtype == torch.float32


def test_who_asks_for_emulated_bf16_is_told(native, tiny_adm):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert restore.load(tiny_adm, device="cpu", precision="bf16").backbone.dtype == torch.bfloat16
        restore.load(tiny_adm, device="cpu", precision="fp32")
    said = [str(warning.message) for warning in caught if "bf16" in str(warning.message)]
    assert len(said) == (0 if native else 1)
    assert all("precision='auto'" in sentence for sentence in said)


def test_an_unknown_precision_is_refused_with_the_known_ones():
    with pytest.raises(RestoreError, match="precision must be one of auto, fp32, bf16, fp16, got 'int8'"):
        choose_precision("int8", "cpu")


def test_shipped_benchmarks_of_embedded_priors_ask_for_no_emulated_precision():
    """So none of them is slower than in fp32 on a processor without native bf16."""
    configs = [OmegaConf.load(path) for path in sorted((configs_dir() / "benchmark").glob("*.yaml"))]
    precisions = [c.get("precision", "fp32") for c in configs if str(c.get("backbone", "")).startswith("embedded")]
    assert len(precisions) > 3 and set(precisions) <= {"auto", "fp32"}
