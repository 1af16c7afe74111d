"""Guidance of a network inside a pipeline: equation 14, the shared prefix, gradients, mistakes."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
)
from pipelines_by_hand import MID, inputs, quiet, relative, sample, weak_eps
from tiny_sd import SCHEDULER, tiny_pipeline, tiny_unet

from operators import RestoreError
from restore.guidance import CFG, PAG
from restore.guidance.pipelines import guided


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return quiet(tiny_pipeline(tmp_path_factory.mktemp("tokenizer")))


@torch.no_grad()
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("layers", [MID, "i1", "i5,o3"])
def test_pipeline_formula_gives_equation_14(first, layers):
    unet, g, s = tiny_unet(), 7.5, 3.0
    z, text = inputs(2)
    null = torch.zeros_like(text)
    c = unet(z, 401, encoder_hidden_states=text).sample
    u = unet(z, 401, encoder_hidden_states=null).sample
    weak = weak_eps(unet, z, 401, text, layers)
    expected = c + (g - 1) * (c - u) + s * (c - weak)
    order = [text, null] if first else [null, text]
    with guided(unet, PAG(s, layers=layers), conditional="first" if first else "second"):
        for _ in range(2):  # the second call shares the prefix
            halves = unet(torch.cat([z, z]), 401, encoder_hidden_states=torch.cat(order)).sample.chunk(2)
            without, with_prompt = reversed(halves) if first else halves
            assert relative(without + g * (with_prompt - without), expected) < 1e-5
            assert relative(without - u, s * (c - weak)) < 1e-3  # the same shift in both halves
    assert relative(s * (c - weak), torch.zeros_like(c) + c) > 1e-3  # and not a negligible one


@torch.no_grad()
def test_without_cfg_and_outside_the_block(pipe):
    unet = tiny_unet()
    z, text = inputs(2)
    plain = unet(z, 401, encoder_hidden_states=text).sample
    expected = plain + 3.0 * (plain - weak_eps(unet, z, 401, text))
    with guided(unet, PAG(3.0, layers="m1")):
        assert relative(unet(z, 401, encoder_hidden_states=text).sample, expected) < 1e-5
        as_tuple = unet(z, torch.tensor(401), text, return_dict=False)
        assert isinstance(as_tuple, tuple) and relative(as_tuple[0], expected) < 1e-5
    assert "forward" not in unet.__dict__
    assert torch.equal(unet(z, 401, encoder_hidden_states=text).sample, plain)


@torch.no_grad()
def test_interval_scale_zero_and_errors_leave_the_network_unchanged():
    unet = tiny_unet()
    z, text = inputs(2)
    plain = unet(z, 401, encoder_hidden_states=text).sample
    for guidance in (None, PAG(0.0, layers="m1"), PAG(3.0, layers="m1", interval=(400, 0))):
        calls = []
        handle = unet.mid_block.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with guided(unet, guidance):
            assert torch.equal(unet(z, 401, encoder_hidden_states=text).sample, plain)
        handle.remove()
        assert len(calls) == 1
    processors = {name: type(p) for name, p in unet.attn_processors.items()}
    with pytest.raises(RuntimeError), guided(unet, PAG(3.0, layers="m1")):
        unet(z[:, :3], 401, encoder_hidden_states=text)
    assert {name: type(p) for name, p in unet.attn_processors.items()} == processors
    assert torch.equal(unet(z, 401, encoder_hidden_states=text).sample, plain)


@torch.no_grad()
def test_the_weak_pass_repeats_neither_the_prefix_nor_the_other_half():
    unet = tiny_unet()
    z, text = inputs(2)
    ran = {"conv_in": [], "mid_block": []}
    for name, seen in ran.items():
        unet.get_submodule(name).register_forward_hook(lambda m, a, out, seen=seen: seen.append(len(out)))
    with guided(unet, PAG(3.0, layers="m1"), conditional="second"):
        for _ in range(2):
            ran["conv_in"].clear(), ran["mid_block"].clear()
            unet(torch.cat([z, z]), 401, encoder_hidden_states=torch.cat([text, text]))
    assert ran["mid_block"] == [4, 2]
    assert ran["conv_in"][0] == 4 and 4 not in ran["conv_in"][1:]


@torch.no_grad()
def test_a_weak_pass_is_used_again_and_not_in_another_run():
    unet, s = tiny_unet(), 3.0
    z, text = inputs(2)
    with guided(unet, PAG(s, layers="m1", every=3)):
        added = {}
        for run, times in enumerate([(901, 801), (901, 701)]):
            for t in times:
                added[run, t] = unet(z, t, encoder_hidden_states=text).sample - plain_of(unet, z, t, text)
    weak = {t: s * (plain_of(unet, z, t, text) - weak_eps(unet, z, t, text)) for t in (901, 701)}
    assert relative(added[0, 901], weak[901]) < 1e-3 and relative(added[1, 901], weak[901]) < 1e-3
    assert relative(added[0, 801], weak[901]) < 1e-3 and relative(added[1, 701], weak[901]) < 1e-3
    assert relative(weak[901], weak[701]) > 1e-2


def plain_of(unet, z, t, text):
    return type(unet).forward(unet, z, t, encoder_hidden_states=text).sample


def test_score_distillation_gradient():
    """SDS: w(t) (eps_guided - n) for a rendered latent, threestudio's batch order [with prompt, without]."""
    unet, scale, s = tiny_unet(), 100.0, 100.0
    z, text = inputs(1)
    null = torch.zeros_like(text)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    a = float(DDIMScheduler(**SCHEDULER).alphas_cumprod[401])
    latent = z.clone().requires_grad_()
    z_t = a**0.5 * latent.detach() + (1 - a) ** 0.5 * noise
    with torch.no_grad(), guided(unet, PAG(s, layers=MID), conditional="first"):
        c, u = unet(torch.cat([z_t] * 2), 401, encoder_hidden_states=torch.cat([text, null])).sample.chunk(2)
    (gradient,) = torch.autograd.grad(((1 - a) * (u + scale * (c - u) - noise) * latent).sum(), latent)
    with torch.no_grad():
        c = unet(z_t, 401, encoder_hidden_states=text).sample
        u = unet(z_t, 401, encoder_hidden_states=null).sample
        weak = weak_eps(unet, z_t, 401, text)
    expected = (1 - a) * (c + (scale - 1) * (c - u) + s * (c - weak) - noise)
    assert relative(gradient, expected) < 1e-4


def test_gradient_of_the_output_is_the_strong_passes():
    unet = tiny_unet().requires_grad_(False)
    z, text = inputs(2)
    z.requires_grad_()
    (expected,) = torch.autograd.grad(unet(z, 401, encoder_hidden_states=text).sample.square().sum(), z)
    plain = unet(z, 401, encoder_hidden_states=text).sample.detach()
    unet.enable_gradient_checkpointing()
    with guided(unet, PAG(3.0, layers="m1")):
        for _ in range(2):
            out = unet(z, 401, encoder_hidden_states=text).sample
            (gradient,) = torch.autograd.grad((2 * plain * out).sum(), z)
            assert relative(gradient, expected) < 1e-5


def test_mistakes(pipe):
    with pytest.raises(RestoreError, match="guidance_scale = w"), guided(pipe, CFG(1.0) + PAG(1.0, layers="m1")):
        pass
    with pytest.raises(RestoreError, match="no attention layer is called 'i99'"), guided(pipe, PAG(1.0, layers="i99")):
        pass
    with (
        pytest.raises(RestoreError, match="pipe must be .* got object"),
        guided(object(), PAG(1.0, layers="m1")),
    ):
        pass
    with pytest.raises(RestoreError, match="conditional='last'"), guided(pipe, None, conditional="last"):
        pass
    z, text = inputs(3)
    with pytest.raises(RestoreError, match="two halves"), guided(pipe, None, conditional="second"):
        pipe.unet(z, 401, encoder_hidden_states=text)
    sample(pipe, guidance_scale=5.0)
    with pytest.raises(RestoreError, match="conditional='second'"), guided(pipe, PAG(1.0, layers="m1")):
        pipe.unet(z, 401, encoder_hidden_states=text)
