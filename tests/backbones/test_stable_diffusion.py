"""The Stable Diffusion backbone against modules run with the official code (tests/golden/sd_modules)."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from tiny_sd import SCHEDULER, UNET, seeded, tiny_unet, tiny_vae

from operators import RestoreError
from restore.backbones.attention_layers import find_attention_layers
from restore.backbones.base import Backbone
from restore.backbones.memory_options import enable_block_checkpointing, enable_vae_slicing, enable_vae_tiling
from restore.backbones.schedule import Schedule
from restore.backbones.stable_diffusion import StableDiffusion

GOLDEN = Path(__file__).parent.parent / "golden"
SIDECAR = json.loads((GOLDEN / "sd_modules.json").read_text())


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "sd_modules.safetensors")


@pytest.fixture(scope="module")
def golden(tensors):
    nets = []
    for cls, name in ((UNet2DConditionModel, "sd_unet"), (AutoencoderKL, "sd_vae")):
        net = cls.from_config(json.loads((GOLDEN / "nets" / f"{name}_config.json").read_text()))
        state = load_file(GOLDEN / "nets" / f"{name}.safetensors")
        net.load_state_dict({k: v.float() for k, v in state.items()})
        nets.append(net)
    return StableDiffusion(*nets, Schedule.from_config(SCHEDULER), tensors["context"][:1])


def tiny(**options):
    unet, vae = options.pop("unet", None) or tiny_unet(), options.pop("vae", None) or tiny_vae()
    return StableDiffusion(unet, vae, Schedule.from_config(SCHEDULER), torch.randn(1, 12, 16), **options)


def test_protocol_and_sizes(golden):
    assert isinstance(golden, Backbone)
    assert (golden.channels, golden.resolution, golden.multiple, golden.downscale) == (4, 16, 8, 4)
    assert not any(p.requires_grad for p in golden.network.parameters())
    assert not golden.network.training and not golden.vae.training


def test_eps_is_the_official_one(golden, tensors):
    for i in range(2):
        eps = golden.predict(tensors["z"][i : i + 1], int(tensors["t"][i]), tensors["context"][i : i + 1]).eps
        assert relative(eps, tensors["eps"][i : i + 1]) < 1e-5


def test_no_condition_is_the_empty_prompt_for_the_whole_batch(golden, tensors):
    z = tensors["z"]
    eps = golden.predict(z, 401).eps
    expected = golden.predict(z, 401, tensors["context"][:1].expand(2, -1, -1)).eps
    assert torch.equal(eps, expected)
    assert relative(eps, golden.predict(z, 401, tensors["context"][1:]).eps) > 1e-4


def test_encode_and_decode_are_the_official_ones(golden, tensors):
    scale = golden.vae.config.scaling_factor
    assert relative(golden.encode(tensors["vae.x"]), scale * tensors["vae.enc_mean"]) < 1e-5
    noise = torch.randn(tensors["vae.enc_mean"].shape, generator=torch.Generator().manual_seed(0))
    sample = scale * (tensors["vae.enc_mean"] + (tensors["vae.enc_logvar"] / 2).exp() * noise)
    assert relative(golden.encode(tensors["vae.x"], noise), sample) < 1e-5
    assert relative(golden.decode(scale * tensors["vae.z"]), tensors["vae.dec"]) < 1e-5


def test_paper_names_are_the_official_ones(golden):
    named = {layer.paper: path for path, layer in golden.attention.items()}
    expected = {k: f"{v}.transformer_blocks.0.attn1" for k, v in SIDECAR["ldm_layer_to_diffusers"].items()}
    assert named == expected
    i8 = golden.attention["down_blocks.2.attentions.1.transformer_blocks.0.attn1"]
    assert (i8.short, i8.downsampling, i8.channels) == ("i8", 4, 32)
    assert all(golden.network.get_submodule(path) is layer.module for path, layer in golden.attention.items())


def test_attention_is_listed_in_order_of_execution(golden, tensors):
    ran = []
    hooks = [
        layer.module.register_forward_hook(lambda *_, path=path: ran.append(path))
        for path, layer in golden.attention.items()
    ]
    tokens = {}
    hooks += [
        layer.module.register_forward_pre_hook(lambda _, args, path=path: tokens.update({path: args[0].shape[1]}))
        for path, layer in golden.attention.items()
    ]
    golden.predict(tensors["z"], 1)
    for hook in hooks:
        hook.remove()
    assert ran == list(golden.attention)
    for path, layer in golden.attention.items():
        assert tokens[path] == (16 // layer.downsampling) ** 2


def test_sd15_names_on_the_real_configuration():
    # SD 1.5's U-Net; 859 520 964 parameters, none of them allocated.
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    layers = find_attention_layers(unet)
    by_short = {layer.short: layer for layer in layers.values()}
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert list(by_short) == ["i1", "i2", "i4", "i5", "i7", "i8", "m1", *(f"o{n}" for n in range(3, 12))]
    assert by_short["i8"].path == "down_blocks.2.attentions.1.transformer_blocks.0.attn1"
    assert by_short["i8"].paper == "input_blocks.8.1"
    assert (by_short["i8"].channels, by_short["i8"].heads, by_short["i8"].downsampling) == (1280, 8, 4)


def test_several_transformer_layers_get_distinct_names_and_cross_attention_none():
    layers = find_attention_layers(tiny_unet(transformer_layers_per_block=2))
    names = [layer.paper for layer in layers.values()]
    assert "input_blocks.1.1.transformer_blocks.1.attn1" in names and len(set(names)) == len(names)
    upscaler = tiny_unet(only_cross_attention=[True, False, False])
    assert not [path for path in find_attention_layers(upscaler) if path.startswith("down_blocks.0")]


def test_v_prediction_gives_the_same_eps_as_the_network_it_stands_for(golden, tensors):
    """A v-network made from the eps-network, v = (eps - sqrt(1-a) x_t) / sqrt(a), must give eps back."""
    t, z = 601, tensors["z"]
    a = float(golden.schedule.alphas_cumprod[t])
    eps = golden.predict(z, t).eps
    v = (eps - math.sqrt(1 - a) * z) / math.sqrt(a)
    as_v = StableDiffusion(
        golden.network, golden.vae, golden.schedule, golden.null_condition, prediction_type="v_prediction"
    )
    handle = golden.network.register_forward_hook(lambda *_: (v,))
    try:
        assert relative(as_v.predict(z, t).eps, eps) < 1e-6
    finally:
        handle.remove()


def test_conditions_must_be_embeddings(golden, tensors):
    for wrong in (3, torch.tensor([1, 2]), tensors["context"][:1].expand(3, -1, -1)):
        with pytest.raises(RestoreError, match="embedding .1 or 2, tokens, width.*encode_prompt"):
            golden.predict(tensors["z"], 401, wrong)


def test_times_between_the_tables(golden, tensors):
    z, context = tensors["z"], tensors["context"]
    with torch.no_grad():
        both = golden.predict(z, torch.tensor([400.5, 12.0]), context)
        alone = [golden.predict(z[i : i + 1], t, context[i : i + 1]) for i, t in enumerate((400.5, 12))]
        expected = golden.network(z[:1], 400.5, encoder_hidden_states=context[:1]).sample
        below = golden.network(z[:1], 400, encoder_hidden_states=context[:1]).sample
    assert relative(alone[0].eps, expected) < 1e-5 < 1e-3 < relative(below, expected)
    for i, one in enumerate(alone):
        assert relative(both.eps[i : i + 1], one.eps) < 1e-5 and relative(both.x0[i : i + 1], one.x0) < 1e-5
    a, s = golden.schedule.alpha(400.5), golden.schedule.sigma(400.5)
    assert relative(a * alone[0].x0 + s * alone[0].eps, z[:1]) < 1e-5
    with pytest.raises(RestoreError, match="0 to 999"):
        golden.predict(z, 999.5)


def gradient(backbone, z):
    z = z.clone().requires_grad_()
    loss = backbone.decode(backbone.predict(z, 301).eps).square().sum()
    return torch.autograd.grad(loss, z)[0]


def test_checkpointing_changes_no_gradient():
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    null = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(2))
    args = (Schedule.from_config(SCHEDULER), null)
    plain = gradient(StableDiffusion(tiny_unet(), tiny_vae(), *args), z)
    calls = []
    checkpointed = StableDiffusion(tiny_unet(), tiny_vae(), *args)
    enable_block_checkpointing(checkpointed)
    resnets = checkpointed.network.mid_block.resnets[1], checkpointed.vae.decoder.up_blocks[0].resnets[0]
    for i, resnet in enumerate(resnets):
        resnet.norm1.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    assert relative(gradient(checkpointed, z), plain) < 1e-6
    assert calls.count(0) == calls.count(1) == 2  # once forward, once recomputed


def test_slicing_and_tiling():
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    plain, sliced, tiled = tiny(), tiny(), tiny()
    enable_vae_slicing(sliced), enable_vae_tiling(tiled)
    calls = []
    assert relative(sliced.decode(z), plain.decode(z)) < 1e-5
    tiled.vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    assert tiled.decode(torch.randn(1, 4, 20, 20)).shape == (1, 3, 80, 80)
    assert len(calls) > 1


def test_half_precision_keeps_the_sample_in_float32_and_small_gradients_alive():
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    null = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(2))
    backbones = [
        StableDiffusion(tiny_unet().to(dtype), tiny_vae(), Schedule.from_config(SCHEDULER), null)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
    gradients = []
    for backbone in backbones:
        x = z.clone().requires_grad_()
        eps = backbone.predict(x, 301).eps
        assert eps.dtype == torch.float32
        gradients.append(torch.autograd.grad(1e-5 * eps.norm(), x)[0])
    assert relative(gradients[1], gradients[0]) < 0.02
    assert relative(gradients[2], gradients[0]) < 0.1


def test_error_names_an_overflowing_vae():
    vae = tiny_vae()
    torch.nn.init.constant_(vae.decoder.conv_in.bias, 1e30)
    for conv in (vae.decoder.conv_in, vae.decoder.conv_out):
        conv.weight.data *= 1e5
    backbone = tiny(vae=vae.to(torch.float16))
    with pytest.raises(RestoreError, match="vae_dtype must be float32 or bfloat16, got float16.*decoder overflowed"):
        backbone.decode(torch.randn(1, 4, 8, 8))
    # A sample that diverged before the decoder is not the decoder's fault.
    assert not tiny().decode(torch.full((1, 4, 8, 8), math.nan)).isfinite().any()


@pytest.mark.parametrize(
    "changes,sentence",
    [
        ({"vae": lambda: tiny_vae(latent_channels=8)}, "latents of 4 channels.*got 8"),
        ({"unet": lambda: tiny_unet(in_channels=9)}, "9 input and 4 output channels .an inpainting"),
        ({"unet": lambda: tiny_unet(cross_attention_dim=24)}, "embeddings must be 24 wide.*got 16"),
        ({"unet": lambda: tiny_unet(class_embed_type="timestep")}, "no conditions beyond a prompt"),
        ({"prediction_type": lambda: "samples"}, "prediction type 'samples'; did you mean 'sample'"),
    ],
)
def test_parts_that_do_not_belong_together(changes, sentence):
    with pytest.raises(RestoreError, match=sentence):
        tiny(**{k: make() for k, make in changes.items()})


def test_tiny_weights_do_not_depend_on_what_ran_before():
    torch.randn(7)
    assert UNET["cross_attention_dim"] == 16
    assert torch.equal(tiny_unet().conv_in.weight, seeded(lambda: UNet2DConditionModel(**UNET), 0).conv_in.weight)


def test_no_second_pass_when_there_is_nothing_to_contrast():
    from restore.guidance import CFG, PAG, estimator

    backbone, z = tiny(), torch.randn(1, 4, 8, 8)
    prompt = torch.randn(1, 12, 16)
    cases = [
        (CFG(6.5), None, 1),
        (CFG(6.5), prompt, 2),
        (PAG(0.0, layers="m1"), None, 1),
        (PAG(1.0, layers="m1"), None, 2),
    ]
    for guidance, condition, passes in cases:
        calls = []
        handle = backbone.network.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad(), estimator(backbone, guidance) as estimate:
            strong, eps = estimate(z, 401, condition)
        handle.remove()
        assert len(calls) == passes, guidance
        assert torch.equal(strong.eps, eps) == (passes == 1)
