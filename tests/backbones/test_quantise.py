"""SD3 and FLUX with weights of 8 bits, in samplers with and without gradients through the network."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import tiny_flow
import torch

import operators
import restore
from operators import RestoreError
from restore.protocol import _list_tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny_flow.save_folder(kind, tmp_path_factory.mktemp(kind) / kind) for kind in ("sd3", "flux")}


def count_bytes(backbone):
    """Of the linear layers' weights, with the scales of quantised ones."""
    parts = [part for name, part in _list_tensors(backbone) if ".attn." in name and ".weight" in name]
    return sum(part.numel() * part.element_size() for part in parts)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("choice, error", [("int8", 0.02), ("fp8", 0.08)])
def test_predictions_and_gradients(folders, kind, choice, error):
    pytest.importorskip("torchao", reason="torchao is not installed")
    full, small = (restore.load(folders[kind], device="cpu", quantise=name) for name in (None, choice))
    generator = torch.Generator().manual_seed(0)
    x, d = torch.randn(2, 1, full.backbone.channels, 8, 8, generator=generator)
    exact = full.backbone.predict(x, 500.0).eps
    ours = small.backbone.predict(x.requires_grad_(), 500.0).eps
    assert 1e-4 < (ours - exact).norm() / exact.norm() < error
    (gradient,) = torch.autograd.grad(ours.square().sum(), x)
    with torch.no_grad():
        energy = [small.backbone.predict(x + h * d, 500.0).eps.double().square().sum() for h in (1e-3, -1e-3)]
    assert float((gradient * d).sum()) == pytest.approx(float(energy[0] - energy[1]) / 2e-3, rel=1e-2)
    assert count_bytes(small.backbone) < 0.5 * count_bytes(full.backbone)


def test_restores_with_guidance_and_says_so_in_the_protocol(folders):
    pytest.importorskip("torchao", reason="torchao is not installed")
    A = operators.SuperResolution(2, noise=operators.GaussianNoise(0.05))
    y = A(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    results = []
    for choice in ("int8", None):
        restorer = restore.load(folders["sd3"], device="cpu", quantise=choice)
        results += [
            restorer(y, A, sampler=name, steps=2, guidance=restore.PAG(1.0, "b1:0")) for name in ("flowdps", "dps")
        ]
    for ours, full in zip(results[:2], results[2:], strict=True):
        assert 0 < (ours.samples - full.samples).abs().mean() < 0.05
        assert ours.protocol["weights"] != full.protocol["weights"]
    assert "int8" in str(results[0].protocol["network"])


def test_mistakes_are_one_sentence(folders, monkeypatch):
    with pytest.raises(RestoreError, match="quantise has no choice 'int4'"):
        restore.load(folders["sd3"], device="cpu", quantise="int4")
    with pytest.raises(RestoreError, match="no option 'quantise'"):
        restore.load("embedded", device="cpu", quantise="int8")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(RestoreError, match="quantise=int8 needs torchao"):
        restore.load(folders["sd3"], device="cpu", quantise="int8")


def test_notices_of_libraries_are_not_shown():
    """diffusers imports an installed torchao with any network; what that says is nothing a user can act on."""
    notices = {
        "torch.utils._pytree": "%s is an Enum subclass. Calling register_constant() on Enum subclasses is deprecated",
        "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects. This may affect",
    }
    for name, text in notices.items():
        records = [logging.makeLogRecord({"name": name, "msg": msg}) for msg in (text, "another warning")]
        assert [bool(logging.getLogger(name).filter(record)) for record in records] == [False, True]


def test_loading_says_nothing(folders):
    pytest.importorskip("torchao", reason="torchao is not installed")
    load = f"import restore; restore.load({str(folders['sd3'])!r}, device='cpu', quantise='int8')"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
