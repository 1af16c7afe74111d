"""SD3, FLUX and DiT as priors, against what diffusers' own pipelines and schedulers compute with them."""

import json
import math
import shutil

import numpy as np
import pytest
import tiny_flow
import torch
from diffusers import (
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from tiny_sd import tiny_vae

import operators
import restore
from operators import RestoreError
from restore.backbones.attention_layers import find_attention_layers
from restore.backbones.base import Backbone
from restore.backbones.schedule import Schedule
from restore.backbones.transformers import SD3, DiT, Flux, make_condition
from restore.guidance import CFG, PAG, estimator

CLASSES = {"sd3": SD3, "flux": Flux, "dit": DiT}


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind; sd3.5 has two attentions in its first block, flux-dev takes a guidance scale."""
    root = tmp_path_factory.mktemp("flow")
    made = {kind: tiny_flow.save_folder(kind, root / kind) for kind in ("sd3", "flux", "dit")}
    made["sd3.5"] = tiny_flow.save_folder("sd3", root / "sd3.5", dual=True, with_t5=False)
    made["flux-dev"] = tiny_flow.save_folder("flux", root / "flux-dev", guidance=True)
    return made


def loaded(folders, name, **options):
    if name != "dit":
        options = {"text_tokens": 12, "resolution": 8, **options}
    return CLASSES[name.split(".")[0].split("-")[0]].load(folders[name], **options)


def latents(n=2, h=8, w=8, seed=0):
    return torch.randn(n, 4, h, w, generator=torch.Generator().manual_seed(seed))


def calls_of(pipe, **options):
    """Inputs and outputs of the transformer in three steps of the pipeline."""
    told, forward = [], pipe.transformer.forward

    def listening(*args, **kwargs):
        out = forward(*args, **kwargs)
        told.append((kwargs, out[0]))
        return out

    pipe.transformer.forward = listening
    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=3, height=32, width=48, output_type="latent", **options)
    del pipe.transformer.forward
    return told[1:]  # the first is at sigma = 1, where nothing is left of x_0


@torch.no_grad()
@pytest.mark.parametrize("dual", [False, True])
def test_sd3_is_the_pipelines(tmp_path, folders, dual):
    pipe = tiny_flow.sd3_pipeline(tmp_path, dual, with_t5=not dual)
    prior = loaded(folders, "sd3.5" if dual else "sd3")
    prompt = prior.encode_prompt("a cat")
    for call, v in calls_of(pipe, prompt="a cat", guidance_scale=1.0, max_sequence_length=12):
        found = prior.predict(call["hidden_states"], float(call["timestep"][0]), prompt)
        assert relative(found.eps - found.x0, v) < 1e-5
        assert relative(prior.predict(call["hidden_states"], float(call["timestep"][0])).eps - found.x0, v) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("guidance", [False, True])
def test_flux_is_the_pipelines(tmp_path, folders, guidance):
    pipe = tiny_flow.flux_pipeline(tmp_path, guidance)
    prior = loaded(folders, "flux-dev" if guidance else "flux")
    prompt = prior.encode_prompt("a cat")
    for call, v in calls_of(pipe, prompt="a cat", guidance_scale=3.5, max_sequence_length=12):
        x, v = (FluxPipeline._unpack_latents(z, 32, 48, 4) for z in (call["hidden_states"], v))
        found = prior.predict(x, 1000 * float(call["timestep"][0]), prompt)
        assert x.shape == (1, 4, 8, 12) and relative(found.eps - found.x0, v) < 1e-5
    if guidance:
        other = loaded(folders, "flux-dev", distilled_guidance=1.0).predict(x, 300.0, prompt)
        assert relative(other.x0, prior.predict(x, 300.0, prompt).x0) > 1e-4


@torch.no_grad()
def test_dit_is_its_transformer(folders):
    prior, x = loaded(folders, "dit"), latents()
    out = prior.network(x, timestep=torch.tensor([401, 401]), class_labels=torch.tensor([3, 7])).sample
    found = prior.predict(x, 401, torch.tensor([3, 7]))
    assert torch.equal(found.eps, out[:, :4]) and torch.equal(found.variance, out[:, 4:])
    nothing = prior.network(x, timestep=torch.tensor([401, 401]), class_labels=torch.tensor([10, 10])).sample
    assert torch.equal(prior.predict(x, 401).eps, nothing[:, :4])
    a = float(Schedule.from_config({"beta_schedule": "linear"}).alphas_cumprod[401])
    assert relative(found.x0, (x - (1 - a) ** 0.5 * found.eps) / a**0.5) < 1e-6
    for condition, message in ((11, r"0\.\.10"), (torch.tensor([1, 2, 3]), "one for the batch or 2")):
        with pytest.raises(RestoreError, match=message):
            prior.predict(x, 401, condition)
    with pytest.raises(RestoreError, match=r"square .*got shape \(1, 4, 8, 16\)"):
        prior.predict(latents(1, 8, 16), 401)


@pytest.mark.parametrize("name", ["sd3", "sd3.5", "flux", "dit"])
def test_protocol(folders, name):
    prior = loaded(folders, name)
    assert isinstance(prior, Backbone) and not prior.bounded
    assert (prior.channels, prior.downscale) == (4, 4)
    assert not any(p.requires_grad for p in prior.network.parameters()) and not prior.network.training
    tensors = [*prior.network.parameters(), *prior.network.buffers(), *prior.vae.parameters()]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    assert all(prior.network.get_submodule(path) is layer.module for path, layer in prior.attention.items())
    x = latents().requires_grad_()
    found = prior.predict(x, torch.tensor([300.0, 700.0]))
    alone = prior.predict(x[1:], 700.0)
    assert relative(found.x0[1:].detach(), alone.x0.detach()) < 1e-5
    (gradient,) = torch.autograd.grad(found.x0.sum(), x)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    with pytest.raises(RestoreError, match="divisible by"):
        prior.predict(latents(1, 8, 7), 300)


def test_encode_and_decode_scale_and_shift(folders):
    for name in ("sd3", "flux"):
        prior, vae = loaded(folders, name), tiny_flow.shifted_vae()
        image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with torch.no_grad():
            z = (vae.encode(image).latent_dist.mean - 0.06) * 1.5
            assert relative(prior.encode(image), z) < 1e-6
            assert relative(prior.decode(z), vae.decode(z / 1.5 + 0.06).sample) < 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_are_the_schedulers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = Schedule.from_config({**scheduler.config, "_class_name": type(scheduler).__name__})
    theirs = scheduler.sigmas.flip(0).double().numpy()[:-1]
    ours = np.array([schedule.sigma(t) for t in schedule.ts])[:-1]
    assert np.abs(ours - theirs).max() < 1e-6 and np.abs(schedule.ts[:-1] - 1000 * theirs).max() < 1e-3


@pytest.mark.parametrize("side", [512, 1024])
def test_dynamic_levels_are_the_schedulers(side):
    """FLUX.1-dev: the noise level of a step depends on the number of tokens."""
    tokens = (side // 16) ** 2
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 1000, 1000), mu=calculate_shift(tokens))
    schedule = Schedule.from_config({**scheduler.config, "_class_name": type(scheduler).__name__}, tokens)
    theirs = scheduler.sigmas.flip(0).double().numpy()[1:-1]
    assert np.abs(np.array([schedule.sigma(t) for t in schedule.ts])[:-1] - theirs).max() < 1e-6


def test_the_levels_follow_the_size(folders):
    prior = loaded(folders, "flux", resolution=32)
    assert Schedule.from_config(prior.scheduler).sigma(prior.schedule.ts[500]) > 0
    small, large, beyond = (restore.Restorer(prior).prior(side, side).schedule for side in (32, 128, 512))
    middle = [schedule.sigma(schedule.timesteps(3)[1]) for schedule in (small, large, beyond)]
    assert middle[0] < middle[1] == middle[2]  # windows see no more tokens than the trained size has
    assert middle[1] == pytest.approx(1 / (1 + math.exp(-calculate_shift(256))), abs=1e-3)


def test_names_on_the_real_configurations():
    """Layers and heads as the HeadHunter paper counts them; nothing is allocated."""
    sd3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
    with torch.device("meta"):
        networks = {
            "sd3": SD3Transformer2DModel(**sd3),
            "sd3.5": SD3Transformer2DModel(**sd3, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
            "flux": FluxTransformer2DModel(guidance_embeds=True),
            "dit": DiTTransformer2DModel(out_channels=8),
        }
    layers = {name: find_attention_layers(network) for name, network in networks.items()}
    assert {name: sum(layer.heads for layer in found.values()) for name, found in layers.items()} == {
        "sd3": 576,
        "sd3.5": 576 + 13 * 24,
        "flux": 1368,
        "dit": 448,
    }
    short = {name: [layer.short for layer in found.values()] for name, found in layers.items()}
    assert short["flux"] == [f"b{n}" for n in range(57)] and short["sd3.5"][:3] == ["b0", "b0.2", "b1"]
    assert restore.guidance.layers.find_layer("b19", layers["flux"]).path == "single_transformer_blocks.0.attn"
    assert restore.guidance.layers.choose_layers("b0.2:3,5", None, layers["sd3.5"])[0][1] == (3, 5)


def test_layers_are_listed_in_order_of_execution(folders):
    for name in ("sd3.5", "flux", "dit"):
        prior, ran = loaded(folders, name), []
        for path, layer in prior.attention.items():
            layer.module.register_forward_hook(lambda *_, path=path, ran=ran: ran.append(path))
        prior.predict(latents(), 300)
        assert ran == list(prior.attention)


@pytest.mark.parametrize("name, layers", [("sd3.5", "b1"), ("flux", "b3:0,2"), ("dit", "b1")])
def test_shared_prefix_changes_no_bit(folders, name, layers):
    prior, results = loaded(folders, name), []
    guidance = PAG(2.0, layers) + CFG(1.5)
    condition = torch.tensor([3]) if name == "dit" else prior.encode_prompt("a cat")
    for share in (True, False):
        with torch.no_grad(), estimator(prior, guidance, share_prefix=share) as estimate:
            results.append([estimate(latents(seed=k), t, condition)[1] for k, t in enumerate((900, 500, 300))])
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)
    assert not torch.equal(ours, prior.predict(latents(seed=2), 300, condition).eps)


@pytest.mark.parametrize("name", ["sd3", "flux", "dit"])
@pytest.mark.parametrize("sampler, size", [("psld", (20, 27)), ("daps", (44, 36))])
def test_any_sampler_on_any_size(folders, name, sampler, size):
    """The call of every other backbone, on a photo smaller and on one larger than the trained size."""
    restorer = restore.Restorer(loaded(folders, name))
    y = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = {"prompt": "a cat"} if name != "dit" else {"condition": torch.tensor([3])}
    own = {"psld": {}, "daps": {"ode_steps": 1, "mcmc_steps": 1}}[sampler]
    A = operators.Denoising(noise=operators.GaussianNoise(0.05))
    result = restorer(y, A, sampler=sampler, steps=2, guidance=PAG(1.0, "b1"), **options, **own)
    assert result.samples.shape == (1, 1, 3, *size) and torch.isfinite(result.samples).all()
    assert result.protocol["autoencoder"] == "AutoencoderKL"


def test_generation(folders):
    for name, options in (("sd3", {"prompt": "a cat"}), ("flux", {}), ("dit", {"labels": [1, 2]})):
        images = restore.Restorer(loaded(folders, name)).generate(
            2, steps=3, ddim_eta=0.0, guidance=PAG(1.0, "b0"), **options
        )
        assert images.shape == (2, 3, 32, 32)


def test_models_layers_lists_them(folders):
    lines = restore.load(folders["flux"]).layer_table()
    assert len(lines) == 5 and lines[3].split() == ["b2", "single_transformer_blocks.0.attn", "0..3", "32", "64"]


def test_low_precision(folders):
    prior = loaded(folders, "flux", dtype="bf16")
    assert prior.network.dtype == prior.vae.dtype == torch.bfloat16
    found, exact = prior.predict(latents(), 300), loaded(folders, "flux").predict(latents(), 300)
    assert found.x0.dtype == torch.float32 and 0 < relative(found.x0, exact.x0) < 0.1
    half = loaded(folders, "sd3", dtype="fp16")
    assert (half.network.dtype, half.vae.dtype) == (torch.float16, torch.float32)


def test_without_text_encoders(folders, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(folders["sd3"], folder, ignore=shutil.ignore_patterns("text_encoder*", "tokenizer*"))
    prior, whole = SD3.load(folder), loaded(folders, "sd3")
    assert prior.null_condition is None and prior.encode_prompt is None
    with pytest.raises(RestoreError, match="condition .*without text encoders"):
        prior.predict(latents(), 300)
    with pytest.raises(RestoreError, match="has no text encoder"):
        restore.Restorer(prior).generate(1, prompt="a cat")
    condition = whole.encode_prompt("a cat")
    given = make_condition(condition[:, 1:, : tiny_flow.TEXT], condition[:, 0, : tiny_flow.POOLED])
    assert torch.equal(prior.predict(latents(), 300, given).x0, whole.predict(latents(), 300, condition).x0)
    with pytest.raises(RestoreError, match=r"condition must be a prompt's embedding \(1 or 2, 1 \+ tokens, 32\)"):
        prior.predict(latents(), 300, condition[:, :, 1:])


def test_folders_that_are_not_complete(folders, tmp_path):
    def changed(part, change):
        folder = tmp_path / f"{part}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folders["sd3"], folder)
        change(folder / part)
        return folder

    for part, message in (("vae", "it has no vae"), ("text_encoder_2", "it has no text_encoder_2")):
        with pytest.raises(RestoreError, match=message):
            SD3.load(changed(part, shutil.rmtree))
    with pytest.raises(RestoreError, match="FluxPipeline, got a StableDiffusion3Pipeline"):
        Flux.load(folders["sd3"])
    with pytest.raises(RestoreError, match="no model_index.json"):
        SD3.load(tmp_path)

    def one_layer_more(part):
        config = json.loads((part / "config.json").read_text())
        (part / "config.json").write_text(json.dumps({**config, "num_layers": 3}))

    with pytest.raises(RestoreError, match="the transformer in .* (cannot be loaded|weights are missing)"):
        SD3.load(changed("transformer", one_layer_more))
    with pytest.raises(RestoreError, match="latents of 4 channels.*got 8"):
        SD3.load(folders["sd3"], vae=tiny_vae(latent_channels=8))
