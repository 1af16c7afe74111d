"""Networks in fewer operations: the same function, only without gradients, of whatever is put into the network."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from diffusers import UNet2DModel

import operators
import restore
from restore.backbones import convolution
from restore.backbones import lean as leaning
from restore.backbones.adm import ADM
from restore.backbones.lean import count_copies, run_lean
from restore.backbones.sizes import Sized
from restore.guidance import PAG, estimator


def make_adm(**config) -> ADM:
    """Of guided-diffusion's kind: noise levels scale and shift, attention, residual resampling, classes."""
    torch.manual_seed(0)
    config = {
        "in_channels": 3,
        "out_channels": 6,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": 3,
        "sample_size": 16,
    } | config
    return ADM(UNet2DModel(**config), null_class=2 if config["num_class_embeds"] else None)


def make_photo() -> ADM:
    """Of the prior of photos' kind: noise levels are added, no attention, convolutions resample, squares as cells."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    channels = {"in_channels": 12, "out_channels": 12, "block_out_channels": (16, 32), "norm_num_groups": 4}
    return ADM(UNet2DModel(sample_size=8, layers_per_block=1, **blocks, **channels), patch=2)


def make_ddpm() -> ADM:
    """Of the hub's DDPMs' kind: residual sums are divided, resampling pads."""
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    options = {"mid_block_scale_factor": 2.0, "downsample_padding": 0, "out_channels": 3, "num_class_embeds": None}
    resampling = {"resnet_time_scale_shift": "default", "downsample_type": "conv", "upsample_type": "conv"}
    return make_adm(**blocks, **options, **resampling)


KINDS = {"adm": make_adm, "photo": make_photo, "ddpm": make_ddpm}


def predict(backbone, x, lean, t=300.0):
    with torch.no_grad(), run_lean() if lean else nullcontext():
        prediction = backbone.predict(x, t)
    parts = (prediction.eps, prediction.variance)
    return torch.cat([part for part in parts if part is not None], 1)


def assert_close(found, expected):
    assert found.is_contiguous() == expected.is_contiguous()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_lean_is_the_same_function(kind, batch, monkeypatch):
    backbone, x, ran = KINDS[kind](), torch.randn(batch, 3, 16, 12), set()
    own = predict(backbone, x, False)
    for block, run in leaning.RUNS.items():

        def note(*args, block=block, run=run, **kwargs):
            ran.add(block.__name__)
            out = run(*args, **kwargs)
            assert out is not None  # or the block's own code would run
            return out

        monkeypatch.setitem(leaning.RUNS, block, note)
    backbone = KINDS[kind]()
    found = predict(backbone, x, True)
    assert_close(found, own)
    assert {"UNet2DModel", "ResnetBlock2D"} <= ran and ("Attention" in ran) == (kind != "photo")
    assert torch.equal(predict(backbone, x, True), found)
    assert not torch.equal(predict(backbone, x, True, 200.0), own)  # the noise level is not that of the last pass


@pytest.mark.parametrize("kind", KINDS)
def test_lean_is_the_same_function_in_bf16(kind, monkeypatch):
    """As near to fp32 as the blocks' own code is; weights are converted once a run, not once an evaluation."""
    x, ran = torch.randn(2, 3, 16, 12), []
    exact = predict(KINDS[kind](), x, False)
    backbone = KINDS[kind]()
    backbone.dtype = torch.bfloat16
    own = predict(backbone, x, False)
    lower = leaning._lower
    monkeypatch.setattr(leaning, "_lower", lambda weight: ran.append(1) or lower(weight))
    with torch.no_grad(), run_lean():
        found, again = (backbone.predict(x, 300.0) for _ in range(2))
    count = len(ran)
    found, again = (torch.cat([p for p in (out.eps, out.variance) if p is not None], 1) for out in (found, again))
    assert found.dtype == torch.float32 and found.is_contiguous() and torch.equal(found, again)
    errors = [(eps - exact).square().mean().sqrt() / exact.square().mean().sqrt() for eps in (found, own)]
    assert 1e-4 < errors[0] < 1.2 * errors[1] < 0.02
    layers = [m for m in backbone.network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert 0 < count <= len(layers)
    held = sum(layer.weight.nbytes for layer in layers)
    assert 0.4 * held < count_copies(backbone.network, low=True) < held


def test_wide_layers_take_fewer_products(monkeypatch):
    """As far as there is room for their weights in another form."""
    backbone, x, tiled = make_adm(block_out_channels=(96, 32)), torch.randn(2, 3, 16, 12), []
    convolve = convolution.convolve_tiles
    monkeypatch.setattr(convolution, "convolve_tiles", lambda *args: tiled.append(1) or convolve(*args))
    own, found = (predict(backbone, x, lean) for lean in (False, True))
    assert len(tiled) >= 4 and (found - own).abs().max() < 5e-5 * own.abs().max()
    monkeypatch.setattr(leaning, "COPIED", 0)
    assert_close(predict(backbone, x, True), own)
    assert count_copies(backbone.network) == 0


def test_with_gradients_nothing_changes():
    """The trajectories of DPS keep their bytes: its guided passes too, although they have no gradient."""
    backbone, plain, x = make_adm(), ADM(make_adm().network, null_class=2, lean=False), torch.randn(1, 3, 16, 16)
    for guidance in (None, PAG(1.0, layers="m1")):
        eps = {}
        for name, prior in (("lean", backbone), ("plain", plain)):
            with run_lean(), estimator(prior, guidance) as estimate:
                for _ in range(2):
                    x_t = x.clone().requires_grad_()
                    strong = estimate.strong(x_t, 300.0)
                    (grad,) = torch.autograd.grad(strong.eps.square().sum(), x_t)
                    eps[name] = torch.cat([grad, estimate.guided(strong, x_t, 300.0)])
        assert torch.equal(eps["lean"], eps["plain"])


def test_weak_passes_share_their_prefix_with_the_same_bits():
    backbone, x, found = make_adm(), torch.randn(1, 3, 16, 16), []
    for lean, options in ((True, {}), (True, {"share_prefix": False}), (False, {})):
        with torch.no_grad(), estimator(backbone, PAG(2.0, layers="m1"), **options) as estimate:
            with run_lean() if lean else nullcontext():
                found.append(torch.cat([estimate(x, t)[1] for t in (300.0, 299.0, 298.0)]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert_close(found[0], found[2])


def test_what_is_put_into_a_network_counts():
    """Hooks, layers in place of others and weights written between two runs."""
    backbone, x = make_adm(), torch.randn(1, 3, 16, 16)
    block = backbone.network.mid_block.resnets[0]
    before = predict(backbone, x, True)
    handle = block.conv2.register_forward_hook(lambda module, inputs, output: 2 * output)
    hooked = predict(backbone, x, True)
    assert_close(hooked, predict(backbone, x, False))
    assert (hooked - before).abs().max() > 1e-3
    handle.remove()
    block.conv2.weight.data *= 3
    assert_close(predict(backbone, x, True), predict(backbone, x, False))
    block.conv2 = torch.nn.Sequential(block.conv2, torch.nn.Hardtanh(-0.1, 0.1))
    replaced = predict(backbone, x, True)
    assert_close(replaced, predict(backbone, x, False))
    assert (replaced - before).abs().max() > 1e-3


def test_samplers_without_gradients_run_lean_unless_told_not_to(tiny_adm):
    operator = operators.SuperResolution(2, noise=operators.GaussianNoise(0.05))
    y = operator(torch.rand(1, 3, 16, 16), torch.Generator().manual_seed(0))
    call = {"sampler": "diffpir", "steps": 3, "lam": 1.0, "zeta": 0.5, "guidance": None}
    restorers = {on: restore.load(tiny_adm, device="cpu", lean=on) for on in (True, False)}
    results = {on: restorer(y, operator, **call) for on, restorer in restorers.items()}
    assert_close(results[True].samples, results[False].samples)
    assert not torch.equal(results[True].samples, results[False].samples)
    assert results[False].protocol["model_options"] == {"lean": False}
    assert torch.equal(restorers[True](y, operator, **call).samples, results[True].samples)
    prior = Sized(restorers[True].backbone, 24, 16)
    with torch.no_grad(), run_lean(), estimator(prior) as estimate:
        windows = estimate(torch.randn(1, 3, 24, 16), 100.0)[1]
    assert windows.is_contiguous()
