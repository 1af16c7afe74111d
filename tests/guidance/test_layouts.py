"""Which rows of a pipeline's batch have the prompt: known, or refused with the remedy; never guessed."""

from __future__ import annotations

import diffusers
import pytest
import tiny_flow
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    SemanticStableDiffusionPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from pipelines_by_hand import MID, by_processor, inputs, picture, quiet, relative, sample
from tiny_sd import seeded, tiny_pipeline, tiny_unet

from operators import RestoreError
from restore.guidance import PAG
from restore.guidance.layouts import EDITING, LAYOUTS, find_rows
from restore.guidance.pipelines import guided


@pytest.fixture
def pipe(tmp_path):
    return quiet(tiny_pipeline(tmp_path))


@pytest.mark.parametrize("edits", [["a dog"], ["a dog", "a fish"]])
def test_edits_are_further_parts(pipe, edits):
    """Three or four times the same latents: with two edits the second half are the edits."""
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    semantic = quiet(SemanticStableDiffusionPipeline(**parts, requires_safety_checker=False))
    with guided(semantic, PAG(1.0, layers="m1")), pytest.raises(RestoreError, match="edits; .*conditional="):
        sample(semantic, height=32, width=32, guidance_scale=5.0, editing_prompt=edits, edit_warmup_steps=0)


def test_three_parts(tmp_path):
    """InstructPix2Pix: with the prompt, with the picture only, without both."""
    pipe = tiny_pipeline(tmp_path, tiny_unet(in_channels=8))
    edit = quiet(StableDiffusionInstructPix2PixPipeline(**pipe.components, requires_safety_checker=False))
    options = {"image": picture(), "guidance_scale": 5.0, "image_guidance_scale": 1.5}
    with (
        guided(edit, PAG(1.0, layers="m1")),
        pytest.raises(RestoreError, match="Pix2PixPipeline, which adds parts.*conditional="),
    ):
        sample(edit, **options)
    with guided(edit, PAG(1.0, layers="m1"), conditional="all"):
        ours = sample(edit, **options)
    edit.unet.forward = by_processor(edit.unet, [MID], 1.0)
    assert relative(ours, sample(edit, **options)) < 1e-5


class Own(diffusers.DiffusionPipeline):
    """Somebody's pipeline, which says nothing about its batch."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)


@torch.no_grad()
@pytest.mark.parametrize(
    "conditional, rows", [("second", slice(1, None)), ("first", slice(0, 1)), ("all", slice(None))]
)
def test_somebodys_pipeline(pipe, conditional, rows):
    """Two equal halves may be anything: the layout must be said, and then it is used."""
    own = Own(pipe.unet, pipe.scheduler)
    z, text = inputs(2)
    z[1] = z[0]
    with (
        guided(own, PAG(3.0, layers="m1")),
        pytest.raises(RestoreError, match="layout .* got that of Own; .*conditional="),
    ):
        own.unet(z, 401, encoder_hidden_states=text)
    with guided(own, PAG(3.0, layers="m1"), conditional=conditional):
        ours = own.unet(z, 401, encoder_hidden_states=text).sample
    own.unet.forward = by_processor(own.unet, [MID], 3.0, rows=rows)
    assert relative(ours, own.unet(z, 401, encoder_hidden_states=text).sample) < 1e-5


class Titled(StableDiffusionPipeline):
    """A subclass of a known pipeline."""


def test_subclasses_of_known_pipelines_are_known(pipe):
    titled = quiet(Titled(**pipe.components, requires_safety_checker=False))
    with guided(pipe, PAG(3.0, layers="m1")):
        expected = sample(pipe, guidance_scale=5.0)
    with guided(titled, PAG(3.0, layers="m1")):
        assert torch.equal(sample(titled, guidance_scale=5.0), expected)


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_prompts_with_the_same_latents(pipe, guidance_scale, same):
    """[without] * 4 and [with] * 4, all rows equal: the pipeline says whether it does classifier-free guidance."""
    z = inputs(4)[0]
    z = z[:1].expand_as(z) if same else z
    options = {"prompt": ["a cat", "a dog", "fish", "owl"], "latents": z, "guidance_scale": guidance_scale}
    with guided(pipe, PAG(3.0, layers="m1")):
        ours = sample(pipe, **options)
    rows = slice(4, None) if guidance_scale > 1 else slice(None)
    pipe.unet.forward = by_processor(pipe.unet, [MID], 3.0, rows=rows)
    assert relative(ours, sample(pipe, **options)) < 1e-5


def test_without_conditions():
    """An unconditional pipeline has no layout to know."""
    unet = seeded(
        lambda: diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            attention_head_dim=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        0,
    )
    pipe = quiet(DDIMPipeline(unet, DDIMScheduler()))

    def sampled():
        g = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe(2, generator=g, num_inference_steps=3, output_type="np").images)

    plain = sampled()
    with guided(pipe, PAG(3.0, layers="m1")):
        assert relative(sampled(), plain) > 1e-4


def test_two_runs_in_one_block_are_two(tmp_path):
    """One step each, from the same latents at the same time: the second run's prompt gets its own shift."""
    pipe = quiet(tiny_flow.flux_pipeline(tmp_path))
    latents = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"height": 32, "width": 32, "max_sequence_length": 8, "num_inference_steps": 1, "latents": latents}

    def alone(prompt):
        with guided(pipe, PAG(2.0, layers="b1")):
            return sample(pipe, prompt=prompt, **options)

    expected = [alone(prompt) for prompt in ("a cat", "zebras")]
    with guided(pipe, PAG(2.0, layers="b1")):
        ours = [sample(pipe, prompt=prompt, **options) for prompt in ("a cat", "zebras")]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True)) and relative(*ours) > 1e-4


@torch.no_grad()
def test_a_network_alone_is_called_as_often_as_one_likes():
    """The same latents and time with another prompt: without a pipeline that is no pass without the prompt."""
    network = tiny_flow.tiny_flux()
    g = torch.Generator().manual_seed(0)
    ids = torch.tensor([[0.0, i, j] for i in range(2) for j in range(3)])
    call = {"hidden_states": torch.randn(1, 6, 16, generator=g), "timestep": torch.tensor([0.5]), "img_ids": ids}
    call |= {"pooled_projections": torch.randn(1, tiny_flow.POOLED, generator=g), "txt_ids": torch.zeros(4, 3)}
    texts = torch.randn(2, 1, 4, tiny_flow.TEXT, generator=g)
    with guided(network, PAG(2.0, layers="b1")):
        ours = [network(**call, encoder_hidden_states=text).sample for text in texts]
    with guided(network, PAG(2.0, layers="b1")):
        assert torch.equal(ours[1], network(**call, encoder_hidden_states=texts[1]).sample)


def test_the_listed_pipelines_exist():
    """Every name is a class of diffusers that is silent about its classifier-free guidance, or one that edits."""
    kinds = {name: getattr(diffusers, name) for name in (*LAYOUTS, *EDITING) if hasattr(diffusers, name)}
    assert len(kinds) > 10
    assert not any(hasattr(kinds[name], "do_classifier_free_guidance") for name in LAYOUTS.keys() & kinds.keys())
    assert set(LAYOUTS.values()) == {"first", "second"}


def test_the_halves_of_a_flagged_pipeline(pipe):
    sample(pipe, guidance_scale=5.0)
    z, text = inputs(2)
    named = {"sample": z, "timestep": 401, "encoder_hidden_states": text}
    assert find_rows(pipe, named, z[:1].repeat(2, 1, 1, 1), "auto") == slice(1, None)
    with pytest.raises(RestoreError, match="StableDiffusionPipeline must be the same latents"):
        find_rows(pipe, named, z, "auto")
    sample(pipe, guidance_scale=1.0)
    assert find_rows(pipe, named, z, "auto") == slice(None)
