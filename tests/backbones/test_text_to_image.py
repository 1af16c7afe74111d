"""Text-to-image pipelines loaded from tiny folders in the published layout, against diffusers' own calls."""

from __future__ import annotations

import gc
import json
import shutil

import diffusers
import published
import pytest
import tiny_flow
import tiny_sd
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from operators import RestoreError
from restore.backbones import pipeline_files
from restore.backbones.attention_layers import find_attention_layers
from restore.backbones.stable_diffusion import StableDiffusion
from restore.backbones.text_to_image import PipelineOptions, TextToImage
from restore.guidance import PAG
from restore.guidance.pipelines import guided
from restore.zoo import load_backbone


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {kind: published.save(kind, root / kind) for kind in published.KINDS}


def options(kind, **more):
    side = published.SIZES.get(kind)
    return PipelineOptions(call={"height": side, "width": side} if side else {}, **more)


def noise(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def sample(folder, kind, prompts=("a cat", "dogs"), **arguments):
    model = TextToImage(folder, options=options(kind))
    return model(list(prompts), noise, steps=2, **arguments)


@pytest.mark.parametrize("cfg", [0.0, 3.0])
@pytest.mark.parametrize("kind", published.KINDS)
def test_pictures_are_those_of_diffusers_own_call(folders, kind, cfg, tmp_path):
    pipe = published.pipeline(kind, tmp_path / "tokenizer")
    pipe.set_progress_bar_config(disable=True)
    if kind == "sd-1.5":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    latents = noise((2, 4, 8, 8))
    arguments = {"prompt": ["a cat", "dogs"], "num_inference_steps": 2, "output_type": "pt", **options(kind).call}
    if kind.startswith("flux"):
        latents = pipe._pack_latents(latents, 2, 4, 8, 8)
        arguments |= {"true_cfg_scale": 1 + cfg, "negative_prompt": ["", ""] if cfg else None}
    else:
        arguments |= {"guidance_scale": 1 + cfg}
    expected = pipe(latents=latents, **arguments).images.mul(2).sub(1)
    images = sample(folders[kind], kind, cfg=cfg)
    assert images.shape == (2, 3, 32, 32) and images.std() > 0.05
    assert torch.allclose(images, expected.clamp(-1, 1), atol=2e-5)


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_prompts_are_embedded_before_the_network_is_loaded_and_the_encoders_are_gone(folders, kind):
    def count(cls):
        gc.collect()
        return sum(type(thing) is cls for thing in gc.get_objects())

    cls = getattr(diffusers, "FluxTransformer2DModel" if kind == "flux-dev" else "SD3Transformer2DModel")
    before, networks, seen = count(T5EncoderModel), count(cls), []
    model = TextToImage(folders[kind], options=options(kind), upcoming=["a cat", "dogs", "a cat"])
    place = model._place
    model._place = lambda pipe: (seen.append((count(T5EncoderModel) - before, count(cls) - networks)), place(pipe))
    first = model(["dogs"], noise, steps=2)
    assert seen == [(1, 0), (0, 1)] and count(T5EncoderModel) == before
    model(["a cat"], noise, steps=2)  # upcoming before "dogs", so not embedded with it
    assert seen[2:] == [(1, 0), (0, 1)]
    assert torch.equal(model(["dogs"], noise, steps=2), first) and len(seen) == 6 - 2 * ("dogs" in str(model.embedded))


def test_upcoming_prompts_are_embedded_at_once_and_each_by_itself(folders):
    model = TextToImage(folders["sd3"], options=options("sd3"), upcoming=["dogs", "a cat"])
    alone = TextToImage(folders["sd3"], options=options("sd3"))
    loads, read = [], model._read_encoders
    model._read_encoders = lambda: (loads.append(1), read())[1]
    model(["dogs"], noise, steps=2)
    pair = model(["a cat", "dogs"], noise, steps=2, cfg=2.0)
    assert len(loads) == 1  # with the negative prompt that later calls need
    one = alone(["a cat"], lambda shape: noise((2, *shape[1:]))[:1], steps=2, cfg=2.0)
    assert torch.allclose(one, pair[:1], atol=2e-5)


@pytest.mark.parametrize("kind", ["sd-1.5", "sdxl", "sd3", "flux-dev"])
def test_a_variant_is_read_if_it_is_named(kind, tmp_path, folders):
    folder = published.save(kind, tmp_path / kind, variant="fp16")
    with pytest.raises(RestoreError, match="try pipeline.variant=fp16"):
        sample(folder, kind)
    images = TextToImage(folder, options=options(kind, variant="fp16"))(["a cat", "dogs"], noise, steps=2)
    assert torch.equal(images, sample(folders[kind], kind))


@pytest.mark.parametrize("kind", published.KINDS)
def test_layers_and_heads_are_listed_from_the_configuration_alone(kind, folders, tmp_path):
    folder = shutil.copytree(folders[kind], tmp_path / kind, ignore=shutil.ignore_patterns("*.safetensors"))
    network = pipeline_files.read_architecture(folder)
    assert all(parameter.is_meta for parameter in network.parameters())
    listed = {p: (x.paper, x.short, x.heads, x.channels) for p, x in find_attention_layers(network).items()}
    whole = TextToImage(folders[kind]).prepare([])
    network = getattr(whole, "unet", None) or whole.transformer
    assert listed == {p: (x.paper, x.short, x.heads, x.channels) for p, x in find_attention_layers(network).items()}
    blocks = {"sd3": 2, "sd3.5": 3, "flux-dev": 4, "flux-schnell": 4}.get(kind, len(listed))
    assert len(listed) == blocks and listed


def test_layers_of_other_folders_are_listed_from_the_configuration_alone(tmp_path, tiny_adm):
    from restore.paths import data_dir

    for folder in (tiny_adm, data_dir() / "embedded", tiny_flow.save_folder("dit", tmp_path / "dit")):
        listed = find_attention_layers(pipeline_files.read_architecture(folder))
        loaded = load_backbone(folder)[1].attention
        assert {k: (x.short, x.heads) for k, x in listed.items()} == {k: (x.short, x.heads) for k, x in loaded.items()}


def test_a_missing_weight_is_never_random(folders, tmp_path):
    for part, file in (("transformer", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        folder = shutil.copytree(folders["sd3"], tmp_path / part)
        state = load_file(folder / part / file)
        name = next(key for key in state if key.endswith("weight") and state[key].ndim == 2)
        del state[name]
        save_file(state, folder / part / file, {"format": "pt"})
        with pytest.raises(RestoreError, match=part):
            sample(folder, "sd3")


def test_a_safety_checker_in_the_folder_is_left_alone(folders, tmp_path):
    folder = shutil.copytree(folders["sd-1.5"], tmp_path / "sd")
    for part in ("safety_checker", "feature_extractor"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{")
    assert torch.equal(sample(folder, "sd-1.5"), sample(folders["sd-1.5"], "sd-1.5"))


def test_sd3_without_t5_uses_zeros(folders, tmp_path):
    ignored = shutil.ignore_patterns("text_encoder_3", "tokenizer_3")
    folder = shutil.copytree(folders["sd3"], tmp_path / "sd3", ignore=ignored)
    images = sample(folder, "sd3")
    assert (images - sample(folders["sd3"], "sd3")).abs().max() > 1e-4


def test_options_of_diffusers_pass_through(folders):
    model = TextToImage(folders["sd3"], options=options("sd3", device_map={"": "cpu"}))
    assert torch.allclose(model(["a cat", "dogs"], noise, steps=2), sample(folders["sd3"], "sd3"), atol=1e-6)
    assert model.pipe.transformer.hf_device_map
    model = TextToImage(folders["sd-1.5"], options=PipelineOptions(scheduler="EulerDiscreteScheduler"))
    assert type(model.prepare([]).scheduler).__name__ == "EulerDiscreteScheduler"
    short = options("flux-dev")
    short.call["max_sequence_length"] = 4
    model = TextToImage(folders["flux-dev"], options=short)
    model(["a cat"], noise, steps=2)
    assert model.embedded["a cat", False]["prompt_embeds"].shape[1] == 4
    with pytest.raises(RestoreError, match="offload must be null on the CPU"):
        TextToImage(folders["sd3"], options=PipelineOptions(offload="model"))


def test_int8_weights_are_near_the_full_ones_and_can_be_guided(folders):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8Tensor

    model = TextToImage(folders["sd3"], options=options("sd3", quantise="int8"))
    pipe = model.prepare(["a cat", "dogs"])
    assert isinstance(pipe.transformer.transformer_blocks[0].attn.to_q.weight, Int8Tensor)
    images = model(["a cat", "dogs"], noise, steps=2)
    full = sample(folders["sd3"], "sd3")
    assert 0 < (images - full).norm() / full.norm() < 0.05
    with guided(pipe, PAG(3.0, layers="b1:0")):
        assert (model(["a cat", "dogs"], noise, steps=2) - images).abs().max() > 1e-4


@pytest.mark.parametrize(
    "call, message",
    [
        ({"heigth": 32}, "did you mean 'height'"),
        ({"guidance_scale": 4.0}, "guidance: {cfg: {scale: w}}"),
        ({"prompt": "a dog"}, "must leave prompt to the benchmark"),
        ({"height": 31, "width": 33}, "height"),
    ],
)
def test_mistakes_in_the_call_are_one_sentence(folders, call, message):
    with pytest.raises(RestoreError, match=message):
        TextToImage(folders["sd-1.5"], options=PipelineOptions(call=call))(["a cat"], noise, steps=1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"offload": "disk"}, "pipeline.offload has no choice"),
        ({"quantise": "int4"}, "pipeline.quantise has no choice"),
        ({"offload": "model", "device_map": "auto"}, "got both"),
        ({"scheduler": "DDIMSchedule"}, "did you mean 'DDIMScheduler'"),
    ],
)
def test_mistakes_in_options_are_one_sentence(folders, change, message):
    with pytest.raises(RestoreError, match=message):
        TextToImage(folders["sd-1.5"], options=PipelineOptions(**change)).prepare([])


def test_arguments_that_a_pipeline_does_not_take_are_refused_before_it_is_read(folders, monkeypatch):
    monkeypatch.setattr(TextToImage, "prepare", lambda *_: 1 / 0)
    for kind, call in (("sdxl", {"max_sequence_length": 77}), ("flux-dev", {"clip_skip": 1})):
        with pytest.raises(RestoreError, match=f"has no argument '{next(iter(call))}'"):
            TextToImage(folders[kind], options=PipelineOptions(call=call))(["a cat"], noise, steps=1)


def test_other_pipelines_are_refused(tmp_path):
    folder = tiny_flow.save_folder("dit", tmp_path / "dit")
    with pytest.raises(RestoreError, match="DiTPipeline; use kind=generation"):
        TextToImage(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline"}))
    with pytest.raises(RestoreError, match="StableDiffusionXLPipeline, .*got a PixArtAlphaPipeline"):
        TextToImage(tmp_path / "other")
    tiny_sd.save_folder(tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / "vae")
    with pytest.raises(RestoreError, match="it has no vae"):
        TextToImage(tmp_path / "sd").prepare([])


def test_a_single_file_takes_a_published_folder_as_its_configuration(folders, tmp_path):
    """Whose index names a feature extractor that is not there."""
    single = tiny_sd.save_single_file(tmp_path / "model.safetensors", tiny_sd.save_folder(tmp_path / "plain"))
    backbone = StableDiffusion.load(single, config=folders["sd-1.5"], offline=True)
    assert torch.equal(backbone.encode_prompt("a cat"), StableDiffusion.load(folders["sd-1.5"]).encode_prompt("a cat"))
