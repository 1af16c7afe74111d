"""The shared prefix of whole networks: the modules found, and that replaying their outputs changes no bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from restore.backbones import adm_weights
from restore.backbones.adm import ADM
from restore.backbones.attention_layers import find_attention_layers
from restore.backbones.memory_options import enable_block_checkpointing
from restore.backbones.prefix import Tape, Trace
from restore.guidance.attention import PerturbedLayer, perturb_attention
from restore.guidance.targets import identity

GOLDEN = Path(__file__).parent.parent / "golden"


def adm(checkpointing=False):
    model = ADM.load(GOLDEN / "nets/adm_a.safetensors", head_channels=16)
    if checkpointing:
        enable_block_checkpointing(model)
    return model


@pytest.fixture(scope="module")
def model():
    return adm()


def names(network, modules):
    known = {module: name for name, module in network.named_modules()}
    return [known[module] for module in modules]


def trace_pass(network, *args, **kwargs):
    trace = Trace(network)
    with torch.no_grad(), trace.record():
        network(*args, **kwargs)
    return trace


def tape_before(changed, network, *args, **kwargs):
    tape = Tape([changed])
    tape.follow(trace_pass(network, *args, **kwargs))
    return tape


def perturb_all(layers):
    return [PerturbedLayer(layer, identity) for layer in layers]


def no_draw(kind, shape):
    raise AssertionError("the identity draws nothing")


def state_of(network):
    """Everything replay and perturbation touch: instance forwards, hooks, processors."""
    return [
        (m.__dict__.get("forward"), dict(m._forward_hooks), dict(m._forward_pre_hooks), getattr(m, "processor", None))
        for m in network.modules()
    ]


def test_prefix_is_the_largest_modules_before_the_layer(model):
    network, x = model.network, torch.zeros(1, 3, 32, 32)
    trace = trace_pass(network, x, 1)
    at_i7 = trace.prefix([network.get_submodule("down_blocks.3.attentions.0")])
    assert names(network, at_i7) == [
        "time_proj",
        "time_embedding",
        "conv_in",
        "down_blocks.0",
        "down_blocks.1",
        "down_blocks.2",
        "down_blocks.3.resnets.0",
    ]
    # The earliest of several layers decides; a layer that the pass never reaches gives nothing to share.
    several = [network.get_submodule(p) for p in ("up_blocks.0.attentions.1", "mid_block.attentions.0")]
    expected = names(network, at_i7)[:-1] + ["down_blocks.3", "mid_block.resnets.0"]
    assert names(network, trace.prefix(several)) == expected
    assert trace.prefix([nn.Linear(1, 1)]) == []


def weak_pass(model, layers, x, t=300):
    with torch.no_grad(), perturb_attention(perturb_all(layers), no_draw):
        return model.predict(x, t).eps


@pytest.mark.parametrize("short", ["i5", "i7", "m1", "o2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bit_equal_to_two_passes(short, checkpointing):
    model = adm(checkpointing)
    before = state_of(model.network)
    layers = [layer for layer in model.attention.values() if layer.short == short]
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x_plain, x_shared = x.clone().requires_grad_(), x.clone().requires_grad_()

    plain = model.predict(x_plain, 300)
    weak_plain = weak_pass(model, layers, x)
    grad_plain = torch.autograd.grad(plain.eps.square().sum(), x_plain)[0]

    tape = tape_before(layers[0].module, model.network, torch.zeros(1, 3, 16, 16), 1)
    with tape.record():
        shared = model.predict(x_shared, 300)
    assert tape.recorded and len(tape.queues) >= 6
    with tape.replay():
        weak_shared = weak_pass(model, layers, x)
    grad_shared = torch.autograd.grad(shared.eps.square().sum(), x_shared)[0]

    assert torch.equal(plain.eps, shared.eps)
    assert torch.equal(weak_plain, weak_shared) and not torch.equal(weak_plain, plain.eps.detach())
    assert torch.equal(grad_plain, grad_shared)
    assert state_of(model.network) == before
    assert not any(tape.queues.values())


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that are really computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_prefix_is_not_computed_in_the_weak_pass(model):
    layers = [layer for layer in model.attention.values() if layer.short == "m1"]
    convolutions = [n for n, m in model.network.named_modules() if isinstance(m, nn.Conv2d)]
    after = [n for n in convolutions if n.startswith(("mid_block.resnets.1", "up_blocks", "conv_out"))]
    x = torch.zeros(1, 3, 32, 32)
    tape = tape_before(layers[0].module, model.network, x, 300)
    with tape.record(), torch.no_grad(), Convolutions() as strong:
        model.predict(x, 300)
    with tape.replay(), torch.no_grad(), Convolutions() as weak:
        weak_pass(model, layers, x)
    assert (strong.count, weak.count) == (len(convolutions), len(after))


def test_flops_saved_on_the_published_ffhq_network():
    """Shares before the first perturbed layer at 256 px, counted on the meta device: 19.5, 20.2, 22.5 %."""
    shapes = json.loads((GOLDEN / "adm_manifest.json").read_text())["models"]["dps_ffhq_10m"]["state_dict"]
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    network = adm_weights.convert_state(state, Path("model.pt"))
    network.requires_grad_(False)
    x = torch.empty(1, 3, 256, 256, device="meta")
    trace = trace_pass(network, x, 1)

    def flops():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, 1)
        return counter.get_total_flops()

    total = flops()
    assert total / 2 == pytest.approx(194e9, rel=0.01)  # 388 GFLOP, a multiply-add counted as two
    for layer, share in zip(list(find_attention_layers(network).values())[:3], (0.195, 0.202, 0.225), strict=True):
        tape = Tape([layer.module])
        tape.follow(trace)
        with tape.record(), torch.no_grad():
            network(x, 1)
        with tape.replay():
            weak = flops()
        assert 1 - weak / total == pytest.approx(share, abs=0.002), layer.short


def test_backward_recomputation_neither_records_nor_replays():
    """Checkpointed blocks run again in backward; with a queue still hooked up they would eat or feed it."""
    model = adm(checkpointing=True)
    layers = [layer for layer in model.attention.values() if layer.short == "m1"]
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    plain = x.clone().requires_grad_()
    expected = torch.autograd.grad(model.predict(plain, 50).eps.square().sum(), plain)[0]
    tape = tape_before(layers[0].module, model.network, x, 50)
    shared = x.clone().requires_grad_()
    with tape.record():
        strong = model.predict(shared, 50)
    kept = {module: len(queue) for module, queue in tape.queues.items()}
    gradient = torch.autograd.grad(strong.eps.square().sum(), shared, retain_graph=True)[0]
    assert {module: len(queue) for module, queue in tape.queues.items()} == kept and set(kept.values()) == {1}
    with tape.replay():
        weak = weak_pass(model, layers, x, 50)
    assert torch.equal(weak, weak_pass(model, layers, x, 50))
    again = torch.autograd.grad(strong.eps.square().sum(), shared)[0]
    assert torch.equal(gradient, expected) and torch.equal(again, expected)


def test_several_calls_of_the_network_in_one_pass(model):
    """Windows of a large image: outputs are replayed in the order of their calls."""
    layers = [layer for layer in model.attention.values() if layer.short == "i7"]
    windows = torch.randn(3, 1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    expected = [weak_pass(model, layers, window) for window in windows]
    tape, trace = Tape([layers[0].module]), Trace(model.network)
    with trace.record():  # only the first call is listened to
        for window in windows:
            model.predict(window, 300)
    tape.follow(trace)
    assert model.network.down_blocks[2] in tape.queues and not tape.recorded
    with tape.record():
        for window in windows:
            model.predict(window, 300)
    with tape.replay():
        got = [weak_pass(model, layers, window) for window in windows]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_conditional_unet(tmp_path):
    """Another architecture, whose blocks return tuples: no code is particular to it."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=24,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 24)
    changed = network.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn1")

    class Layer:
        path, module = "attn1", changed

    def weak():
        with torch.no_grad(), perturb_attention([PerturbedLayer(Layer, identity)], no_draw):
            return network(x, 9, text).sample

    expected = weak()
    tape = tape_before(changed, network, x, 9, text)
    assert {"down_blocks.0", "down_blocks.1.resnets.0"} <= set(names(network, tape.queues))
    with tape.record():
        strong = network(x.requires_grad_(), 9, text).sample
    with tape.replay():
        got = weak()
    assert torch.equal(got, expected) and not torch.equal(got, strong)
    assert strong.requires_grad and not got.requires_grad
