"""Every configuration of configs/search: what its words resolve to; end to end on tiny stand-ins of its model in the
published layout. The numbers mean nothing."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import published
import pytest
import tiny_clip
import torch
from omegaconf import OmegaConf

from restore import guidance as guidances
from restore.bench.batches import read_prompts
from restore.bench.config import build_method, load_config
from restore.guidance import PAG
from restore.paths import configs_dir, data_dir
from restore.search import SHEETS, draw_gallery, search_heads
from restore.search import config as configs

FOLDER = configs_dir() / "search"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# Of each configuration of text-to-image, its stand-in and the layers that are searched there.
TEXT = {
    "sd3-general": ("sd3", ["b0"]),
    "sd3-style": ("sd3", ["b1"]),
    "flux-general": ("flux-dev", ["b0", "b2"]),
    "flux-style": ("flux-dev", ["b3"]),
    "sdxl-general": ("sdxl", ["mid_block.attentions.0.transformer_blocks.1.attn1"]),
    "sd-general": ("sd-1.5", ["m1"]),
}
QUICK = ("flux-style",)
RUNS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TEXT]


def load(name, *settings):
    missing = OmegaConf.missing_keys(OmegaConf.load(FOLDER / f"{name}.yaml"))
    return configs.load_search(name, [*(f"{key}=x" for key in sorted(missing)), *settings])


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_states_its_source(name):
    search = load(name)
    assert "arXiv 2506.10978" in search["rest"]["source"] and search["name"] == f"heads-{name}"
    assert search["rest"]["title"]


def test_the_papers_settings():
    """R, k, M, w and steps of the paper's two settings, on both of its models."""
    expected = {
        "sd3-general": ("sd-3-medium", 1, 24, 20, 3.0, 20),
        "flux-general": ("flux.1-dev", 1, 24, 20, 8.0, 15),
        "sd3-style": ("sd-3-medium", 5, 3, 5, 3.0, 20),
        "flux-style": ("flux.1-dev", 5, 3, 5, 8.0, 15),
    }
    for name, (backbone, rounds, top, count, scale, steps) in expected.items():
        search = load(name)
        assert (search["rest"]["backbone"], search["rounds"], search["top"]) == (backbone, rounds, top)
        methods = {"one": {"guidance": configs.set_layers(search["guidance"], [("b0", 0)])}}
        for half in ("calibration", "test"):
            checked = load_config(configs.build_benchmark(search, half, methods, ["pick_score"], "nowhere"))
            (task,) = checked["tasks"].values()
            method = build_method(checked, next(iter(checked["tasks"])), "one")
            assert method.steps == steps and method.guidance.terms == (PAG(scale, ("b0:0",), scope="joint"),)
            assert task["count"] == (count if half == "calibration" else 20)
            assert ("{}, oil" in (task["template"] or "")) == name.endswith("style")
        assert search["objective"] == "pick_score" and search["cfg"] > 0
    assert load("sd3-general")["scales"] == [2.0, 3.0, 4.0] and 9 in load("sd3-general")["sizes"]


def test_prompts_of_calibration_and_test_are_apart():
    sets = {path.stem: read_prompts(path.stem) for path in (data_dir() / "prompts").glob("*.txt")}
    assert len(sets["quality-20"]) == 20 and len(sets["content-5"]) == 5
    for one, other in (("quality-20", "quality-test"), ("content-5", "content-unseen")):
        assert not set(sets[one]) & set(sets[other])
        assert len(set(sets[one])) == len(sets[one]) and len(set(sets[other])) == len(sets[other])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    clip = str(tiny_clip.save(root / "clip"))
    torch.save({"layers.0.weight": torch.ones(1, 8), "layers.0.bias": torch.zeros(1)}, root / "head.pth")
    names = ("clip_l", "clip_h", "pick_score", "hpsv2")
    return {name: clip for name in names} | {"aesthetic": str(root / "head.pth")}


@pytest.mark.parametrize("name", RUNS)
def test_a_text_to_image_search_runs_from_end_to_end(name, models, tmp_path):
    kind, layers = TEXT[name]
    config = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))
    config |= {"backbone": str(published.save(kind, tmp_path / kind)), "layers": layers, "precision": "fp32"}
    config |= {"out": str(tmp_path / "run"), "device": "cpu", "threads": 1, "batch": 2}
    side = published.SIZES.get(kind)
    config["pipeline"] = {
        "call": config.get("pipeline", {}).get("call", {}) | ({"height": side, "width": side} if side else {})
    }
    config["method"]["steps"], config["metrics"]["models"] = 2, models
    for half in ("calibration", "test"):
        config[half]["count"] = 2
    config |= {"rounds": min(config["rounds"], 2), "top": min(config["top"], 2)}
    if "sizes" in config:
        config["sizes"] = [1, 2]
    config["gallery"]["layers"] = {"layers": layers[:1], "top": 1}
    found = search_heads(config)
    assert {"none", "layer", "all", "cfg", "cfg-heads"} <= set(found.table["test"])
    (metrics,) = found.table["test"]["none"]["tasks"].values()
    assert set(metrics) == {"pick_score", "clip_score", "hpsv2", "aesthetic"}
    costs = {entry["cost"] for entry in found.table["rounds"][0]["ranking"]}
    assert len(costs) == len(found.table["pool"])  # guidance by every head does something of its own
    assert guidances.build_guidance(found.guidance).terms[0].scale == found.table["best"]["scale"]
    sheets = draw_gallery(config)
    assert [path.name.split("-")[0] for path in sheets] == ["heads", "layers", "pairs"]
    before = (found.folder / "search.json").read_bytes()
    assert search_heads(config).table == json.loads(before) and (found.folder / "search.json").read_bytes() == before


def test_pull_names_the_models_of_scores_and_loads_them(models, tmp_path, command):
    folder = published.save("sd-1.5", tmp_path / "sd")
    settings = [f"backbone={folder}", *(f"metrics.models.{k}={v}" for k, v in models.items() if k != "aesthetic")]
    code, out, _ = command(
        "heads", "sd-general", *settings, f"metrics.models.aesthetic={models['aesthetic']}", "--pull"
    )
    assert code == 0 and not out.strip()  # everything is the user's own
    code, _, error = command("heads", "sd-general", *settings, "metrics.models.pick_score=/nowhere", "--pull")
    assert code == 2 and "metrics.models.pick_score must be" in error


def _documented():
    """(place, words) of every `restore heads` command of the documents and of the configurations' comments."""
    root = Path(__file__).parents[2]
    for path in sorted([root / "README.md", *(root / "docs").rglob("*.md"), *FOLDER.glob("*.yaml")]):
        text = path.read_text(encoding="utf-8").replace("\\\n#", "").replace("\\\n", "")
        for line in re.findall(r"restore heads (?!CONFIG)[^`\n]+", text):
            words = shlex.split(re.split(r"\s{2,}#|`", line)[0])
            if len(words) > 2:
                yield path.name, words[2:]


def test_documented_commands_resolve():
    """Their configuration exists, their settings are known and stay as they are written, their options exist."""
    pages = set()
    for page, words in _documented():
        name, *rest = words
        settings = [word for word in rest if "=" in word and not word.startswith("--")]
        options = [word for word in rest if word not in settings]
        assert not set(options) - {"--dry-run", "--pull", "--gallery", "all", *SHEETS, "heads,pairs"}, (page, words)
        source = name if name in NAMES else Path(__file__).parents[2] / name
        search = configs.load_search(source, settings, placeholder="-")
        plain = OmegaConf.create(json.loads(json.dumps({**search["rest"], **search})))
        for key, value in (setting.split("=", 1) for setting in settings):
            assert _squeeze(OmegaConf.select(plain, key)) == _squeeze(value), (page, key, value)
        pages.add(page)
    assert {"heads.md", "papers.md", "miniature.yaml", "flux-style.yaml"} <= pages


def _squeeze(value):
    return re.sub(r"[' ]", "", str(value))
