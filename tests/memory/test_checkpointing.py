"""Blocks that are checkpointed for a while: by several at once, and of a network that runs with guidance meanwhile."""

import threading

import pytest
import torch
from torch import nn

import restore
from restore.backbones.forwards import replace_forward
from restore.backbones.memory_options import UNITS, checkpoint_units, is_checkpointed
from restore.memory.measure import checkpoint_networks


@pytest.fixture
def small(tiny_adm):
    return restore.load(tiny_adm, device="cpu")


def list_forwards(network: nn.Module) -> list:
    """What was set on each module: lean forwards stay once the last block is left, as the class's own do."""
    return [module.__dict__.get("forward") for module in network.modules()]


def test_the_inner_block_leaves_the_outer_one_checkpointed(small):
    network = small.backbone.network
    before = list_forwards(network)
    with checkpoint_networks(small, True):
        with checkpoint_networks(small, False):
            assert is_checkpointed(network)
        with checkpoint_networks(small, True):
            assert is_checkpointed(network)
        assert is_checkpointed(network)
    assert not is_checkpointed(network) and list_forwards(network) == before and any(before)


def test_whoever_is_last_switches_it_off(small):
    """The first of two threads leaves before the second, as an estimate of the page may within a restoration."""
    network, entered, left = small.backbone.network, threading.Event(), threading.Event()
    before = list_forwards(network)

    def enter():
        with checkpoint_networks(small, True):
            entered.set()
            left.wait(60)

    second = threading.Thread(target=enter)
    with checkpoint_networks(small, True):
        second.start()
        assert entered.wait(60)
    during = is_checkpointed(network)
    left.set()
    second.join()
    assert during and not is_checkpointed(network) and list_forwards(network) == before


@pytest.mark.parametrize("order", ["around", "within", "ends later", "begins earlier"])
def test_forwards_may_be_replaced_meanwhile(small, order):
    """Guidance in another thread has begun or ends at any time: it stays as long as it should, and nothing after it."""
    network = small.backbone.network
    before = list_forwards(network)
    units, calls = [module for module in network.modules() if isinstance(module, UNITS)], []

    def count(module, forward):
        return lambda *args, **kwargs: (calls.append(module), forward(*args, **kwargs))[1]

    def differentiate() -> torch.Tensor:
        calls.clear()
        x = torch.ones(1, 3, 16, 16, requires_grad=True)
        return torch.autograd.grad(small.backbone.predict(x, 10).eps.square().sum(), x)[0]

    plain, replacing = differentiate(), replace_forward(units, count)
    steps = {"replace": replacing.__enter__, "restore": lambda: replacing.__exit__(None, None, None)}
    steps |= {"on": lambda: checkpoint_units(network, True), "off": lambda: checkpoint_units(network, False)}
    orders = {"around": "replace on off restore", "within": "on replace restore off"}
    orders |= {"ends later": "on replace off restore", "begins earlier": "replace on restore off"}
    replaced = checkpointed = False
    for step in orders[order].split():
        steps[step]()
        replaced = {"replace": True, "restore": False}.get(step, replaced)
        checkpointed = {"on": True, "off": False}.get(step, checkpointed)
        assert torch.equal(differentiate(), plain) and set(calls) == set(units if replaced else ())
        assert is_checkpointed(network) == checkpointed
    assert list_forwards(network) == before
