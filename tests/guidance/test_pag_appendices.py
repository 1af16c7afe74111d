"""PAG's App. D.2 and E.2: a layer drawn at every time, and cross-attention set to zero."""

from __future__ import annotations

import pytest
import torch
from weak_passes import latent_prior, relative, weak_of

from operators import RestoreError
from restore.backbones.sizes import Sized
from restore.guidance import PAG, build_guidance, describe_guidance, estimator

LAYERS = ("i5", "i7", "m1", "o0")
TIMES = (50, 250, 250.5, 600, 601, 900)


def drawn(guidance, backbone, x, t, single):
    """Which single layer the weak pass perturbed; single: the weak predictions of each layer alone."""
    weak = weak_of(guidance, backbone, x, t)
    (name,) = [name for name, alone in single.items() if relative(alone, weak) < 1e-12]
    return name


def test_one_layer_is_drawn_at_every_time(model, x):
    def alone(backbone, x, t):
        return {name: weak_of(PAG(1.0, name), backbone, x, t) for name in LAYERS}

    x = x[..., :16, :16]
    single = {t: alone(model, x, t) for t in TIMES}
    second = {t: {name: eps[1:] for name, eps in each.items()} for t, each in single.items()}
    guidance = PAG(1.0, list(LAYERS), random_layers=1, noise=3)
    chosen = [drawn(guidance, model, x, t, single[t]) for t in TIMES]
    assert len(set(chosen)) > 1
    assert chosen == [drawn(guidance, model, x, t, single[t]) for t in TIMES]  # by seed and time alone
    assert chosen == [drawn(guidance, model, x[1:], t, second[t]) for t in TIMES]
    wide, windows = x[:1].repeat(1, 1, 3, 4), Sized(model, 48, 64)
    assert chosen[:2] == [drawn(guidance, windows, wide, t, alone(windows, wide, t)) for t in TIMES[:2]]
    other = PAG(1.0, list(LAYERS), random_layers=1, noise=4)
    assert chosen != [drawn(other, model, x, t, single[t]) for t in TIMES]
    assert build_guidance(describe_guidance(guidance)).terms == (guidance,)


def test_random_layers_is_checked(model, x):
    every = PAG(1.0, list(LAYERS), random_layers=len(LAYERS))
    assert relative(weak_of(every, model, x, 250), weak_of(PAG(1.0, list(LAYERS)), model, x, 250)) < 1e-12
    with pytest.raises(RestoreError, match="random_layers must be at most the 1 layers, got 2"):
        weak_of(PAG(1.0, "m1", random_layers=2), model, x, 250)
    with pytest.raises(RestoreError, match="random_layers"):
        PAG(1.0, "m1", random_layers=0)


def test_cross_attention_is_set_to_zero(model, x):
    """The block's output without it: only the bias of its projection is left, as with values of zero."""
    prior = latent_prior()
    layers = [layer.short for layer in prior.attention.values()]
    z = torch.randn(2, prior.channels, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, *prior.null_condition.shape[1:], dtype=torch.float64)
    for chosen in (layers[:1], layers):
        weak = weak_of(PAG(1.0, chosen, target="zero", scope="cross"), prior, z, 250, text)
        modules = [
            prior.network.get_submodule(layer.path.removesuffix("attn1") + "attn2")
            for layer in prior.attention.values()
            if layer.short in chosen
        ]
        kept = [module.to_v.weight.data.clone() for module in modules]
        for module in modules:
            assert module.to_v.bias is None
            module.to_v.weight.data.zero_()
        with torch.no_grad():
            expected = prior.predict(z, 250, text).eps
        for module, weight in zip(modules, kept, strict=True):
            module.to_v.weight.data.copy_(weight)
        with torch.no_grad():
            strong = prior.predict(z, 250, text).eps
        assert relative(weak, expected) < 1e-10 < 1e-6 < relative(strong, expected)
    with pytest.raises(RestoreError, match="scope cross needs layers with cross-attention"):
        weak_of(PAG(1.0, "m1", target="zero", scope="cross"), model, x, 250)


def test_what_strong_and_weak_pass_share_changes_nothing(model, x):
    prior = latent_prior()
    z = torch.randn(2, prior.channels, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cross = [layer.short for layer in prior.attention.values()][2:]
    cases = ((prior, z, PAG(1.0, cross, target="zero", scope="cross")), (model, x, PAG(1.0, LAYERS, random_layers=1)))
    for backbone, x_t, guidance in cases:
        results = []
        for share in (True, False):
            with torch.no_grad(), estimator(backbone, guidance, share_prefix=share) as estimate:
                results.append([estimate(x_t, t)[1] for t in (900, 600, 250, 50)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert not torch.equal(results[0][0], backbone.predict(x_t, 900).eps)
