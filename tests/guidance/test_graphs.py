"""Guided passes as compiled graphs: equal to uncompiled ones, two for a step, and none where one could be wrong."""

from __future__ import annotations

import pytest
import torch
from tiny_adm import tiny_adm
from torch._dynamo.utils import counters

import operators
from restore.backbones.graphs import compile_networks, find_graphs
from restore.backbones.sizes import Sized
from restore.guidance import PAG, SLG
from restore.samplers import diffpir, dps
from restore.samplers.noise import ImageNoise

NOISE = ImageNoise([(0, "0", 0), (0, "1", 0)], torch.device("cpu"))
TIMES = [600, 500, 400, 300]


def run(model, sampler, guidance, size=16, steps=TIMES, condition=None):
    operator = operators.SuperResolution(2, noise=operators.GaussianNoise(0.05))
    generator = torch.Generator().manual_seed(1)
    y = operator(torch.randn(2, 3, size, size, generator=generator).tanh(), generator)
    own = {"zeta": 1.0, "clip": False} if sampler is dps.dps else {"lam": 5.0, "zeta": 0.5}
    options = {"noise": NOISE, "steps": steps, "guidance": guidance, "condition": condition}
    prior = Sized(model, size, size)
    return sampler(prior, operator, y, **options, **own), prior.evaluations


@pytest.fixture
def compiled():
    """Return a compiled model, and count what torch compiles."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda backend="eager", **options: (model := tiny_adm(**options), compile_networks(model, backend=backend))[0]
    torch._dynamo.reset()


def check(model, sampler, guidance, graphs, **options):
    """The compiled model restores what the plain one does, twice, in so many graphs without a break."""
    plain = tiny_adm(**({"num_class_embeds": 4} if model.classes else {}))
    expected, evaluations = run(plain, sampler, guidance, **options)
    if guidance is not None:
        assert not torch.allclose(expected, run(plain, sampler, None, **options)[0], atol=1e-2)
    for _ in range(2):
        got, count = run(model, sampler, guidance, **options)
        assert count == evaluations
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert find_graphs(model.network).count == graphs == counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]


def test_a_guided_step_is_two_graphs(compiled):
    """DPS differentiates through the compiled strong pass, by torch's own compiler of gradients."""
    check(compiled("aot_eager"), dps.dps, PAG(2.0, "m1"), 2)


def test_a_pass_without_blocks_is_a_graph(compiled):
    check(compiled(), diffpir.diffpir, SLG(2.0, "m1"), 2, steps=TIMES[:2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guidance", "graphs"),
    [
        (None, 1),
        (PAG(2.0, "m1", strength=0.5), 2),
        (PAG(2.0, "i3:0,m1:1"), 2),
        (PAG(2.0, "i3:0,m1:1", strength=0.3), 2),
        (PAG(2.0, "i3,m1", target={"seg": {"sigma": 2.0}}), 1),  # its blur cannot be recorded: a warning, and right
        (PAG(2.0, "m1") + PAG(1.0, "o0", strength=0.5), 3),
        (PAG(2.0, "m1", interval=(450, 0)), 3),
    ],
    ids=["plain", "SoftPAG", "heads", "soft heads", "SEG", "two terms", "interval"],
)
@pytest.mark.parametrize("sampler", [dps.dps, diffpir.diffpir])
def test_guidances(compiled, sampler, guidance, graphs):
    check(compiled(), sampler, guidance, graphs)
