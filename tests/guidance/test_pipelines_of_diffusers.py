"""Guided U-Net pipelines of the paper and SDXL, against diffusers' own PAG pipelines."""

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
)
from pipelines_by_hand import MID, half_mask, picture, quiet, relative, sample
from tiny_sd import SCHEDULER, tiny_controlnet, tiny_pipeline, tiny_unet

from restore.guidance import PAG
from restore.guidance.attention import perturb_attention
from restore.guidance.pipelines import PipelineNetwork, guided


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return quiet(tiny_pipeline(tmp_path_factory.mktemp("tokenizer")))


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


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_sdxl(tmp_path, guidance_scale):
    """Against diffusers' own PAG for it."""
    pipe = quiet(tiny_flow.sdxl_pipeline(tmp_path))
    official = quiet(tiny_flow.sdxl_pipeline(tmp_path, StableDiffusionXLPAGPipeline, pag_applied_layers=["mid"]))
    options = {"height": 32, "width": 32, "guidance_scale": guidance_scale}
    with guided(pipe, PAG(3.0, layers="m1.0,m1.1")):
        ours = sample(pipe, **options)
    assert relative(ours, sample(official, pag_scale=3.0, **options)) < 1e-4
    assert relative(ours, sample(pipe, **options)) > 1e-3
    with guided(pipe, PAG(3.0, layers="m1.1:2", schedule="linear")):
        assert relative(sample(pipe, **options), ours) > 1e-4
