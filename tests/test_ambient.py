"""Torch's state around a call changes no byte of a result; weights are hashed as they are."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import operators
import restore
from restore import samplers
from restore.backbones.ambient import no_autocast
from restore.backbones.sizes import Sized
from restore.batch import measure_batch

BLOCKS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
PIXELS = [name for name in samplers.SAMPLERS if name not in ("flowdps", "psld", "resample")]
OWN = {"dps": {"zeta": 1.0}, "daps": {"ode_steps": 2, "mcmc_steps": 2}, "pnpdm": {"iterations": 3}}


@contextmanager
def double_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def on_another_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


STATES = {
    "default dtype": double_by_default,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": on_another_device,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    options = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 8, **BLOCKS}
    network = UNet2DModel(sample_size=16, in_channels=3, out_channels=3, **options)
    folder = tmp_path_factory.mktemp("prior")
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    return folder


def restore_all(folder):
    """Results of every pixel sampler, of windows, of samples and of measured batches, by name."""
    restorer, results = restore.load(folder, device="cpu"), {}
    x = (torch.arange(3 * 24 * 24, dtype=torch.float32, device="cpu").reshape(1, 3, 24, 24) % 7) / 3.5 - 1
    config = {"name": "gaussian_blur", "kernel_size": 9, "noise": {"name": "gaussian", "sigma": 0.05}}
    A, y = measure_batch(config, x, ["a"])
    results["measured"] = y
    masks = {"name": "inpainting_random", "noise": config["noise"]}
    results["masked"] = measure_batch(masks, x, ["a"], per_image=True)[1]
    for name in PIXELS:
        options = {"guidance": restore.PAG(0.5, layers="m1"), "steps": 2, "seed": 3, **OWN.get(name, {})}
        results[name] = restorer(y, A, sampler=name, **options).samples
    results["generate"] = restorer.generate(1, steps=2, seed=5)
    return results


@pytest.fixture(scope="module")
def expected(folder):
    return restore_all(folder)


@pytest.mark.parametrize("name", STATES)
def test_torchs_state_changes_no_byte(folder, expected, name):
    with STATES[name]():
        found = restore_all(folder)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


@pytest.mark.parametrize("name", ["embedded", "embedded-latent"])
def test_a_prior_itself_predicts_in_its_own_precision(name):
    """Also where a sampler is called without a Restorer."""
    prior = Sized(restore.load(name, device="cpu").backbone, 32, 32)
    z = torch.randn(1, *prior.shape, generator=torch.Generator().manual_seed(0))
    label = getattr(prior.inner, "null_condition", None)
    with torch.no_grad():
        expected = prior.predict(z, 300, label).eps, prior.decode(z)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = prior.predict(z, 300, label).eps, prior.decode(z)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_no_autocast_is_off_inside_and_as_before_outside():
    a = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with no_autocast("cpu"):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


CHANGES = {
    "in place": lambda p: p.mul_(1.5),
    "data": lambda p: p.data.add_(0.25),
    "one value": lambda p: p.data.view(-1)[-1:].add_(1e-3),
    "order": lambda p: p.data.copy_(p.data.flip(0)),
    "replaced": lambda p: setattr(p, "data", p.data + 1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("layer", ["conv_in.weight", "mid_block.resnets.0.conv1.weight"])
def test_weights_changed_in_memory_have_another_hash(folder, change, layer):
    restorer = restore.load(folder, device="cpu")
    before, parameter = restorer.weights_hash(), dict(restorer.backbone.network.named_parameters())[layer]
    kept = parameter.detach().clone()
    with torch.no_grad():
        CHANGES[change](parameter)
        changed = restorer.weights_hash()
        parameter.data = kept
    assert changed != before and restorer.weights_hash() == before


def test_the_protocol_states_the_arithmetic(folder):
    restorer, A = restore.load(folder, device="cpu"), operators.Denoising(noise=operators.GaussianNoise(0.1))
    method = restorer.method(A, sampler="diffpir", steps=2)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        torch.use_deterministic_algorithms(True)
        assert restorer.protocol(A, method)["arithmetic"] == {"float32_matmul_precision": "high", "deterministic": True}
    finally:
        torch.set_float32_matmul_precision(before)
        torch.use_deterministic_algorithms(False)
    assert restorer.protocol(A, method)["arithmetic"] == {"float32_matmul_precision": before, "deterministic": False}
