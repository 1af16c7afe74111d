"""SLG and SSG: blocks left out, and pairs of tokens swapped, against the networks' own means and by hand."""

from __future__ import annotations

import pytest
import tiny_flow
import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from tiny_sd import tiny_unet
from tiny_transformers import make_case
from weak_passes import MIDDLE, latent_prior, relative, weak_of

from restore.backbones.transformers import SD3, DiT, Flux
from restore.guidance import CFG, SLG, SSG, estimator, pipelines
from restore.guidance.ssg import swap_pairs

T_HIGH, TOKENS = 400, 5
KINDS = {
    "sd3": lambda: SD3(tiny_flow.tiny_sd3(), tiny_flow.shifted_vae(), tiny_flow.SHIFTED),
    "sd3.5": lambda: SD3(tiny_flow.tiny_sd3(dual=True), tiny_flow.shifted_vae(), tiny_flow.SHIFTED),
    "flux": lambda: Flux(tiny_flow.tiny_flux(), tiny_flow.shifted_vae(), tiny_flow.DYNAMIC, resolution=8),
    "dit": lambda: DiT(tiny_flow.tiny_dit(), tiny_flow.tiny_vae(), {"beta_start": 0.0001, "beta_end": 0.02}),
}


def prior_of(name):
    model = KINDS[name]()
    model.network.double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    if name == "dit":
        return model, x, torch.tensor([3, 7])
    return model, x, torch.randn(2, 1 + TOKENS, tiny_flow.TEXT, generator=generator, dtype=torch.float64)


def guided(guidance, case):
    """(strong prediction, eps_weak)."""
    model, x, condition = case
    with torch.no_grad(), estimator(model, guidance) as estimate:
        strong, eps = estimate(x, T_HIGH, condition)
    return strong, 2 * strong.eps - eps


def with_hooks(case, handles):
    model, x, condition = case
    with torch.no_grad():
        found = model.predict(x, T_HIGH, condition)
    for handle in handles:
        handle.remove()
    return found.eps


@pytest.mark.parametrize("name", ["sd3", "sd3.5"])
@pytest.mark.parametrize("layers, skipped", [("b0", [0]), (["b0", "b1"], [0, 1])])
def test_slg_is_sd3s_own_skipping_of_blocks(name, layers, skipped):
    """diffusers' SD3 takes skip_layers; its blocks return the text first, which its generic hook gets wrong."""
    case = prior_of(name)
    strong, got = guided(SLG(1.0, layers), case)
    forward = case[0].network.forward
    case[0].network.forward = lambda *args, **kwargs: forward(*args, **kwargs, skip_layers=skipped)
    expected = with_hooks(case, [])
    del case[0].network.forward
    assert relative(got, expected) < 1e-12 and relative(expected, strong.eps) > 1e-3


@pytest.mark.parametrize("name, short", [("flux", "b1"), ("flux", "b3"), ("dit", "b0")])
def test_slg_leaves_text_and_image_as_they_enter(name, short):
    case = prior_of(name)
    (path,) = (layer.path for layer in case[0].attention.values() if layer.short == short)
    block = case[0].network.get_submodule(path.rpartition(".")[0])

    def entering(module, args, kwargs, output):
        image = args[0] if args else kwargs["hidden_states"]
        return (kwargs["encoder_hidden_states"], image) if isinstance(output, tuple) else image

    expected = with_hooks(case, [block.register_forward_hook(entering, with_kwargs=True)])
    strong, got = guided(SLG(1.0, short), case)
    assert relative(got, expected) < 1e-12 and relative(expected, strong.eps) > 1e-4


def test_slg_in_u_nets_is_diffusers_layer_skip():
    """The transformer block of a Stable Diffusion U-Net; in a pixel U-Net the attention with its skip connection."""
    model = latent_prior()
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = weak_of(SLG(1.0, "m1"), model, z, 40)
    apply_layer_skip(model.network, LayerSkipConfig([0], fqn="mid_block.attentions.0.transformer_blocks"))
    with torch.no_grad():
        expected = model.predict(z, 40).eps
    assert isinstance(model.network, UNet2DConditionModel) and relative(got, expected) < 1e-12


def test_slg_in_a_pixel_u_net(model, x):
    handle = model.attention[MIDDLE].module.register_forward_hook(lambda module, args, output: args[0])
    with torch.no_grad():
        expected = model.predict(x, 40).eps
    handle.remove()
    got = weak_of(SLG(1.0, "m1"), model, x, 40)
    assert relative(got, expected) < 1e-12 and relative(got, model.predict(x, 40).eps.detach()) > 1e-4


def test_slg_with_cfg_is_diffusers_guider():
    """pred = null + g (cond − null) + s (cond − skipped), g = w + 1."""
    from diffusers.guiders import SkipLayerGuidance

    model = latent_prior()
    z, text = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 12, 16).double()
    with torch.no_grad(), estimator(model, CFG(6.5) + SLG(2.8, "m1")) as estimate:
        strong, eps = estimate(z, 40, text)
        null, skipped = (part.eps(z, 40, text, strong) for part in estimate.passes)
    guider = SkipLayerGuidance(7.5, 2.8, skip_layer_guidance_start=0.0, skip_layer_guidance_layers=[0])
    guider.set_state(step=1, num_inference_steps=10, timestep=40)
    assert relative(eps, guider.forward(strong.eps, null, skipped).pred) < 1e-10


@pytest.mark.parametrize("name", ["chroma", "flux2", "qwenimage", "auraflow", "pixart", "sana", "hunyuandit"])
def test_slg_and_ssg_in_other_transformers(name):
    case = make_case(name)
    with torch.no_grad():
        plain = case.network(**case.call).sample
        for guidance in (SLG(1.0, "b0"), SSG(1.0, "b0", share=0.2)):
            with pipelines.guided(case.network, guidance):
                changed = case.network(**case.call).sample
            assert changed.shape == plain.shape and torch.isfinite(changed).all()
            assert relative(changed, plain) > 1e-5, guidance


def test_swapped_pairs():
    """The pair with the smallest cosine first, then the smallest among the tokens that are left; images separately."""
    first = torch.tensor([[1.0, 0], [-1, 0.1], [0, 1], [0.5, -1]])  # 0 and 1 are opposite, then 2 and 3
    second = torch.tensor([[1.0, 0.1], [1, 0], [0, 2], [-3, 0]])  # 1 and 3, then 0 and 2
    rows = torch.stack([first, second])
    one, two = swap_pairs(rows, 0.25), swap_pairs(rows, 0.5)
    assert torch.equal(one, torch.stack([first[[1, 0, 2, 3]], second[[0, 3, 2, 1]]]))
    assert torch.equal(two, torch.stack([first[[1, 0, 3, 2]], second[[2, 3, 0, 1]]]))
    assert torch.equal(swap_pairs(rows, 1e-6), one)  # at least one pair
    assert torch.equal(swap_pairs(rows[:, :1], 0.5), rows[:, :1])


@pytest.mark.parametrize("axis", ["tokens", "channels", "both"])
def test_ssg(model, x, axis):
    """What enters the middle block's attention, swapped by hand."""

    def swap(module, args):
        tokens = args[0].flatten(2).mT
        tokens = swap_pairs(tokens, 0.2) if axis != "channels" else tokens
        tokens = swap_pairs(tokens.mT, 0.2).mT if axis != "tokens" else tokens
        return (tokens.mT.reshape(args[0].shape),)

    handle = model.attention[MIDDLE].module.register_forward_pre_hook(swap)
    with torch.no_grad():
        expected = model.predict(x, 40).eps
        handle.remove()
        got = weak_of(SSG(1.0, "m1", share=0.2, axis=axis), model, x, 40)
        assert relative(got, expected) < 1e-12 and relative(got, model.predict(x, 40).eps) > 1e-4


def test_ssg_swaps_in_all_layers_unless_told(model, x):
    with torch.no_grad():
        every = weak_of(SSG(1.0, share=0.2), model, x, 40)
        named = weak_of(SSG(1.0, list(model.attention), share=0.2), model, x, 40)
    assert len(model.attention) > 1 and torch.equal(every, named)
    assert relative(every, weak_of(SSG(1.0, "m1", share=0.2), model, x, 40)) > 1e-6


def test_ssg_in_a_pipeline_of_unet_swaps_the_prompts_rows_alone():
    unet, x, text = tiny_unet(), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = unet(x, 400, text).sample
        with pipelines.guided(unet, SSG(1.0, share=0.2), conditional="second"):
            shift = unet(x, 400, text).sample - plain
    assert relative(shift[0], shift[1]) < 1e-5 and float(shift.norm()) > 1e-4
