"""CLIP scores by a CLIP model of random weights that transformers saved, and searches in generation with them."""

from __future__ import annotations

import json

import pytest
import tiny_sd
import torch

from operators import RestoreError
from restore.search import search_heads
from restore.search.clip_score import SCORES, ClipScore


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a tiny CLIP model with its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {f"{k}_token_id": tiny_sd.VOCABULARY[f"<|{name}|>"] for k, name in (("bos", "startoftext"),
            ("eos", "endoftext"), ("pad", "endoftext"))}  # fmt: skip
    text = {**small, **ends, "vocab_size": len(tiny_sd.VOCABULARY), "max_position_embeddings": 12}
    vision = {**small, "image_size": 16, "patch_size": 8}
    tiny_sd.seeded(
        lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)), 0
    ).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessor(**size), tiny_sd.tiny_tokenizer(folder)).save_pretrained(folder)
    return folder


def test_scores_are_the_models_own_logits(clip):
    from transformers import CLIPModel, CLIPProcessor

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 3, 24, 24), generator=generator, dtype=torch.uint8)
    prompts = ["a cat", "dogs"] * 10
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    inputs = processor(text=prompts, images=list(pixels), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diag()
    images = pixels.float() / 127.5 - 1
    pick = ClipScore(str(clip), str(clip), True)(images, prompts)
    assert torch.allclose(pick, logits, atol=1e-5) and pick.std() > 1e-3
    score = ClipScore(str(clip), str(clip), False)(images, prompts)
    assert torch.allclose(score, 100 * (logits / model.logit_scale.exp()).clamp(min=0), atol=1e-4)
    assert all(score.better == 1 for score in SCORES.values())


def test_models_that_are_not_there_or_not_whole_are_refused(clip, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    images = torch.zeros(1, 3, 16, 16)
    with pytest.raises(RestoreError, match="needs|compares every image with its prompt"):
        ClipScore(str(clip), str(clip), True)(images, [""])
    monkeypatch.setenv("RESTORE_OFFLINE", "1")
    with pytest.raises(RestoreError, match="cannot be loaded"):
        ClipScore(str(tmp_path / "nothing"), str(clip), True)(images, ["a"])
    for file in clip.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(clip / "model.safetensors")
    state.pop("visual_projection.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RestoreError, match="visual_projection.weight is missing"):
        ClipScore(str(tmp_path), str(clip), True)(images, ["a"])


def test_a_search_in_text_to_image(clip, tmp_path):
    tiny_sd.save_folder(tmp_path / "sd")
    (tmp_path / "some.txt").write_text("a cat\na dog\n")
    (tmp_path / "others.txt").write_text("a bird\n")
    config = {
        "name": "pick",
        "kind": "text_to_image",
        "backbone": str(tmp_path / "sd"),
        "out": str(tmp_path / "run"),
        "device": "cpu",
        "threads": 1,
        "batch": 2,
        "tasks": {"text": {}},
        "method": {"sampler": "pipeline", "steps": 2},
        "guidance": [{"pag": {"scale": 3.0}}, {"cfg": {"scale": 2.0}}],
        "objective": "pick_score",
        "clip": str(clip),
        "layers": ["m1"],
        "calibration": {"count": 4, "prompts": str(tmp_path / "some.txt")},
        "test": {"count": 2, "prompts": str(tmp_path / "others.txt")},
    }
    found = search_heads(config)
    assert found.table["objective"] == "-pick_score"
    assert found.guidance[1] == {"cfg": {"scale": 2.0}} and found.guidance[0]["pag"]["layers"][0].startswith("m1:")
    costs = [entry["cost"] for entry in found.table["rounds"][0]["ranking"]]
    assert costs == sorted(costs) and len(set(costs)) > 1
    seeds = [found.table["images"][part]["seed"] for part in ("calibration", "test")]
    assert seeds == [0, 1] and "seed 1" in (found.folder / "report.md").read_text()
    none = found.table["test"]["none"]["tasks"]["text"]["pick_score"]
    assert none["low"] <= none["value"] <= none["high"]
    assert search_heads(config).table == json.loads((found.folder / "search.json").read_text())
    with pytest.raises(RestoreError, match="share 2, such as 'a cat'"):
        search_heads(config, [f"test.prompts={tmp_path / 'some.txt'}"])
