"""Guidance inside diffusers' pipelines: equation 14, every pipeline of the paper, and diffusers' own PAG."""

import numpy as np
import pytest
import tiny_flow
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPAGPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from PIL import Image
from tiny_sd import SCHEDULER, tiny_controlnet, tiny_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae

from operators import RestoreError
from restore.guidance import CFG, PAG
from restore.guidance.attention import perturb_attention
from restore.guidance.pipelines import PipelineNetwork, guided

MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return quiet(tiny_pipeline(tmp_path_factory.mktemp("tokenizer")))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def relative(a, b):
    return float((a - b).norm() / b.norm())


def sample(pipe, *, seed=0, **options):
    options = {"prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent", **options}
    out = pipe(generator=torch.Generator().manual_seed(seed), **options).images
    return out if isinstance(out, torch.Tensor) else torch.from_numpy(np.stack(out))


def picture(size=32, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def half_mask(size=32):
    mask = np.zeros((size, size), np.uint8)
    mask[:, size // 2 :] = 255
    return Image.fromarray(mask)


def inputs(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.randn(batch, 12, 16, generator=generator)


def weak_eps(unet, z, t, text, layers=MID, target="identity"):
    """The perturbed prediction, made here without `guided`."""
    perturbed = PAG(1.0, layers=layers, target=target).perturbed_layers(PipelineNetwork(unet))
    with torch.no_grad(), perturb_attention(perturbed, None):
        return unet(z, t, encoder_hidden_states=text).sample


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
def test_interval_scale_zero_and_errors_leave_the_network_alone():
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


CASES = [("cfg", {"guidance_scale": 5.0}), ("no cfg", {}), ("empty prompt", {"prompt": "", "guidance_scale": 0.0})]


@pytest.mark.parametrize("name,options", CASES, ids=[c[0] for c in CASES])
@pytest.mark.parametrize("layers,theirs", [(MID, "mid"), ("i5", r"down_blocks.1.attentions.1")])
def test_text_to_image_agrees_with_diffusers_own_pag(pipe, name, options, layers, theirs):
    official = quiet(
        StableDiffusionPAGPipeline(**pipe.components, pag_applied_layers=[theirs], requires_safety_checker=False)
    )
    expected = sample(official, pag_scale=3.0, pag_adaptive_scale=0.0, **options)
    with guided(pipe, PAG(3.0, layers=layers)):
        ours = sample(pipe, **options)
    assert relative(ours, expected) < 1e-4
    assert relative(ours, sample(pipe, **options)) > 1e-3


def test_other_schedulers_and_v_prediction(tmp_path):
    for scheduler in (
        EulerDiscreteScheduler.from_config(SCHEDULER),
        DDIMScheduler(**SCHEDULER, prediction_type="v_prediction"),
    ):
        pipe = quiet(tiny_pipeline(tmp_path))
        pipe.scheduler = scheduler
        official = quiet(
            StableDiffusionPAGPipeline(**pipe.components, pag_applied_layers=["mid"], requires_safety_checker=False)
        )
        expected = sample(official, pag_scale=3.0, guidance_scale=5.0)
        with guided(pipe, PAG(3.0, layers=MID)):
            assert relative(sample(pipe, guidance_scale=5.0), expected) < 1e-4


def test_several_images_and_prompts(pipe):
    official = quiet(
        StableDiffusionPAGPipeline(**pipe.components, pag_applied_layers=["mid"], requires_safety_checker=False)
    )
    options = {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2, "guidance_scale": 5.0}
    expected = sample(official, pag_scale=3.0, **options)
    with guided(pipe, PAG(3.0, layers=MID)):
        assert relative(sample(pipe, **options), expected) < 1e-4


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_controlnet_with_an_empty_prompt(pipe, guidance_scale):
    components = {**pipe.components, "controlnet": tiny_controlnet()}
    control = quiet(StableDiffusionControlNetPipeline(**components, requires_safety_checker=False))
    official = quiet(
        StableDiffusionControlNetPAGPipeline(**components, pag_applied_layers=["mid"], requires_safety_checker=False)
    )
    options = {"prompt": "", "image": picture(), "guidance_scale": guidance_scale}
    plain = sample(control, **options)
    assert relative(plain, sample(pipe, prompt="", guidance_scale=guidance_scale)) > 1e-2  # the control acts
    with guided(control, PAG(2.5, layers=MID)):
        ours = sample(control, **options)
    assert relative(ours, sample(official, pag_scale=2.5, **options)) < 1e-4
    assert relative(ours, plain) > 1e-3


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_inpainting(tmp_path, channels, guidance_scale):
    pipe = tiny_pipeline(tmp_path, tiny_unet(in_channels=channels))
    inpaint = quiet(StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False))
    options = {
        "prompt": "",
        "image": picture(),
        "mask_image": half_mask(),
        "height": 32,
        "width": 32,
        "strength": 1.0,
        "guidance_scale": guidance_scale,
    }
    with guided(inpaint, PAG(1.5, layers=MID)):
        ours = sample(inpaint, **options)
    assert relative(ours, sample(inpaint, **options)) > 1e-3
    official = quiet(
        StableDiffusionPAGInpaintPipeline(**pipe.components, pag_applied_layers=["mid"], requires_safety_checker=False)
    )
    assert relative(ours, sample(official, pag_scale=1.5, **options)) < 1e-4


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_x4_upscaler(tmp_path, guidance_scale):
    """diffusers has no PAG for it: the reference here is the pipeline with equation 14 written into its U-Net."""
    base = tiny_pipeline(
        tmp_path, tiny_unet(in_channels=7, num_class_embeds=1000, only_cross_attention=[True, False, False])
    )
    parts = {name: base.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    upscaler = quiet(StableDiffusionUpscalePipeline(**parts, low_res_scheduler=DDPMScheduler()))
    options = {"prompt": "", "image": picture(8), "guidance_scale": guidance_scale, "noise_level": 20}
    plain = sample(upscaler, **options)
    with guided(upscaler, PAG(2.0, layers="i5")):
        ours = sample(upscaler, **options)
    unet, forward = upscaler.unet, upscaler.unet.forward

    def by_hand(x, t, *, encoder_hidden_states, class_labels, **kwargs):
        with torch.no_grad():
            out = forward(x, t, encoder_hidden_states, class_labels=class_labels).sample
            perturbed = PAG(1.0, layers="i5").perturbed_layers(PipelineNetwork(unet))
            with perturb_attention(perturbed, None):
                weak = forward(x, t, encoder_hidden_states, class_labels=class_labels).sample
            shift = 2.0 * (out - weak)
            return (out + (shift.chunk(2)[1].repeat(2, 1, 1, 1) if guidance_scale > 1 else shift),)

    unet.forward = by_hand
    expected = sample(upscaler, **options)
    del unet.forward
    assert relative(ours, expected) < 1e-5
    assert relative(ours, plain) > 1e-3


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


def by_hand(network, layers, scale, *, cfg="second", **unused):
    """A forward of the network with equation 14 written out: two whole passes, the second perturbed."""
    forward = type(network).forward

    @torch.no_grad()
    def run(*args, **kwargs):
        out = forward(network, *args, **kwargs)[0]
        perturbed = PAG(1.0, layers=layers, **unused).perturbed_layers(PipelineNetwork(network))
        with perturb_attention(perturbed, None, network):
            weak = forward(network, *args, **kwargs)[0]
        shift = scale * (out - weak)
        if cfg != "all":
            shift = torch.cat([shift.chunk(2)[cfg == "second"]] * 2)
        return (out + shift,) if not kwargs.get("return_dict", True) else Transformer2DModelOutput(sample=out + shift)

    return run


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("scope", ["joint", "image"])
def test_stable_diffusion_3(tmp_path, dual, guidance_scale, scope):
    pipe = quiet(tiny_flow.sd3_pipeline(tmp_path, dual))
    size = {"height": 32, "width": 48, "max_sequence_length": 8}
    options = {**size, "guidance_scale": guidance_scale}
    plain = sample(pipe, **options)
    with guided(pipe, PAG(2.0, layers="b1:0,3", scope=scope)):
        ours = sample(pipe, **options)
    cfg = "second" if guidance_scale > 1 else "all"
    pipe.transformer.forward = by_hand(pipe.transformer, "b1:0,3", 2.0, cfg=cfg, scope=scope)
    expected = sample(pipe, **options)
    del pipe.transformer.forward
    assert relative(ours, expected) < 1e-5 and relative(ours, plain) > 1e-3
    assert torch.equal(sample(pipe, **options), plain)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("layers", ["b0", "b3"])
def test_flux(tmp_path, distilled, layers):
    pipe = quiet(tiny_flow.flux_pipeline(tmp_path, distilled))
    options = {"height": 32, "width": 48, "max_sequence_length": 8, "guidance_scale": 3.5}
    plain = sample(pipe, **options)
    with guided(pipe, PAG(2.0, layers=layers, scope="image")):
        ours = sample(pipe, **options)
    with guided(pipe, PAG(2.0, layers=layers, interval=(1000, 999.5))):
        first = sample(pipe, **options)  # the first step alone: times run to 1000
    with guided(pipe, PAG(2.0, layers=layers, interval=(0.9, 0))):
        assert torch.equal(sample(pipe, **options), plain)
    pipe.transformer.forward = by_hand(pipe.transformer, layers, 2.0, cfg="all", scope="image")
    expected = sample(pipe, **options)
    assert relative(ours, expected) < 1e-5 and relative(ours, plain) > 1e-3
    assert relative(first, plain) > 1e-4 and relative(first, ours) > 1e-4


def test_flux_with_true_cfg(tmp_path):
    """The pass without the prompt gets the shift of the one with it: u + g (c − u) + s (c − c_weak)."""
    pipe, calls = quiet(tiny_flow.flux_pipeline(tmp_path)), []
    options = {"height": 32, "width": 32, "max_sequence_length": 8, "true_cfg_scale": 4.0, "negative_prompt": "a dog"}
    with guided(pipe, PAG(2.0, layers="b1")):
        ours = sample(pipe, **options)
    alone = by_hand(pipe.transformer, "b1", 2.0, cfg="all")

    def run(*args, **kwargs):
        calls.append(kwargs["hidden_states"])
        if len(calls) % 2:
            run.shift = alone(*args, **kwargs)[0] - type(pipe.transformer).forward(pipe.transformer, *args, **kwargs)[0]
        return (type(pipe.transformer).forward(pipe.transformer, *args, **kwargs)[0] + run.shift,)

    pipe.transformer.forward = run
    assert relative(ours, sample(pipe, **options)) < 1e-5 and len(calls) == 8


def test_dit():
    pipe = quiet(tiny_flow.dit_pipeline())

    def sampled():
        g = torch.Generator().manual_seed(0)
        out = pipe([1, 2], guidance_scale=4.0, num_inference_steps=3, generator=g, output_type="pt")
        return out.images

    network = pipe.transformer  # the pipeline's null class is 1000, the tiny one's 10
    forward = type(network).forward

    def renamed(*args, class_labels, **kwargs):
        return forward(network, *args, class_labels=class_labels.clamp(max=10), **kwargs)

    network.forward = renamed
    plain = sampled()
    with guided(pipe, PAG(2.0, layers="b1")):
        ours = sampled()
    alone = by_hand(network, "b1", 2.0, cfg="first")
    network.forward = lambda *args, class_labels, **kwargs: alone(
        *args, class_labels=class_labels.clamp(max=10), **kwargs
    )
    assert relative(ours, sampled()) < 1e-4 and relative(ours, plain) > 1e-3


def sdxl(folder, cls, **more):
    """A tiny SDXL: two transformer layers to a block, two text encoders, sizes as further conditions."""
    unet = tiny_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
        cross_attention_dim=16 + 8,
    )
    tokenizer = tiny_tokenizer(folder)
    return quiet(
        cls(
            vae=tiny_vae(),
            text_encoder=tiny_text_encoder(),
            text_encoder_2=tiny_flow.clip(8, 22, True),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=unet,
            scheduler=EulerDiscreteScheduler(**SDXL),
            add_watermarker=False,
            **more,
        )
    )


SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_sdxl(tmp_path, guidance_scale):
    """Against diffusers' own PAG for it."""
    pipe = sdxl(tmp_path, StableDiffusionXLPipeline)
    official = sdxl(tmp_path, StableDiffusionXLPAGPipeline, pag_applied_layers=["mid"])
    options = {"height": 32, "width": 32, "guidance_scale": guidance_scale}
    with guided(pipe, PAG(3.0, layers="m1.0,m1.1")):
        ours = sample(pipe, **options)
    assert relative(ours, sample(official, pag_scale=3.0, **options)) < 1e-4
    assert relative(ours, sample(pipe, **options)) > 1e-3
    with guided(pipe, PAG(3.0, layers="m1.1:2", schedule="linear")):
        assert relative(sample(pipe, **options), ours) > 1e-4
