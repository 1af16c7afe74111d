"""The shared prefix: what is found, that replaying it changes no bit, and that nothing of it stays behind."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from operators import RestoreError
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


def traced(network, *args, **kwargs):
    trace = Trace(network)
    with torch.no_grad(), trace.record():
        network(*args, **kwargs)
    return trace


def tape_before(changed, network, *args, **kwargs):
    tape = Tape([changed])
    tape.follow(traced(network, *args, **kwargs))
    return tape


def perturbed_all(layers):
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
    trace = traced(network, x, 1)
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


class Shared(nn.Module):
    """One activation called both before and after the perturbed layer, and a module used twice before it."""

    def __init__(self):
        super().__init__()
        self.act, self.twice, self.late, self.changed = nn.SiLU(), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.block = nn.Sequential(nn.Linear(2, 2), self.act)
        self.other = nn.Sequential(self.twice, nn.Tanh())

    def forward(self, x):
        x = self.twice(self.other(self.block(x)))
        return self.late(self.act(self.changed(x)))


def test_modules_used_again_are_not_taken():
    torch.manual_seed(0)
    network = Shared()
    trace = traced(network, torch.zeros(1, 2))
    # `act` runs again later; `twice` runs inside and outside `other`, so its own queue could not be replayed
    assert names(network, trace.prefix([network.changed])) == ["block", "other"]
    tape, x = tape_before(network.changed, network, torch.zeros(1, 2)), torch.randn(3, 2)
    with tape.record():
        strong = network(x)
    with tape.replay():
        assert torch.equal(network(x), strong)


def weak_pass(model, layers, x, t=300):
    with torch.no_grad(), perturb_attention(perturbed_all(layers), no_draw):
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
    arch = adm_weights.infer_architecture({k: tuple(v) for k, v in shapes.items()})
    heads = adm_weights.count_heads(arch)
    network = adm_weights.build_network(adm_weights.make_config(arch, heads, 256), arch.base, heads)
    network.requires_grad_(False)
    x = torch.empty(1, 3, 256, 256, device="meta")
    trace = traced(network, x, 1)

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


def test_recorded_values_are_detached_and_released(model):
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    tape = tape_before(model.network.mid_block.attentions[0], model.network, x.detach(), 1)
    for _ in range(3):  # an abandoned pass is dropped by the next one
        with tape.record():
            model.predict(x, 1)
        assert {len(queue) for queue in tape.queues.values()} == {1}
    hidden, skips = tape.queues[model.network.down_blocks[0]][0].value[:2]
    assert not hidden.requires_grad and not any(skip.requires_grad for skip in skips)
    with tape.replay():
        model.predict(x.detach(), 1)
    assert not any(tape.queues.values())


def test_exceptions_leave_nothing(model):
    before = state_of(model.network)
    tape = tape_before(model.network.mid_block.attentions[0], model.network, torch.zeros(1, 3, 32, 32), 1)
    for context in (tape.record, tape.replay, Trace(model.network).record):  # the last leaves no calls
        with pytest.raises(KeyError), context():
            raise KeyError
        assert state_of(model.network) == before
    with tape.record():
        model.predict(torch.zeros(1, 3, 32, 32), 1)
    with pytest.raises(KeyError), tape.replay():
        raise KeyError
    assert not any(tape.queues.values())


def test_other_calls_than_recorded_are_errors(model):
    x = torch.zeros(1, 3, 32, 32)
    tape = tape_before(model.network.mid_block.attentions[0], model.network, x, 1)
    with tape.record():
        model.predict(x, 1)
    with pytest.raises(RuntimeError, match="more often"), tape.replay():
        model.predict(x, 1)
        model.predict(x, 1)
    with tape.record():
        model.predict(x, 1)
    with pytest.raises(RuntimeError, match="fewer"), tape.replay():
        pass


class Again(nn.Module):
    """`inner` is early, but what encloses it is called again after the changed layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.changed = nn.Linear(2, 2), nn.Linear(2, 2)
        self.outer = Outer(self.inner)

    def forward(self, x):
        return self.outer(self.changed(self.outer(x, True)), False)


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, deep):
        return self.inner(x) if deep else x


def test_what_encloses_the_prefix_and_runs_again_is_not_taken():
    torch.manual_seed(0)
    network, x = Again(), torch.randn(3, 2)
    tape = tape_before(network.changed, network, x)
    assert names(network, tape.queues) == ["inner"]
    with tape.record():
        strong = network(x)
    with tape.replay():
        assert torch.equal(network(x), strong)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.changed = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        h = self.first(x)
        h += 1
        return self.changed(h)


def test_change_in_place_is_noticed():
    network, x = InPlace(), torch.zeros(1, 2)
    tape = tape_before(network.changed, network, x)
    with torch.no_grad(), tape.record():
        network(x)
    with pytest.raises(RestoreError, match="in place"), torch.no_grad(), tape.replay():
        network(x)


def test_a_module_with_its_own_forward_gets_it_back(model):
    """Offloading libraries put their own `forward` on an instance."""
    block = model.network.down_blocks[0]
    golden = load_file(GOLDEN / "adm_forward_adm_a.safetensors")
    calls = []
    original = block.forward

    def own(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = own
    try:
        tape = Tape([])
        tape.queues = {block: deque()}
        with torch.no_grad():
            with tape.record():
                a = model.predict(golden["x"], 480).eps
            with tape.replay():
                b = model.predict(golden["x"], 480).eps
        assert block.forward is own and len(calls) == 1 and torch.equal(a, b)
    finally:
        del block.forward
