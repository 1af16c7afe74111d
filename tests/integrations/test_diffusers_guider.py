"""The guider of modular pipelines, against restore.guided in the ordinary ones, on tiny random networks.

Without classifier-free guidance both make the same calls of the network, and agree to the bit; with it ordinary
pipelines put both halves into one batch, whose products are rounded differently.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import tiny_flow
import torch
from diffusers import FluxPipeline
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import FluxAutoBlocks, StableDiffusion3AutoBlocks, StableDiffusionXLAutoBlocks
from pipelines_by_hand import quiet, relative, sample
from tiny_sd import tiny_pipeline

import restore
from operators import RestoreError
from restore.guidance import CFG, PAG, SAG, SLG, SSG, TAG, TPG
from restore.guidance.pipelines import guided
from restore.integrations import diffusers as integration
from restore.integrations.diffusers import Guider, add_guider

ROUNDING = 1e-5
COMMON = {"prompt": "a cat", "height": 32, "width": 48, "num_inference_steps": 4, "output_type": "latent"}
BLOCKS = {"sdxl": StableDiffusionXLAutoBlocks, "sd3": StableDiffusion3AutoBlocks}
BLOCKS["flux"] = lambda: add_guider(FluxAutoBlocks())
LAYERS = {"sdxl": "m1.0,m1.1", "sd3": "b1:0,3", "flux": "b1,b3"}
MADE = {}


def pair(name, tmp_path_factory):
    """(ordinary, modular) pipelines of the same parts, made once."""
    if name not in MADE:
        make = getattr(tiny_flow, f"{name}_pipeline")
        pipe = quiet(make(tmp_path_factory.mktemp(name)))
        modular = BLOCKS[name]().init_pipeline()
        parts = {key: part for key, part in pipe.components.items() if key in modular.components and part is not None}
        modular.update_components(**parts)
        MADE[name] = pipe, modular
    return MADE[name]


@pytest.fixture
def pipes(tmp_path_factory):
    return lambda name: pair(name, tmp_path_factory)


def options(name, **more):
    own = {} if name == "sdxl" else {"max_sequence_length": 8}
    return COMMON | own | ({} if name == "flux" else {"negative_prompt": "a dog"}) | more


def run(modular, guider, name="sd3", seed=0, **more):
    modular.update_components(guider=guider)
    generator = torch.Generator().manual_seed(seed)
    return unpack(modular(generator=generator, output="images", **options(name, **more)))


def run_guided(pipe, guidance, name="sd3", scale=1.0, **more):
    with guided(pipe, guidance):
        x = sample(pipe, guidance_scale=scale, **options(name, **more))
    return unpack(x)


def unpack(x):
    """A latent as FLUX's pipelines return it, and up to diffusers 0.41 its blocks, as one of four dimensions."""
    return FluxPipeline._unpack_latents(x, COMMON["height"], COMMON["width"], 4) if x.ndim == 3 else x


def state(network):
    return [
        {key: value for key, value in module.__dict__.items() if key != "_parameters"} for module in network.modules()
    ]


@pytest.mark.parametrize("name, scope", [("sdxl", "joint"), ("sd3", "joint"), ("sd3", "image"), ("flux", "image")])
def test_without_cfg_it_agrees_with_guided_to_the_bit(pipes, name, scope):
    pipe, modular = pipes(name)
    guidance = PAG(2.0, layers=LAYERS[name], scope=scope, strength=0.5)
    ours = run(modular, Guider(guidance, guidance_scale=1.0), name)
    assert torch.equal(ours, run_guided(pipe, guidance, name))
    assert relative(ours, run(modular, Guider(guidance_scale=1.0), name)) > 1e-3


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_with_cfg_and_two_images_it_agrees_with_guided(pipes, name):
    pipe, modular = pipes(name)
    guidance, more = PAG(2.0, layers=LAYERS[name]), {"num_images_per_prompt": 2}
    ours = run(modular, Guider(guidance, guidance_scale=5.0), name, **more)
    assert len(ours) == 2 and relative(ours, run_guided(pipe, guidance, name, 5.0, **more)) < ROUNDING
    plain = run(modular, ClassifierFreeGuidance(guidance_scale=5.0), name, **more)
    assert relative(ours, plain) > 1e-3
    # Nothing is left of an image's neighbour: the second one differs only in its noise.
    none = run(modular, Guider(PAG(0.0, layers=LAYERS[name]), guidance_scale=5.0), name, **more)
    assert torch.equal(none, plain)


@pytest.mark.parametrize(
    "guidance",
    [SLG(1.0, "b1"), SSG(1.0, share=0.1), TPG(1.0, "b1") + TAG(0.2), PAG(1.0, "b0", every=2) + PAG(0.5, "b1:2")],
)
def test_other_terms_agree_with_guided(pipes, guidance):
    pipe, modular = pipes("sd3")
    ours = run(modular, Guider(guidance, guidance_scale=3.0))
    assert relative(ours, run_guided(pipe, guidance, scale=3.0)) < ROUNDING
    assert relative(ours, run(modular, ClassifierFreeGuidance(guidance_scale=3.0))) > 1e-4


def test_stable_diffusion(tmp_path):
    """diffusers has no blocks for it: the guider in a loop such as they have."""
    pipe, guidance = quiet(tiny_pipeline(tmp_path)), PAG(2.0, layers="m1,i5:1")
    expected = run_guided(pipe, guidance, "sdxl", 5.0)
    pairs, guider = pipe.encode_prompt("a cat", "cpu", 1, True, "a dog"), Guider(guidance, guidance_scale=5.0)
    pipe.scheduler.set_timesteps(4)
    x = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, t in enumerate(pipe.scheduler.timesteps):
            guider.set_state(i, 4, t)
            batches = guider.prepare_inputs({"text": pairs})
            for batch in batches:
                guider.prepare_models(pipe.unet)
                batch.noise_pred = pipe.unet(x, t, encoder_hidden_states=batch.text, return_dict=False)[0]
                guider.cleanup_models(pipe.unet)
            x = pipe.scheduler.step(guider(batches).pred, t, x, return_dict=False)[0]
    assert relative(x, expected) < ROUNDING


def test_windows_are_shares_of_the_steps(pipes):
    """The first of four steps: as an interval of its time; the whole guidance, and the terms alone."""
    pipe, modular = pipes("sd3")
    pipe.scheduler.set_timesteps(4)
    times = pipe.scheduler.timesteps.tolist()
    first = PAG(2.0, layers="b1", interval=(1000, times[1] + 1))
    expected = run(modular, Guider(first, guidance_scale=5.0))
    ours = run(modular, Guider(PAG(2.0, layers="b1"), guidance_scale=5.0, terms_stop=0.25))
    assert torch.equal(ours, expected)
    last = run(modular, Guider(PAG(2.0, layers="b1"), guidance_scale=5.0, terms_start=0.75))
    assert torch.equal(last, run(modular, Guider(PAG(2.0, layers="b1", interval=(times[3], 0)), guidance_scale=5.0)))
    guider, calls = Guider(PAG(2.0, layers="b1"), guidance_scale=5.0, stop=0.25), []
    handle = modular.transformer.transformer_blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    ours = run(modular, guider)
    handle.remove()
    assert len(calls) == 3 + 3  # with the prompt, without, weak; then with the prompt alone
    assert torch.equal(run(modular, guider), ours)  # whose prompts are not encoded as after the window of the first
    guider.disable()
    assert torch.equal(run(modular, guider), run(modular, Guider(guidance_scale=1.0)))


def test_the_network_is_as_before_also_after_an_exception(pipes):
    _, modular = pipes("sd3")
    network, before = modular.transformer, state(modular.transformer)
    guider = Guider(PAG(2.0, layers="b1"), guidance_scale=5.0)
    expected = run(modular, guider)
    assert state(network) == before
    block, calls = network.transformer_blocks[1], []

    def stop(module, args):
        calls.append(1)
        if len(calls) == 2:  # within the first weak pass
            raise KeyboardInterrupt

    handle = block.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(modular, guider)
    handle.remove()
    assert state(network) == before
    guider.set_state(0, 4, torch.tensor(1000.0))
    guider.prepare_models(network)  # and a pipeline that fails before it calls the network
    assert state(network) != before
    guider.set_state(0, 4, torch.tensor(1000.0))
    assert state(network) == before
    assert torch.equal(run(modular, guider), expected)


def test_saved_and_loaded_with_its_heads(pipes, tmp_path):
    pipe, modular = pipes("sd3")
    guider = Guider(PAG(2.0, ["b0:1", "b1:0,3"], strength={"b0": {1: 0.5}, "b1": 1.0}), 4.0, terms_stop=0.5)
    guider.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "guider_config.json").read_text())
    assert stored["guidance"][0]["pag"]["layers"] == ["b0:1", "b1:0,3"] and stored["_class_name"] == "Guider"
    loaded = Guider.from_pretrained(tmp_path)
    assert loaded.guidance == guider.guidance and loaded.terms_stop == 0.5 and loaded.guidance_scale == 4.0
    assert torch.equal(run(modular, loaded), run(modular, guider))
    assert loaded.new(guidance_scale=2.0).guidance == guider.guidance
    assert Guider.from_pretrained(tmp_path, guidance_scale=1.0).num_conditions == 1
    spec = modular.get_component_spec("guider")
    assert spec.create().guidance == guider.guidance  # as the pipeline's own files are read
    assert "terms_stop" in repr(loaded)


def halve(record):
    return 0.5 * record.v


@pytest.mark.parametrize(
    "guidance",
    [
        [{"os:system": {"command": "echo"}}],
        {"pag": {"scale": 1.0, "layers": "b1:0", "target": "os:getcwd"}},
        [{"pag": {"scale": 1.0, "layers": "b1", "target": {"os:system": {"command": "echo"}}}}],
        [{"pag": {"scale": 1.0, "layers": "b1", "schedule": "os:abort"}}],
        [{"pag": {"scale": 1.0, "layers": "b1"}}, {"combine": "os:abort"}],
        [{"name": "pag", "scale": 1.0, "layers": "b1", "noise": "os:abort"}],
    ],
)
def test_a_file_cannot_name_code(guidance, tmp_path):
    with pytest.raises(RestoreError, match="guidance.*'os:"):
        Guider(guidance)
    (tmp_path / "guider_config.json").write_text(json.dumps({"_class_name": "Guider", "guidance": guidance}))
    with pytest.raises(RestoreError, match="guidance.*'os:"):
        Guider.from_pretrained(tmp_path)


class Small:
    """A pipeline that makes small pictures in few steps."""

    def __init__(self, modular):
        self.modular = modular

    def __getattr__(self, name):
        return getattr(self.modular, name)

    def __call__(self, **given):
        return self.modular(**options("sd3", **given))


def test_the_pages_example_runs(pipes, tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) if "Guider" in block]
    monkeypatch.chdir(tmp_path)
    held = {"pipe": Small(pipes("sd3")[1]), "restore": restore}
    exec(block, held)
    assert held["guider"].guidance == held["pipe"].guider.guidance == restore.guidance.as_guidance(held["heads"])
    assert held["image"].shape == (4, 8, 12)


def test_own_code_works_but_is_not_saved(pipes, tmp_path):
    _, modular = pipes("sd3")
    guider = Guider(PAG(1.0, layers="b1", target=halve))
    assert guider.new(guidance_scale=3.0).guidance == guider.guidance
    assert relative(run(modular, guider), run(modular, ClassifierFreeGuidance())) > 1e-4
    with pytest.raises(RestoreError, match=":halve"):
        guider.save_pretrained(tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_what_it_refuses(pipes):
    _, modular = pipes("sd3")
    for guidance, words in [
        (CFG(1.0), "guidance_scale"),
        (PAG(1.0, "b1", schedule="linear"), "schedule.*linear"),
        ([{"pag": {"scale": 1.0, "layers": "b1"}}, {"combine": "apg"}], "combination"),
    ]:
        with pytest.raises(RestoreError, match=words):
            Guider(guidance)
    with pytest.raises(RestoreError, match="terms_start"):
        Guider(PAG(1.0, "b1"), terms_start=0.7, terms_stop=0.2)
    for guidance, words in [(PAG(1.0, "b7"), "b7"), (SAG(1.0), "sag")]:
        with pytest.raises(RestoreError, match=words):
            run(modular, Guider(guidance))
    with pytest.raises(RestoreError, match="blocks.*FLUX"):
        add_guider(StableDiffusion3AutoBlocks())
    with guided(modular, PAG(1.0, "b1")), pytest.raises(RestoreError, match="Guider"):
        run(modular, ClassifierFreeGuidance())
    _, flux = pipes("flux")
    with pytest.raises(RestoreError, match="guidance_scale must be 1"):
        run(flux, Guider(guidance_scale=2.0), "flux")
    guider = Guider(PAG(1.0, "b1"))
    guider.set_state(0, 4, torch.tensor(1000.0))
    guider._seen = torch.zeros(1), 0.0, torch.ones(1)
    with pytest.raises(RestoreError, match="prediction as it is"):
        guider.forward(torch.zeros(1))


def test_an_older_diffusers_is_told_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.guiders.guider_utils", None)
    spec = importlib.util.spec_from_file_location("older", integration.__file__)
    with pytest.raises(RestoreError, match="diffusers 0.36 or newer, got diffusers .*restore.guided"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
