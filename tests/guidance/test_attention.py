"""Perturbed attention: the official predictions, each target's map, and nothing left behind."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from safetensors.torch import load_file
from torch import nn

from operators import RestoreError
from restore.backbones.adm import ADM
from restore.guidance import PAG, TARGETS, AttentionRecord, estimator
from restore.guidance import targets as T
from restore.guidance.attention import PerturbedLayer, perturb_attention
from restore.guidance.targets import SeededDraw

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = json.loads((GOLDEN / "pag_eps.json").read_text())["cases"]
OFFICIAL = {
    "identity_low": T.identity,
    "identity_mid": T.identity,
    "identity_out": T.identity,
    "identity_all": T.identity,
    "offdiag_mask": T.random_mask(0.75, diagonal=False),
    "random_mask": T.random_mask(0.75),
    "drop": T.random_drop(0.75),
    "blur": T.blur(5, 1.0),
    "noise": T.noise(0.1),
    "avgpool2d": T.average(3),
}


def relative(a, b):
    return float(torch.linalg.norm(a.detach() - b) / torch.linalg.norm(b))


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "pag_eps.safetensors")


@pytest.fixture(scope="module")
def model():
    return ADM.load(GOLDEN / "nets/adm_b.safetensors", head_channels=16)


def no_draw(kind, shape):
    raise AssertionError("nothing is to be drawn")


@pytest.mark.parametrize("name", CASES)
def test_official_perturbed_predictions(model, golden, name):
    case = CASES[name]
    draws = [golden[key] for key in case["draws_in_order"]]

    def draw(kind, shape):
        assert kind == case["draws_in_order"][0].split(".")[1]
        return draws.pop(0).view(shape)  # (batch * heads, tokens, tokens)

    guidance = PAG(1.0, case["layers"], target=OFFICIAL[name], noise=draw)
    branch = guidance.bind(model)
    with torch.no_grad():
        strong = model.predict(golden["x_t"], golden["t"], golden["y"])
        weak = branch.eps(golden["x_t"], golden["t"], golden["y"], strong)
    assert relative(strong.eps, golden["eps"]) < 1e-5
    assert relative(weak, golden[f"{name}.eps_pert"]) < 1e-5
    assert not draws


def explicit(q, k, v, target, draw=None):
    """The output under the weak map, the map itself made in full and in its textbook form."""
    n = q.shape[-2]
    raw = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    a = raw.softmax(-1)
    eye = torch.eye(n, dtype=q.dtype)
    if target == "identity":
        a = eye.expand_as(a)
    elif target in ("zero", "uniform"):
        a = torch.full_like(a, {"zero": 0, "uniform": 1 / n}[target])
    elif target in ("mean_query", "seg"):
        a = (q.mean(-2, keepdim=True) @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1).expand_as(a)
    elif target == "max":
        a = F.one_hot(a.argmax(-1), n).to(a)
    elif target == "temperature":
        a = (a.log() / 2.0).softmax(-1)
    elif target == "random_mask":
        a = torch.where(draw < 0.25, 0, a)
        a = a / a.sum(-1, keepdim=True)
    elif target == "random_mask_off_diagonal":
        a = torch.where((draw < 0.25) & (eye == 0), 0, a)
        a = a / a.sum(-1, keepdim=True)
    elif target == "random_drop":
        a = torch.where(draw < 0.25, 0, a)
    elif target == "noise":
        a = a + 0.1 * draw
    elif target == "blur":
        g = torch.exp(-0.5 * torch.arange(-2, 3, dtype=q.dtype) ** 2)
        g = g / g.sum()
        at = [torch.arange(n) + d for d in range(-2, 3)]
        at = [torch.where(i < 0, -i, torch.where(i >= n, 2 * (n - 1) - i, i)) for i in at]
        a = sum(w * a[..., i, :] for w, i in zip(g, at, strict=True))
        a = sum(w * a[..., i] for w, i in zip(g, at, strict=True))
    elif target == "average":
        padded = torch.zeros(*a.shape[:2], n + 2, n + 2, dtype=a.dtype)
        padded[..., 1:-1, 1:-1] = a
        a = sum(padded[..., i : i + n, j : j + n] for i in range(3) for j in range(3)) / 9
    return a


def attend(item, q, k, v, draw, mask=None):
    """Run one attention through the interception, q, k, v given as they reach SDPA."""

    class Processor:
        def __call__(self, attn, hidden_states, **kwargs):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    item.layer.module.set_processor(Processor())
    with perturb_attention([item], draw):
        return item.layer.module(torch.zeros(1, 1, 32))


class Layer:
    def __init__(self, module, path="layer", heads=4):
        self.module, self.path, self.heads = module, path, heads


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("heads", [None, (1, 3)])
def test_every_target_is_its_map(target, strength, heads):
    """(1 − u) A + u A' on the chosen heads, A on the others, against explicitly made maps in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    noise = {
        "uniform": torch.rand(2, 4, 9, 9, generator=generator, dtype=torch.float64),
        "normal": torch.randn(2, 4, 9, 9, generator=generator, dtype=torch.float64),
    }
    chosen = list(heads or range(4))
    kind = "normal" if target == "noise" else "uniform"

    def draw(asked, shape):
        assert asked == kind and shape == (2, len(chosen), 9, 9)
        return noise[kind][:, chosen]

    item = PerturbedLayer(Layer(Attention(32, heads=4)), T.find_target(target), strength, heads)
    out = attend(item, q, k, v, draw)
    a = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
    mixed = a.clone()
    weak = explicit(q, k, v, target, noise[kind])
    mixed[:, chosen] = (1 - strength) * a[:, chosen] + strength * weak[:, chosen]
    assert out.dtype == torch.float64
    assert torch.linalg.norm(out - mixed @ v) <= 1e-12 * torch.linalg.norm(mixed @ v)
    if heads:
        assert torch.equal(out[:, [0, 2]], F.scaled_dot_product_attention(q, k, v)[:, [0, 2]])


def test_strength_zero_is_the_true_attention_and_one_is_v():
    q, k, v = (torch.randn(1, 4, 6, 8) for _ in range(3))
    layer = Layer(Attention(32, heads=4))
    true = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(attend(PerturbedLayer(layer, T.identity, 0.0), q, k, v, no_draw), true)
    assert torch.equal(attend(PerturbedLayer(layer, T.identity, 1.0), q, k, v, no_draw), v)


@pytest.mark.parametrize("target", ["uniform", "mean_query", "max", "temperature", "random_mask"])
@pytest.mark.parametrize("boolean", [True, False])
def test_masked_keys_stay_masked(target, boolean):
    q, k, v = (torch.randn(1, 4, 6, 8) for _ in range(3))
    seen = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    seen[..., 4:] = False
    mask = seen if boolean else torch.zeros(1, 1, 1, 6).masked_fill(~seen, float("-inf"))
    changed = v.clone()
    changed[..., 4:, :] = 100.0
    outs = []
    for value in (v, changed):
        draw = SeededDraw(0, 0)
        outs.append(
            attend(PerturbedLayer(Layer(Attention(32, heads=4)), T.find_target(target)), q, k, value, draw, mask)
        )
    assert torch.equal(*outs)


def test_a_fully_masked_row_keeps_one_entry():
    q, k, v = (torch.randn(1, 1, 5, 8) for _ in range(3))
    out = T.random_mask(0.9)(AttentionRecord(q, k, v, draw=lambda kind, shape: torch.rand(shape) * 0.5))
    rows = (out.unsqueeze(-2) - v.unsqueeze(-3)).abs().amax(-1)  # every row is one of the values
    assert torch.isfinite(out).all() and float(rows.amin(-1).max()) < 1e-6


def test_identity_needs_self_attention():
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 5, 8)
    with pytest.raises(RestoreError, match="6 queries and 5 keys"):
        attend(PerturbedLayer(Layer(Attention(32, heads=4)), T.identity), q, k, k, no_draw)


def test_nothing_stays_and_it_acts_only_inside(model, golden):
    x, t, y = golden["x_t"], golden["t"], golden["y"]

    def state():
        return [(dict(m.__dict__), m._forward_hooks.copy()) for m in model.network.modules()]

    before = state()
    items = [PerturbedLayer(layer, T.identity) for layer in model.attention.values()]
    with torch.no_grad():
        strong = model.predict(x, t, y).eps
        with perturb_attention(items, no_draw, model.network) as ran:
            assert not torch.equal(model.predict(x, t, y).eps, strong)
        assert torch.equal(model.predict(x, t, y).eps, strong) and ran == set(model.attention)
    with pytest.raises(KeyError), perturb_attention(items, no_draw, model.network):
        raise KeyError
    assert state() == before

    class Refuses(Attention):
        def __setattr__(self, name, value):
            if name == "forward":
                raise KeyError
            super().__setattr__(name, value)

    with (
        pytest.raises(KeyError),
        perturb_attention([*items, PerturbedLayer(Layer(Refuses(32, heads=4)), T.identity)], no_draw),
    ):
        pass
    assert state() == before


def test_other_threads_see_the_true_attention():
    q, k, v = (torch.randn(1, 4, 6, 8) for _ in range(3))
    inside, outs = threading.Event(), []

    class Waits:
        def __call__(self, attn, hidden_states, **kwargs):
            thread = threading.Thread(target=lambda: outs.append(F.scaled_dot_product_attention(q, k, v)))
            thread.start()
            thread.join()
            inside.set()
            return F.scaled_dot_product_attention(q, k, v)

    module = Attention(32, heads=4)
    module.set_processor(Waits())
    with perturb_attention([PerturbedLayer(Layer(module), T.identity)], no_draw):
        weak = module(torch.zeros(1, 1, 32))
    assert inside.is_set() and torch.equal(weak, v)
    assert torch.equal(outs[0], F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(2)])
def test_processors_without_sdpa_are_refused(model, golden, processor):
    layer = model.attention["mid_block.attentions.0"]
    layer.module.set_processor(processor)
    try:
        with pytest.raises(RestoreError, match=rf"mid_block.attentions.0 .*got {type(processor).__name__};"):
            with estimator(model, PAG(1.0, "m1")) as estimate:
                estimate(golden["x_t"], 5, golden["y"])
        assert layer.module.processor is processor
    finally:
        layer.module.set_processor(AttnProcessor2_0())


def test_keyword_arguments_reach_the_processor():
    """diffusers reads the signature of the processor, which stays in its place."""
    seen = {}

    class Takes:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, hint=None):
            seen["hint"] = hint
            return F.scaled_dot_product_attention(*[hidden_states[:, None]] * 3)[:, 0]

    module = Attention(32, heads=4)
    module.set_processor(Takes())
    with perturb_attention([PerturbedLayer(Layer(module), T.identity)], no_draw):
        x = torch.randn(1, 5, 32)
        assert torch.equal(module(x, hint=7), x)
    assert seen == {"hint": 7}


def test_processors_that_are_modules_stay_modules():
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return self.gain * F.scaled_dot_product_attention(*[hidden_states[:, None]] * 3)[:, 0]

    module, x = Attention(32, heads=4), torch.randn(1, 5, 32)
    module.set_processor(Trained())
    keys = list(module.state_dict())
    with perturb_attention([PerturbedLayer(Layer(module), T.identity)], no_draw):
        assert torch.equal(module(x), x)
    assert list(module.state_dict()) == keys and "processor.gain" in keys


def test_low_precision_maps_are_made_in_fp32(model, golden):
    """Under autocast the explicit maps must not be rounded to bf16."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 64, 16, generator=generator).bfloat16() for _ in range(3))
    item = PerturbedLayer(Layer(Attention(64, heads=4)), T.temperature(1.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(item, q, k, v, no_draw)
    expected = (q.double() @ k.double().transpose(-2, -1) / 4).softmax(-1) @ v.double()
    assert out.dtype == torch.bfloat16
    assert float((out == expected.bfloat16()).float().mean()) > 0.98  # but for values halfway between two bf16


def test_seeded_noise_depends_only_on_seed_timestep_and_draw():
    torch.manual_seed(0)
    first = [SeededDraw(0, 5)("normal", (2, 3, 4, 4)) for _ in range(2)]
    torch.manual_seed(1)
    assert torch.equal(*first) and torch.equal(first[0][0], first[0][1])
    draw = SeededDraw(0, 5)
    assert torch.equal(draw("normal", (1, 3, 4, 4))[0], first[0][0])
    assert not torch.equal(draw("normal", (1, 3, 4, 4))[0], first[0][0])
    assert not any(torch.equal(SeededDraw(*key)("normal", (1, 3, 4, 4))[0], first[0][0]) for key in ((1, 5), (0, 6)))
    assert 0 <= float(SeededDraw(0, 5)("uniform", (1, 1, 50, 50)).min()) < 0.01


@pytest.mark.parametrize("target", ["random_mask", "noise"])
def test_random_perturbation_does_not_depend_on_the_batch(model, golden, target):
    x, labels = golden["x_t"], golden["y"]
    with torch.no_grad(), estimator(model, PAG(1.0, "m1", target=target, noise=3)) as estimate:
        both = estimate(x, 100, labels)[1]
        state = torch.get_rng_state()
        alone = estimate(x[1:], 100, labels[1:])[1]
        assert torch.equal(torch.get_rng_state(), state)
    assert relative(both[1:], alone) < 1e-5


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: T.random_mask(1.0), r"rate must be .* in \[0, 1\)"),
        (lambda: T.random_drop(-0.1), r"rate must be .* in \[0, 1\)"),
        (lambda: T.temperature(0), "tau must be .* > 0"),
        (lambda: T.blur(4), "kernel must be .* odd"),
        (lambda: T.blur(5, 0), "sigma must be .* > 0"),
        (lambda: T.average(2), "kernel must be .* odd"),
    ],
)
def test_bad_options(make, match):
    with pytest.raises(RestoreError, match=match):
        make()
