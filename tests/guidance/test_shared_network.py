"""One network, several users of it: threads, torch.compile, and branches that watch the strong pass."""

from __future__ import annotations

import threading
from pathlib import Path

import own
import pytest
import torch
from diffusers import UNet2DModel

from operators import RestoreError
from restore.backbones.adm import ADM
from restore.backbones.forwards import find_compiled, replace_forward
from restore.backbones.memory_options import enable_block_checkpointing
from restore.guidance import PAG, estimator

GOLDEN = Path(__file__).parent.parent / "golden"


def adm(checkpointing=False):
    model = ADM.load(GOLDEN / "nets/adm_a.safetensors", head_channels=16)
    if checkpointing:
        enable_block_checkpointing(model)
    return model


def relative(a, b):
    return float(torch.linalg.norm(a.detach() - b) / torch.linalg.norm(b))


def state_of(network):
    return [dict(module.__dict__) for module in network.modules()]


def dps(model, guidance, seed, steps=4):
    """DPS's own order: strong pass, backward through it, weak passes, update."""
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    y = torch.zeros_like(x)
    with estimator(model, guidance) as estimate:
        for t in range(800, 800 - 100 * steps, -100):
            x = x.detach().requires_grad_()
            strong = estimate.strong(x, t)
            (gradient,) = torch.autograd.grad((y - (x - 0.5 * strong.eps)).norm(), x)
            eps = estimate.guided(strong, x, t)
            x = 0.9 * x.detach() - 0.1 * eps - 0.2 * gradient
    return x


def generate(model, guidance, seed):
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), estimator(model, guidance) as estimate:
        for t in range(800, 400, -100):
            x = 0.9 * x - 0.1 * estimate(x, t)[1]
    return x


@pytest.mark.parametrize("checkpointing", [False, True])
def test_threads_do_not_mix_their_guidance(checkpointing):
    """Guided and unguided runs on one network at once: each gives the bits of a run on its own, every time."""
    torch.set_num_threads(1)
    model = adm(checkpointing)
    before = state_of(model.network)
    watching = own.Attended(1.0) + PAG(1.0, "o2", strength=0.5)
    work = [
        (dps, PAG(2.0, "i5,m1"), 0),
        (dps, None, 1),
        (generate, watching, 2),
        (dps, PAG(1.0, "m1", target="noise"), 3),
        (generate, None, 4),
    ]
    expected = [function(model, guidance, seed) for function, guidance, seed in work]
    assert relative(expected[0], dps(model, None, 0)) > 1e-3
    together, failures = threading.Barrier(len(work)), []

    def repeat(number):
        function, guidance, seed = work[number]
        try:
            for _ in range(3):
                together.wait(timeout=120)
                if not torch.equal(function(model, guidance, seed), expected[number]):
                    failures.append(number)
        except Exception as error:
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert state_of(model.network) == before


def test_a_replacement_is_seen_only_by_its_thread():
    network, seen = torch.nn.Sequential(torch.nn.Identity()), []

    def add(n):
        return lambda module, forward: lambda x: forward(x) + n

    def other():
        seen.append(float(network(torch.zeros(()))))
        with replace_forward([network[0]], add(10.0)):
            seen.append(float(network(torch.zeros(()))))
            inside.set()
            left.wait(timeout=60)
        seen.append(float(network(torch.zeros(()))))

    inside, left = threading.Event(), threading.Event()
    thread = threading.Thread(target=other)
    with replace_forward([network[0]], add(1.0)), replace_forward([network[0]], add(2.0)):
        thread.start()
        inside.wait(timeout=60)
        assert float(network(torch.zeros(()))) == 3.0
    assert float(network(torch.zeros(()))) == 0.0  # though the other thread still has its own
    left.set()
    thread.join()
    assert seen == [0.0, 10.0, 0.0] and "forward" not in network[0].__dict__


def test_everywhere_applies_to_threads_without_a_replacement():
    network, seen = torch.nn.Sequential(torch.nn.Identity()), []
    with replace_forward([network[0]], lambda m, forward: lambda x: forward(x) + 1, everywhere=True):
        thread = threading.Thread(target=lambda: seen.append(float(network(torch.zeros(())))))
        thread.start()
        thread.join()
        with replace_forward([network[0]], lambda m, forward: lambda x: forward(x) + 10):
            seen.append(float(network(torch.zeros(()))))
    assert seen == [1.0, 11.0] and "forward" not in network[0].__dict__


def tiny():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        out_channels=6,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D",) * 2,
        up_block_types=("AttnUpBlock2D",) * 2,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def compile_wrapped(model):
    model.network = torch.compile(model.network, backend="eager")


def compile_in_place(model):
    model.network.compile(backend="eager")


def compile_blocks(model):
    for block in (*model.network.down_blocks, model.network.mid_block, *model.network.up_blocks):
        block.compile(backend="eager", fullgraph=True)


@pytest.mark.parametrize("how", [compile_wrapped, compile_in_place, compile_blocks])
def test_compiled_networks_are_guided_like_others(how):
    """What is traced once, before there was any guidance, must not answer for the perturbed pass."""
    torch._dynamo.reset()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    guidance = PAG(2.0, "m1") + own.Attended(1.0)
    model = ADM(tiny())
    with torch.no_grad(), estimator(model, guidance) as estimate:
        expected = [estimate(x, t)[1] for t in (500, 400, 300)]
    how(model)
    try:
        with torch.no_grad():
            plain = model.predict(x, 500).eps
            before = state_of(model.network)
            with estimator(model, guidance) as estimate:
                got = [estimate(x, t)[1] for t in (500, 400, 300)]
            assert state_of(model.network) == before
            assert relative(model.predict(x, 500).eps, plain) < 1e-6
        assert relative(expected[0], plain) > 1e-2
        assert all(relative(a, b) < 1e-5 for a, b in zip(got, expected, strict=True))
    finally:
        torch._dynamo.reset()


def test_a_weak_pass_that_misses_its_layer_is_an_error():
    """The layers were found in a network that another one has replaced since."""
    model = ADM(tiny())
    model.network = ADM(tiny()).network
    with pytest.raises(RestoreError, match="did not run in the perturbed pass"), estimator(model, PAG(1.0, "m1")) as e:
        e(torch.zeros(1, 3, 16, 16), 5)


def test_find_compiled():
    network = tiny()
    assert find_compiled(network) == []
    network.mid_block.compile(backend="eager")
    assert find_compiled(network) == [network.mid_block]
    wrapper = torch.compile(network, backend="eager")
    assert find_compiled(wrapper) == [wrapper, network.mid_block]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("share_prefix", [False, True])
def test_a_branch_that_observes_the_strong_pass(checkpointing, share_prefix):
    """Its weak input, from the map of the strong pass as an explicit computation gives it; gradients as before."""
    plain, model = adm(), adm(checkpointing)
    before = state_of(model.network)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    alone = x.clone().requires_grad_()
    expected = torch.autograd.grad(plain.predict(alone, 400).eps.square().sum(), alone)[0]

    attn, inputs = plain.attention["mid_block.attentions.0"].module, []
    handle = attn.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        strong = plain.predict(x, 400).eps
        h = attn.group_norm(inputs[0].flatten(2)).transpose(1, 2)
        q, k = (to(h).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for to in (attn.to_q, attn.to_k))
        weight = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1).mean(1).sum(1)
        mask = (weight > 1).float().view(2, 1, *inputs[0].shape[-2:])
        spot = torch.nn.functional.interpolate(mask, size=x.shape[-2:])
        assert 0 < float(spot.mean()) < 1
        weak = plain.predict(x * (1 - 0.5 * spot), 400).eps
        perturbed = PAG(1.0, "i7").bind(plain).eps(x, 400, None, None)
    handle.remove()

    guidance = own.Attended(2.0) + PAG(1.0, "i7")
    with estimator(model, guidance, share_prefix=share_prefix) as estimate:
        for _ in range(3):
            x_t = x.clone().requires_grad_()
            prediction = estimate.strong(x_t, 400)
            gradient = torch.autograd.grad(prediction.eps.square().sum(), x_t)[0]
            eps = estimate.guided(prediction, x_t, 400)
            assert torch.equal(gradient, expected) and torch.equal(prediction.eps, strong)
            assert relative(eps, strong + 2.0 * (strong - weak) + (strong - perturbed)) < 1e-5
        assert state_of(model.network) == before
