"""Strengths of single heads: against explicit maps in float64; to the bit where nothing or everything is perturbed."""

from __future__ import annotations

import pytest
import torch

from operators import RestoreError
from restore.backbones.adm import ADM
from restore.backbones.sizes import Sized
from restore.guidance import PAG, build_guidance, describe_guidance, estimator
from restore.guidance.layers import format_layer_table
from restore.samplers.generate import generate
from restore.samplers.noise import ImageNoise


def guided_eps(model, guidance, x, t=300):
    with torch.no_grad(), estimator(model, guidance) as estimate:
        return estimate(x, t)[1]


def weak_map(a, target):
    n = a.q.shape[-2]
    if target == "identity":
        return torch.eye(n, dtype=a.q.dtype)
    if target == "uniform":
        return torch.full((n, n), 1 / n, dtype=a.q.dtype)
    logits = a.q.mean(-2, keepdim=True) @ a.k.transpose(-2, -1) / a.q.shape[-1] ** 0.5
    return logits.softmax(-1).expand(*a.q.shape[:-1], n)


@pytest.mark.parametrize("target", ["identity", "uniform", "mean_query"])
@pytest.mark.parametrize(
    "layers, strength, u",
    [
        ("m1", {"m1": {0: 0.5, 1: 0.0, 2: 1.0, 3: 0.5}}, [0.5, 0, 1, 0.5]),
        ("m1:0,3", {"middle_block.1": {"0": 0.25, "3": 1}}, [0.25, 0, 0, 1]),
        ("m1:2", {"m1": 0.7}, [0, 0, 0.7, 0]),
        ("m1", 0.3, [0.3] * 4),
    ],
)
def test_each_head_has_its_strength(model, x, target, layers, strength, u):
    """(1 − u_h) A_h + u_h A'_h, the maps made in full."""
    u = torch.tensor(u, dtype=torch.float64).view(-1, 1, 1)

    def mixed(a):
        true = (a.q @ a.k.transpose(-2, -1) / a.q.shape[-1] ** 0.5).softmax(-1)
        return ((1 - u) * true + u * weak_map(a, target)) @ a.v

    expected = guided_eps(model, PAG(2.0, "m1", target=mixed), x)
    got = guided_eps(model, PAG(2.0, layers, target=target, strength=strength), x)
    assert float((got - expected).norm() / expected.norm()) < 1e-12
    assert float((got - model.predict(x, 300).eps).norm()) > 1e-6


def test_to_the_bit(tiny_adm):
    """u = 0 and s = 0 are no guidance, u = 1 on every head is PAG, in whole runs."""
    model = ADM.load(tiny_adm)
    heads = {layer.short: range(layer.heads) for layer in model.attention.values()}
    layers = ",".join(heads)

    def run(guidance):
        noise = ImageNoise([(0, "a", 0)])
        return generate(Sized(model, 16, 16), 1, noise=noise, steps=3, guidance=guidance)

    def every(u):
        return {name: dict.fromkeys(numbers, u) for name, numbers in heads.items()}

    plain, pag = run(None), run(PAG(2.0, layers))
    assert not torch.equal(plain, pag)
    by_number = ",".join(f"{name}:{','.join(map(str, numbers))}" for name, numbers in heads.items())
    for off in (PAG(0.0, layers), PAG(2.0, layers, strength=0.0), PAG(2.0, layers, strength=every(0.0))):
        assert torch.equal(run(off), plain)
    for on in (PAG(2.0, layers, strength=every(1.0)), PAG(2.0, by_number), PAG(2.0, by_number, strength=every(1))):
        assert torch.equal(run(on), pag)
    assert not torch.equal(run(PAG(2.0, layers, strength=every(0.5))), pag)


def test_plain_data():
    guidance = PAG(1.0, "i5:0,3,m1", strength={"i5": {3: 1.0, 0: 0.5}, "m1": 0.3})
    described = describe_guidance(guidance)[0]["pag"]["strength"]
    assert described == {"i5": {"3": 1.0, "0": 0.5}, "m1": 0.3}  # as JSON writes it
    assert build_guidance(describe_guidance(guidance)).terms == (guidance,)


@pytest.mark.parametrize(
    "layers, strength, match",
    [
        ("m1", 1.5, r"strength must be .* \[0, 1\], got 1.5"),
        ("m1", "half", r"strength must be .* \[0, 1\], got 'half'"),
        ("m1", True, r"strength must be .* \[0, 1\], got True"),
        ("m1", {"m1": {0: -1}}, r"strength must be .* \[0, 1\], got -1"),
        ("m1", {"m1": {}}, "one for each head such as"),
        ("m1", {"m1": {"a": 1}}, "one for each head such as"),
        ("m1", {"m1": {0: 1}}, r"strength of mid_block.attentions.0 .* heads \[0, 1, 2, 3\], got \[0\]"),
        ("m1:0,3", {"m1": {0: 1, 2: 1}}, r"strength of mid_block.attentions.0 .* heads \[0, 3\], got \[0, 2\]"),
        ("m1,i7", {"m1": 1}, "strength must be given for every perturbed layer, .* without down_blocks"),
        ("m1", {"m1": 1, "i7": 1}, "given for down_blocks.* not among the perturbed layers"),
        ("m1", {"m2": 1}, "no attention layer is called 'm2'"),
    ],
)
def test_mistakes(model, layers, strength, match):
    with pytest.raises(RestoreError, match=match), estimator(model, PAG(1.0, layers, strength=strength)):
        pass


def test_the_table_of_layers_and_heads(model):
    every = format_layer_table(model.attention, 64)
    assert [line.split()[3] for line in every[1:]] == [f"0..{a.heads - 1}" for a in model.attention.values()]
    head, i7, m1 = format_layer_table(model.attention, 64, "m1,i7:0,3")
    assert "heads" in head and i7.split()[0] == "i7" and i7.split()[3] == "0,3" and m1.split()[3] == "0..3"
    with pytest.raises(RestoreError, match=r"must be in 0\.\.3, got \[9\]"):
        format_layer_table(model.attention, 64, "m1:9")
