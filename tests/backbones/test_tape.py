"""Trace and Tape: which modules are taken, which calls are errors, and that nothing stays behind."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from backbones.test_prefix import GOLDEN, adm, names, state_of, tape_before, trace_pass
from safetensors.torch import load_file
from torch import nn

from operators import RestoreError
from restore.backbones.prefix import Tape, Trace


@pytest.fixture(scope="module")
def model():
    return adm()


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
    trace = trace_pass(network, torch.zeros(1, 2))
    # `act` runs again later; `twice` runs inside and outside `other`, so its own queue could not be replayed
    assert names(network, trace.prefix([network.changed])) == ["block", "other"]
    tape, x = tape_before(network.changed, network, torch.zeros(1, 2)), torch.randn(3, 2)
    with tape.record():
        strong = network(x)
    with tape.replay():
        assert torch.equal(network(x), strong)


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
