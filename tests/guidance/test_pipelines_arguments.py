"""Guided networks that consume or change what they are given, or hold more than one row for an image: equation 14 with
the perturbed prediction made by a whole second pass with hand-written processors."""

from __future__ import annotations

import warnings
from collections import deque

import pytest
import tiny_flow
import torch
from diffusers import (
    AnimateDiffPipeline,
    FirstBlockCacheConfig,
    MotionAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionPAGPipeline,
    T2IAdapter,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection, MultiIPAdapterImageProjection
from pipelines_by_hand import MID, by_processor, inputs, picture, quiet, relative, sample
from tiny_sd import seeded, tiny_pipeline, tiny_unet

from operators import RestoreError
from restore.backbones.prefix import Tape, _Output
from restore.guidance import PAG, estimator
from restore.guidance.layouts import NetworkCall
from restore.guidance.pipelines import PipelineNetwork, guided

I1 = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
O5 = "up_blocks.1.attentions.2.transformer_blocks.0.attn1"
SECOND = slice(1, None)


@pytest.fixture
def pipe(tmp_path):
    return quiet(tiny_pipeline(tmp_path))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("layers, path", [("i1", I1), ("m1", MID)])
@pytest.mark.filterwarnings("ignore:.*changes activations in place")
def test_t2i_adapter(pipe, layers, path, guidance_scale):
    """The network empties the list of the adapter's features; the weak pass has them too."""
    adapter = seeded(lambda: T2IAdapter(3, [16, 16, 32], 1, 4), 4)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    adapted = quiet(StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False))
    options = {"image": picture(), "height": 32, "width": 32, "guidance_scale": guidance_scale}
    plain = sample(adapted, **options)
    assert relative(plain, sample(pipe, height=32, width=32, guidance_scale=guidance_scale)) > 1e-2  # it acts
    with guided(adapted, PAG(3.0, layers=layers)):
        ours = sample(adapted, **options)
    rows = SECOND if guidance_scale > 1 else slice(None)
    adapted.unet.forward = by_processor(adapted.unet, [path], 3.0, rows=rows)
    expected = sample(adapted, **options)
    assert relative(ours, expected) < 1e-5 and relative(ours, plain) > 1e-3


def steps_of(unet, text, count=3):
    return [unet(inputs(1, seed)[0], 900 - 200 * seed, encoder_hidden_states=text).sample for seed in range(count)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layers, path", [("m1", MID), ("o5", O5)])
def test_freeu(layers, path, mode):
    """It scales activations in place, which two passes then cannot share: found out, and said once."""
    unet = tiny_unet()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    _, text = inputs(1)
    with mode():
        plain = steps_of(unet, text)
        with warnings.catch_warnings(record=True) as caught, guided(unet, PAG(3.0, layers=layers)):
            warnings.simplefilter("always")
            ours = steps_of(unet, text)
        unet.forward = by_processor(unet, [path], 3.0)
        expected = steps_of(unet, text)
    for got, right, without in zip(ours, expected, plain, strict=True):
        assert relative(got, right) < 1e-5 and relative(got, without) > 1e-3
    said = [str(item.message) for item in caught if "in place" in str(item.message)]
    assert len(said) == (layers == "o5") and all("UNet2DConditionModel" in text for text in said)


def test_inference_mode_shares_the_prefix():
    """Inference tensors have no version: they are compared once, then shared."""
    unet, ran = tiny_unet(), []
    forward = unet.conv_in.forward
    unet.conv_in.forward = lambda x: ran.append(1) or forward(x)
    _, text = inputs(1)
    with torch.inference_mode(), guided(unet, PAG(3.0, layers="m1")):
        steps_of(unet, text)
    assert len(ran) == 4  # twice in the first step, which finds the prefix


def faced_unet(plus):
    """A network with an IP-Adapter FaceID; of its Plus version faces are an attribute of a module."""
    unet = tiny_unet()
    widths = [unet.get_submodule(n.removesuffix(".processor")).to_k for n in unet.attn_processors if "attn2" in n]
    g = torch.Generator().manual_seed(0)
    keys = {
        f"{2 * i + 1}.to_{kv}_ip.weight": torch.randn(k.out_features, 16, generator=g)
        for i, k in enumerate(widths)
        for kv in "kv"
    }
    projection = {"proj.weight": torch.randn(64, 12, generator=g), "proj.bias": torch.zeros(64)}
    projection |= {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}], low_cpu_mem_usage=False)
    options = {"num_tokens": 4, "num_queries": 4, "ffn_ratio": 2, "depth": 1, "dim_head": 4, "heads": 2}
    face = seeded(lambda: IPAdapterFaceIDPlusImageProjection(16, 16, 20, 12, **options), 5)
    face.clip_embeds = torch.randn(2, 1, 6, 20, generator=g)
    if plus:
        unet.encoder_hid_proj = MultiIPAdapterImageProjection([face])
    return unet


@torch.no_grad()
@pytest.mark.parametrize("plus", [False, True])
def test_faces_kept_in_a_module(plus):
    """FaceID Plus; and FaceID, whose faces are arguments, so that half the batch is enough."""
    unet = faced_unet(plus)
    z, text = inputs(2)
    faces = {"image_embeds": [torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(1))]}
    call = {"encoder_hidden_states": text, "added_cond_kwargs": faces}
    assert NetworkCall(unet, (z, 401), call, unet, "second").cut != plus
    plain = unet(z, 401, **call).sample
    with guided(unet, PAG(3.0, layers="m1"), conditional="second"):
        ours = [unet(z, 401, **call).sample for _ in range(2)][-1]
    unet.forward = by_processor(unet, [MID], 3.0, rows=SECOND)
    assert relative(ours, unet(z, 401, **call).sample) < 1e-5 and relative(ours, plain) > 1e-3


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_animatediff(pipe, guidance_scale):
    """Frames are rows of the network's activations and of the prompt, not of its latents."""
    adapter = seeded(lambda: MotionAdapter((16, 16, 32), motion_num_attention_heads=2, motion_norm_num_groups=8), 6)
    animated = quiet(
        AnimateDiffPipeline(
            **{k: v for k, v in pipe.components.items() if k != "safety_checker"} | {"motion_adapter": adapter}
        )
    )
    options = {"num_frames": 3, "height": 32, "width": 32, "guidance_scale": guidance_scale, "num_inference_steps": 3}

    def sampled():
        g = torch.Generator().manual_seed(0)
        return animated("a cat", generator=g, output_type="latent", **options).frames

    plain = sampled()
    with guided(animated, PAG(3.0, layers="m1")):
        ours = sampled()
    rows = SECOND if guidance_scale > 1 else slice(None)
    animated.unet.forward = by_processor(animated.unet, [MID], 3.0, rows=rows)
    assert relative(ours, sampled()) < 1e-5 and relative(ours, plain) > 1e-3


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_text_to_video(pipe, guidance_scale):
    """(B, C, frames, h, w); the pipeline does not say whether it does classifier-free guidance."""
    unet = seeded(
        lambda: UNet3DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=16,
            attention_head_dim=4,
        ),
        8,
    )
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    video = quiet(TextToVideoSDPipeline(**parts, unet=unet))

    def sampled():
        g = torch.Generator().manual_seed(0)
        options = {"num_frames": 3, "height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}
        return video("a cat", guidance_scale=guidance_scale, generator=g, **options).frames

    plain = sampled()
    with guided(video, PAG(3.0, layers="m1")):
        ours = sampled()
    unet.forward = by_processor(unet, [MID], 3.0, rows=SECOND if guidance_scale > 1 else slice(None))
    assert relative(ours, sampled()) < 1e-5 and relative(ours, plain) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("batch, conditional", [(2, "second"), (2, "first"), (1, "all")])
def test_stable_video_diffusion(batch, conditional):
    """(B, frames, C, h, w), and activations with a row for each frame."""
    unet = seeded(
        lambda: UNetSpatioTemporalConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            layers_per_block=1,
            num_attention_heads=(2, 4),
            cross_attention_dim=16,
            projection_class_embeddings_input_dim=24,
            addition_time_embed_dim=8,
        ),
        7,
    )
    g = torch.Generator().manual_seed(0)
    x, image = torch.randn(batch, 2, 8, 8, 8, generator=g), torch.randn(batch, 1, 16, generator=g)
    ids = torch.tensor([[6.0, 127.0, 0.02]] * batch)
    plain = unet(x, 1.5, image, ids).sample
    with guided(unet, PAG(3.0, layers="m1"), conditional=conditional):
        ours = [unet(x, 1.5, image, added_time_ids=ids).sample for _ in range(2)][-1]
    rows = {"second": SECOND, "first": slice(0, 1), "all": slice(None)}[conditional]
    unet.forward = by_processor(unet, [MID], 3.0, rows=rows)
    assert relative(ours, unet(x, 1.5, image, ids).sample) < 1e-5 and relative(ours, plain) > 1e-3


def test_a_network_that_changes_its_tensors_is_refused():
    unet = tiny_unet()
    z, text = inputs(1)
    unet.forward = lambda x, *args, **kwargs: type(unet).forward(unet, x.mul_(0.9), *args, **kwargs)
    with (
        torch.no_grad(),
        guided(unet, PAG(3.0, layers="m1")),
        pytest.raises(RestoreError, match="UNet2DConditionModel"),
    ):
        unet(z, 401, encoder_hidden_states=text)


def test_a_network_that_caches_is_refused(tmp_path):
    pipe = quiet(tiny_flow.flux_pipeline(tmp_path))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with guided(pipe, PAG(2.0, layers="b1")), pytest.raises(RestoreError, match="disable_cache"):
        sample(pipe, height=32, width=32, max_sequence_length=8)


def test_a_pipeline_that_perturbs_attention_itself_is_refused(pipe):
    official = quiet(
        StableDiffusionPAGPipeline(**pipe.components, pag_applied_layers=["mid"], requires_safety_checker=False)
    )
    with guided(official, PAG(2.0, layers="m1")), pytest.raises(RestoreError, match="pag_scale=0"):
        sample(official, pag_scale=3.0)


@torch.no_grad()
def test_arguments_that_are_not_known_are_not_cut():
    """Whatever has as many rows as the batch has images by chance: the weak pass then runs on the whole batch."""
    unet = tiny_unet()
    z, text = inputs(2)
    call = {"encoder_hidden_states": text}
    known = NetworkCall(unet, (z, 401), call, unet, "second")
    other = NetworkCall(unet, (z, 401), call | {"cross_attention_kwargs": {"masks": torch.ones(2, 3)}}, unet, "second")
    assert known.cut and not other.cut
    assert NetworkCall(unet, (z, 401), call | {"cross_attention_kwargs": {"scale": 0.5}}, unet, "second").cut
    spread = NetworkCall(unet, (z, 401), {"encoder_hidden_states": text.repeat(2, 1, 1)}, unet, "second")
    assert not spread.cut


@torch.no_grad()
def test_modules_without_a_row_for_each_image_are_computed_again():
    """What the prefix recorded of a module is cut only where it has one."""
    layer = torch.nn.Linear(2, 2)
    tape = Tape([layer])
    outputs = {name: torch.nn.Identity() for name in ("rows", "tokens", "pair")}
    values = {"rows": torch.randn(4, 2), "tokens": torch.randn(3, 2), "pair": (torch.randn(4, 2), torch.randn(1, 2))}
    tape.queues = {outputs[name]: deque([_Output(value, copy=False)]) for name, value in values.items()}
    tape.cut(slice(2, None), 4)
    with tape.replay():
        assert torch.equal(outputs["rows"](torch.zeros(1)), values["rows"][2:])
        first, second = outputs["pair"](torch.zeros(1))
        assert torch.equal(first, values["pair"][0][2:]) and torch.equal(second, values["pair"][1])
        assert torch.equal(outputs["tokens"](torch.zeros(5)), torch.zeros(5))


@torch.no_grad()
def test_any_backbone_falls_back(tmp_path):
    """The same outside of pipelines: an estimate of a network that turns out to change its activations."""
    unet = tiny_unet()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    z, text = inputs(1)
    backbone = PipelineNetwork(unet, unet)

    def at(t):
        return NetworkCall(unet, (z, t), {"encoder_hidden_states": text}, unet, "all")

    results = []
    for share in (True, False):
        with warnings.catch_warnings(), estimator(backbone, PAG(3.0, "o5"), share_prefix=share) as estimate:
            warnings.simplefilter("ignore")
            results.append([estimate(z, t, at(t))[1] for t in (900, 700, 500)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
