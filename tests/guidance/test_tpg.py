"""TPG against reordered outputs, in float64."""

from __future__ import annotations

import torch
from weak_passes import MIDDLE, latent_prior, relative, weak_of

from restore.guidance import TPG
from restore.guidance import targets as T


def reordered(module, order):
    """Attention, feed-forward nets and norms of tokens commute with their order: the output's tokens, reordered."""

    def hook(module, args, output):
        if output.ndim == 3:
            return output[:, order]
        return output.flatten(2)[..., order].view(output.shape)

    return module.register_forward_hook(hook)


def test_tpg(model, x):
    with torch.no_grad():
        got = weak_of(TPG(1.0, "m1", noise=5), model, x, 40)
        attn = model.attention[MIDDLE].module
        order = T.SeededDraw(5, 40)("uniform", (1, 16))[0].argsort()
        handle = reordered(attn, order)
        expected = model.predict(x, 40).eps
        handle.remove()
        assert sorted(order.tolist()) == list(range(16)) and order.tolist() != list(range(16))
        assert relative(got, expected) < 1e-12 and relative(got, model.predict(x, 40).eps) > 1e-4


def test_tpg_reorders_whole_transformer_blocks():
    model = latent_prior()
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer = next(layer for layer in model.attention.values() if layer.short == "m1")
    block = model.network.get_submodule(layer.path.removesuffix(".attn1"))
    tokens = []
    handle = block.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    with torch.no_grad():
        model.predict(z, 40)
        handle.remove()
        handle = reordered(block, T.SeededDraw(0, 40)("uniform", (1, tokens[0]))[0].argsort())
        expected = model.predict(z, 40).eps
        handle.remove()
        assert relative(weak_of(TPG(1.0, "m1"), model, z, 40), expected) < 1e-12
        assert relative(expected, model.predict(z, 40).eps) > 1e-6
