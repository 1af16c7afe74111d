"""Every kind of network on the pretended accelerator: latent priors, text-to-image models, transformers, pipelines."""

from __future__ import annotations

import pytest
import tiny_flow
import tiny_ldm
import tiny_sd
import torch
from pipelines_by_hand import quiet
from sim_device import SimTensor
from sim_priors import LATENTS, NOISE, Steps, assert_same, masks, measure

import operators
import restore
from restore.guidance import CFG, PAG
from restore.guidance.pipelines import guided

KINDS = ["VQModel", "AutoencoderKL", "AutoencoderTiny", "sd", "sd3", "flux", "dit"]
MEDIUM = {"sd3": {"text_tokens": 12}, "flux": {"text_tokens": 12}}
LAYERS = {"sd3": "b0", "flux": "b0", "dit": "b0", "sdxl": "m1.0"}


@pytest.fixture(scope="module")
def priors(sim_registered, tmp_path_factory):
    """load(kind) -> the same prior on the CPU and on the device."""
    root, made = tmp_path_factory.mktemp("networks"), {}

    def load(kind):
        if kind not in made:
            folder = root / kind
            if kind == "sd":
                tiny_sd.save_folder(folder)
            elif kind in ("sd3", "flux", "dit"):
                tiny_flow.save_folder(kind, folder)
            else:
                tiny_ldm.save_ldm(folder, kind)
            made[kind] = [restore.load(folder, device=device, **MEDIUM.get(kind, {})) for device in ("cpu", "sim")]
        return made[kind]

    return load


def run(priors, kind: str, sampler: str, operator, **options):
    options = {"steps": 3, "batch_size": 2, "guidance": PAG(1.0, LAYERS.get(kind, "m1")), **LATENTS[sampler], **options}
    y = measure(operator, 2, 32)
    return [restorer(y, operator, sampler=sampler, **options) for restorer in priors(kind)]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(sim, priors, kind):
    sampler = "flowdps" if kind in ("sd3", "flux") else "psld"
    assert_same(*run(priors, kind, sampler, operators.Inpainting(masks(2, 32), noise=NOISE)))


OPTIONS = {
    "psld": {"measurement_noise": True, "encoding": "sample", "decoder_sigma": 0.05},
    "resample": {"slips": True, "tolerance": None},
    "flowdps": {"rule": "flowchef"},
    "diffpir": {"decoder_sigma": 0.05},
    "daps": {"latent_clamp": 1.0, "momentum": 0.3, "conditional": "exact"},
    "fastdips": {"pixels_above": 0.5},
}


OFTEN = ("psld", "resample", "flowdps")


@pytest.mark.parametrize(
    "sampler", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in LATENTS]
)
def test_samplers_of_latents(sim, priors, sampler):
    operator = operators.MotionBlur(7, noise=NOISE)
    assert_same(*run(priors, "AutoencoderKL", sampler, operator, **OPTIONS.get(sampler, {})))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", LATENTS)
def test_samplers_of_all_kinds(sim, priors, kind, sampler):
    assert_same(*run(priors, kind, sampler, operators.SuperResolution(2, noise=NOISE)))


@pytest.mark.parametrize("kind", ["sd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd3", "flux"))])
def test_prompts(sim, priors, kind):
    guidance = CFG(2.0) + PAG(1.0, LAYERS.get(kind, "m1"))
    operator = operators.SuperResolution(4, noise=NOISE)
    sampler = "flowdps" if kind in ("sd3", "flux") else "psld"
    text = {"prompt": "a cat", "negative_prompt": "a dog", "guidance": guidance}
    assert_same(*run(priors, kind, sampler, operator, steps=2, **text))


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", "dit", "AutoencoderKL"])
def test_a_step_neither_waits_nor_uploads(sim, priors, kind):
    """Conditions and times are on the device at the first step; no autoencoder is asked whether it overflows."""
    operator, steps = operators.SuperResolution(4, noise=NOISE), Steps(sim)
    sampler = "flowdps" if kind in ("sd3", "flux") else "psld"
    options = {"guidance": PAG(1.0, LAYERS.get(kind, "m1")), **LATENTS[sampler], "steps": 4, "callback": steps}
    priors(kind)[1](measure(operator, 1, 32), operator, sampler=sampler, **options)
    assert steps.per_step()[1:] == (0, 0), sim.places


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_pipelines(sim, tmp_path, kind):
    make = {
        "sd": tiny_sd.tiny_pipeline,
        "sdxl": tiny_flow.sdxl_pipeline,
        "sd3": tiny_flow.sd3_pipeline,
        "flux": tiny_flow.flux_pipeline,
    }
    options = {"prompt": "a cat", "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    options |= {"height": 32, "width": 32}
    results = []
    for device in ("cpu", "sim"):
        pipe = quiet(make[kind](tmp_path / device)).to(device)
        with guided(pipe, PAG(2.0, LAYERS.get(kind, "m1"))):
            results.append(pipe(generator=torch.Generator().manual_seed(0), **options).images)
    assert isinstance(results[1], SimTensor) and torch.equal(results[0], results[1].held)
