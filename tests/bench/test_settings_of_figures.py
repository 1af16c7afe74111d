"""The figures' configurations have the settings that the PAG paper prints (Ahn et al. 2024, App. A, D, E)."""

from __future__ import annotations

import pytest
from diffusers import DDIMScheduler
from omegaconf import OmegaConf

from restore.backbones.attention_layers import find_attention_layers
from restore.bench.config import build_method, list_cells, load_config
from restore.guidance import CFG, PAG, SAG, Autoguidance
from restore.paths import configs_dir
from restore.zoo import load_backbone

MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1"
# Stable Diffusion 1.5's scheduler.
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def methods(name):
    """{(task, method): its Method}, data left open."""
    path = configs_dir() / "benchmark" / f"{name}.yaml"
    config = load_config(path, [f"{key}=x" for key in sorted(OmegaConf.missing_keys(OmegaConf.load(path)))])
    return config, {cell: build_method(config, *cell) for cell in list_cells(config)}


def terms(method):
    return [] if method.guidance is None else [*method.guidance.terms]


def test_samples_of_adm():
    """Captions of Figures 13-16; App. A.1."""
    config, cells = methods("figures-adm")
    assert {(m.sampler, m.steps) for m in cells.values()} == {("ddpm", 250)}
    layers = ("input_blocks.13.1", "input_blocks.14.1", "input_blocks.16.1", "middle_block.1")
    for task in ("uncond", "cond"):
        assert terms(cells[task, "none"]) == [] and terms(cells[task, "pag"]) == [PAG(3.0, layers)]
    quantitative = ("input_blocks.14.1", "input_blocks.16.1", "input_blocks.17.1", "middle_block.1")
    assert terms(cells["uncond", "pag_a1"]) == [PAG(3.0, quantitative)]
    assert terms(cells["cond", "pag_a1"]) == [PAG(3.0, ("input_blocks.14.1",))]
    assert config["tasks"]["cond"]["backbone"] == "adm-imagenet-256-cond"


def test_samples_of_stable_diffusion():
    """App. A.2: s = 4.5, 5.0 in Figures 17-19; w = 6.0 with s = 1.5; 200, 50 and 25 steps. w is guidance_scale - 1."""
    _, cells = methods("figures-sd")
    steps = {task: {m.steps for (t, _), m in cells.items() if t == task} for task, _ in cells}
    assert steps == {"teaser": {200}, "uncond": {50}, "text": {25}, "interval": {25}}
    assert terms(cells["teaser", "pag_200"]) == terms(cells["uncond", "pag_scale=4.5"]) == [PAG(4.5, (MIDDLE,))]
    assert terms(cells["uncond", "pag_scale=5.0"]) == [PAG(5.0, (MIDDLE,))]
    assert terms(cells["text", "cfg"]) == [CFG(7.5 - 1)]
    assert terms(cells["text", "cfg_pag"]) == [CFG(6.0 - 1), PAG(1.5, (MIDDLE,))]


@pytest.mark.parametrize("first", [5, 10, 15, 20, 25])
def test_cfg_is_on_in_the_first_steps(first):
    """Figure 44, at the times that diffusers' DDIM visits."""
    _, cells = methods("figures-sd")
    (term,) = terms(cells["interval", f"cfg_{first}"])
    scheduler = DDIMScheduler(**SD)
    scheduler.set_timesteps(25)
    scales = [term.scale_at(t, None) for t in scheduler.timesteps.tolist()]
    assert scales == [6.5] * first + [0.0] * (25 - first)


@pytest.mark.parametrize("name,backbone", [("figure38", "adm-imagenet-256"), ("figure40", "sd-1.5")])
def test_every_single_layer_is_perturbed(name, backbone, stand_ins):
    """App. D.2, in order of execution."""
    network = load_backbone(stand_ins[backbone])[1].network
    known = [layer.short for layer in find_attention_layers(network).values()]
    _, cells = methods(name)
    pag = [terms(m)[0] for (_, key), m in cells.items() if key.startswith("pag_")]
    if name == "figure38":
        assert [term.layers for term in pag] == [(layer,) for layer in known] and {term.scale for term in pag} == {1.0}
        assert {m.steps for m in cells.values()} == {"ddim25"}
        (drawn,) = terms(cells["uncond", "random"])
        assert drawn.random_layers == 1 and drawn.layers == ("i14", "i16", "i17", "m1", "o2", "o3")
    else:  # the stand-in has the first three levels of the real one, whose layers these are
        every = "i1 i2 i4 i5 i7 i8 m1 o3 o4 o5 o6 o7 o8 o9 o10 o11".split()
        assert [term.layers for term in pag] == [(layer,) for layer in every] and {term.scale for term in pag} == {2.5}
        assert set(known) == set(every) and {m.steps for m in cells.values()} == {25}
        (cross,) = terms(cells["text", "cross"])
        assert cross.scope == "cross" and cross.target == "zero" and cross.layers == tuple(every)


def test_two_models_scales_and_sag():
    """Figures 41 and 45; SAG as its authors' script for 256 pixels has it: guide_scale 1.5, output block 2, blur 9."""
    _, cells = methods("figure41")
    assert terms(cells["cond", "cfg"]) == [Autoguidance(3.0, "adm-imagenet-256")]
    assert terms(cells["cond", "pag"])[0].scale == 3.0
    config, cells = methods("figure45")
    assert config["tasks"]["cond"]["labels"] == [32, 317, 281, 391] and config["backbone"].endswith("-cond")
    for kind, sampler in ((SAG, "sag"), (PAG, "pag")):
        swept = [terms(m)[0] for (_, key), m in cells.items() if key.startswith(sampler)]
        assert [term.scale for term in swept] == [0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0]
        assert all(isinstance(term, kind) for term in swept)
    _, cells = methods("table1")
    for task in ("uncond", "cond"):
        assert terms(cells[task, "sag"]) == [SAG(1.5 - 1, "output_blocks.2.1", sigma=9, taps=31)]


def test_measures_of_the_tables():
    for name, size in (("table1", 5000), ("table2", 5000), ("figure12", 5000), ("table3", 1000)):
        assert methods(name)[0]["metrics"]["is_split_size"] == size
    config, _ = methods("table3")
    task = config["tasks"]["prompts"]
    assert (task["prompt_limit"], task["count"], config["metrics"]["pairs"]) == (20, 1000, 100)
    assert {"loop_steps_per_second", "process_memory_mb"} <= set(methods("table6")[0]["metrics"]["names"])
