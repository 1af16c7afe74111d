"""Searches in generation from classes, and the pools of the published transformers, from their configurations alone."""

from __future__ import annotations

import json

import pytest
import tiny_flow

from operators import RestoreError
from restore.bench.config import build_method, load_config
from restore.guidance import CFG
from restore.search import config as configs
from restore.search import search_heads
from restore.search.hunt import find_layers

# What the published transformer/config.json say beside the defaults of diffusers' classes.
SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
PUBLISHED = {
    "SD3Transformer2DModel": ("StableDiffusion3Pipeline", SD3, 576),
    "FluxTransformer2DModel": ("FluxPipeline", {"guidance_embeds": True}, 1368),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_pool_of_a_published_model_needs_no_weights(name, tmp_path):
    pipeline, own, heads = PUBLISHED[name]
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": pipeline, "transformer": ["diffusers", name], "vae": ["diffusers", "AutoencoderKL"]})
    )
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": name, **own}))
    pool = configs.list_heads(find_layers(str(tmp_path), offline=True))
    assert len(pool) == heads and pool[0] == ("b0", 0) and pool[-1] == (f"b{heads // 24 - 1}", 23)


def test_a_search_from_classes_has_rows_of_cfg(tmp_path):
    config = {
        "name": "classes",
        "kind": "generation",
        "backbone": str(tiny_flow.save_folder("dit", tmp_path / "dit")),
        "out": str(tmp_path / "run"),
        "device": "cpu",
        "threads": 1,
        "batch": 2,
        "tasks": {"classes": {"labels": [1, 2]}},
        "method": {"sampler": "ddim", "steps": 2},
        "guidance": {"pag": {"scale": 2.0}},
        "objective": "planted:distance_to_grey",
        "layers": ["b1"],
        "cfg": 1.5,
        "calibration": {"count": 2},
        "test": {"count": 2},
    }
    found = search_heads(config)
    assert {"cfg", "cfg-heads"} <= set(found.table["test"])
    run = load_config(
        json.loads((found.folder / "test" / "run.json").read_text())["config"] | {"methods": _methods(found)}
    )
    assert build_method(run, "classes", "cfg").guidance.terms == (CFG(1.5),)
    costs = {name: entry["objective"]["cost"] for name, entry in found.table["test"].items()}
    assert len({costs[name] for name in ("none", "cfg", "cfg-heads", "heads-1")}) == 4
    config["tasks"]["classes"]["labels"] = None  # nothing to guide away from
    assert "cfg" not in search_heads(config | {"out": str(tmp_path / "other")}).table["test"]


@pytest.mark.parametrize("key, value", [("count", 3), ("prompts", "content-5")])
def test_tasks_have_no_images_of_their_own(key, value):
    change = {"tasks": {"faces": {"labels": 1, key: value}}}
    with pytest.raises(RestoreError, match=f"tasks.faces.{key} must be left out.*calibration.{key} and test.{key}"):
        configs.load_search(
            {"name": "n", "kind": "generation", "guidance": {"pag": {"scale": 1.0}}, **change},
            ["objective=planted:distance_to_grey"],
        )


def _methods(found):
    methods = json.loads((found.folder / "test" / "run.json").read_text())["config"]["methods"]
    return {name: {key: m[key] for key in ("sampler", "steps", "guidance")} for name, m in methods.items()}
