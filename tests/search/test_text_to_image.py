"""Searches in text-to-image generation: tiny SD, SDXL, SD3 and FLUX in the published layout, scored by a tiny CLIP."""

from __future__ import annotations

import json
import re
from pathlib import Path

import killed
import numpy as np
import published
import pytest
import tiny_clip
import torch
import yaml
from PIL import Image

from operators import RestoreError
from restore.bench.config import build_method, load_config
from restore.guidance import CFG, PAG
from restore.search import draw_gallery, plan_search, search_heads

FILES = ("search.json", "guidance.yaml", "report.html", "report.md")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip.save(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {kind: published.save(kind, root / kind) for kind in ("sd-1.5", "sdxl", "sd3", "flux-dev")}


@pytest.fixture
def config(tmp_path, clip):
    (tmp_path / "some.txt").write_text("a cat\na dog\n")
    (tmp_path / "others.txt").write_text("a bird\nfish\n")
    return {
        "name": "pick",
        "kind": "text_to_image",
        "out": str(tmp_path / "run"),
        "device": "cpu",
        "threads": 1,
        "batch": 2,
        "tasks": {"text": {}},
        "method": {"sampler": "pipeline", "steps": 2},
        "guidance": {"pag": {"scale": 3.0}},
        "objective": "pick_score",
        "clip": str(clip),
        "calibration": {"prompts": str(tmp_path / "some.txt")},
        "test": {"prompts": str(tmp_path / "others.txt")},
    }


def of(kind, folders):
    side, layers = published.SIZES.get(kind), {"sd3": ["b0"], "flux-dev": ["b1", "b2"]}.get(kind, ["m1"])
    if kind == "sdxl":
        layers = ["mid_block.attentions.0.transformer_blocks.1.attn1"]
    call = {"height": side, "width": side} if side else {}
    return {"backbone": str(folders[kind]), "layers": layers, "pipeline": {"call": call}}


def test_a_search_under_cfg(config, folders, tmp_path):
    """The guidance's own CFG is in every row; without heads it is a row of its own."""
    config |= of("sd-1.5", folders) | {"guidance": [{"pag": {"scale": 3.0}}, {"cfg": {"scale": 2.0}}]}
    config["calibration"]["count"] = 4
    found = search_heads(config)
    assert found.table["objective"] == "-pick_score"
    assert found.guidance[1] == {"cfg": {"scale": 2.0}} and found.guidance[0]["pag"]["layers"][0].startswith("m1:")
    costs = [entry["cost"] for entry in found.table["rounds"][0]["ranking"]]
    assert costs == sorted(costs) and len(set(costs)) > 1
    seeds = [found.table["images"][part]["seed"] for part in ("calibration", "test")]
    assert seeds == [0, 1] and "seed 1" in (found.folder / "report.md").read_text()
    none = found.table["test"]["none"]["tasks"]["text"]["pick_score"]
    assert none["low"] <= none["value"] <= none["high"]
    assert "cfg" in found.table["test"] and "cfg-heads" not in found.table["test"]
    assert search_heads(config).table == json.loads((found.folder / "search.json").read_text())
    with pytest.raises(RestoreError, match="share 2, such as 'a cat'"):
        search_heads(config, [f"test.prompts={tmp_path / 'some.txt'}"])


@pytest.mark.parametrize(
    "kind", ["flux-dev", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sdxl", "sd3"))]
)
def test_several_scales_cfg_rows_and_unseen_contents_of_one_style(config, folders, kind):
    config |= of(kind, folders) | {"scales": [1.0, 3.0], "cfg": 2.0, "rounds": 2}
    config["tasks"]["text"]["template"] = "{}, in oil"
    planned = plan_search(config, measure=False)
    found = search_heads(config)
    table, test = found.table, found.table["test"]
    pool, layers = len(table["pool"]), len({layer for layer, _ in table["pool"]})
    assert planned.candidates == pool and planned.images == (2, 2)
    rows = {"none", "heads-1", "heads-2", "heads-1-w1", "heads-2-w1", "layer", "layer-w1", "all", "cfg", "cfg-heads"}
    assert set(test) == rows
    cells = {name: len(list((found.folder / name / "results" / "text").iterdir())) for name in ("round-01", "round-02")}
    assert cells == {"round-01": 1 + pool + 2 * layers + 1, "round-02": pool - 1}
    assert planned.test == len(test) and planned.calibration == sum(cells.values()) + 4
    # The best layer of each scale is that scale's own, and what was chosen is the best of all points of the curve.
    for scale, layer in table["best"]["layers"]:
        at_scale = {entry["name"]: entry["cost"] for entry in table["rounds"][0]["layers"] if entry["scale"] == scale}
        assert len(at_scale) == layers and at_scale[layer] == min(at_scale.values())
    best = min(table["curve"], key=lambda point: point["cost"])
    assert (table["best"]["size"], table["best"]["scale"]) == (best["size"], best["scale"])
    assert found.guidance == [{"pag": {"scale": best["scale"], "layers": best["heads"]}}]
    # The rows are what their names say.
    written = yaml.safe_load((found.folder / "test" / "config.yaml").read_text())
    run = load_config(written | {"methods": _methods(found)})
    plain, both = (build_method(run, "text", name).guidance.terms for name in ("cfg", "cfg-heads"))
    assert plain == (CFG(2.0),) and both == (PAG(best["scale"], tuple(best["heads"])), CFG(2.0))
    values = {name: entry["objective"]["cost"] for name, entry in test.items()}
    assert len(set(values.values())) == len(values) - (layers == 1)  # the layer is then all layers
    text, page = ((found.folder / f"report.{end}").read_text() for end in ("md", "html"))
    assert "CFG, w 2, and the chosen heads" in text
    assert page.count("best layer, scale 1") == page.count("heads, scale 1") > 2
    assert page.count('stroke-dasharray="5 3"') == 2 * 3  # both scales: calibration, test, PickScore of the test
    with pytest.raises(RestoreError, match="scales must be different"):
        search_heads(config, ["scales=[1.0, 1.0]"])


def _methods(found):
    methods = json.loads((found.folder / "test" / "run.json").read_text())["config"]["methods"]
    return {name: {k: m[k] for k in ("sampler", "steps", "guidance")} for name, m in methods.items()}


def _child(config):
    torch.set_num_threads(1)
    search_heads(config)
    draw_gallery(config)


def contents(run: Path) -> dict[str, bytes]:
    files = [run / name for name in FILES] + sorted(run.rglob("*.png"))
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in files}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_kills_change_nothing(config, folders, kind, tmp_path):
    torch.set_num_threads(1)
    gallery = {"heads": {"prompt": "girl with a cat"}, "layers": {"layers": of(kind, folders)["layers"], "top": 2}}
    config |= of(kind, folders) | {"scales": [1.0, 3.0], "gallery": gallery}
    whole = dict(config, out=str(tmp_path / "undisturbed"))
    _child(whole)
    kills, code = killed.kill_until_done(_child, config, kills=4, seconds=(1.0, 4.0), attempts=40, patience=300)
    assert kills >= 2 and code == 0
    assert contents(Path(config["out"])) == contents(Path(whole["out"]))
    before = {path: path.stat().st_mtime_ns for path in Path(config["out"]).rglob("results/**/*.png")}
    _child(config)
    assert before == {path: path.stat().st_mtime_ns for path in Path(config["out"]).rglob("results/**/*.png")}


def test_a_gallery_before_and_after_the_search(config, folders, command, tmp_path):
    config |= of("sd3", folders) | {"layers": None}
    config["gallery"] = {"heads": {"prompt": "girl with a cat", "seed": 3}, "pairs": {"heads": ["b0:1", "b1:0,2"]}}
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    code, out, _ = command("heads", file, "--gallery", "heads,pairs")
    heads, pairs = map(Path, out.split())
    assert code == 0 and (heads.name, pairs.name) == ("heads-girl-with-a-cat-3.png", "pairs-0.png")
    rows = sorted(Path(config["out"]).glob("gallery/heads-*/results/text/*"))
    assert [row.name for row in rows] == [f"b{layer}-{head}" for layer in (0, 1) for head in range(4)]
    pictures = {row.name: (row / "000000.png").read_bytes() for row in rows}
    assert len(set(pictures.values())) == 8
    sheet = Image.open(heads).convert("RGB")
    assert sheet.width > 4 * 192 and sheet.height > 2 * 192
    cell = Image.open(rows[5] / "000000.png").resize((192, 192), Image.Resampling.NEAREST)
    assert _holds(sheet, cell)
    methods = {path.name for path in Path(config["out"]).glob("gallery/pairs-*/results/text/*")}
    assert methods == {"none", "b0-1", "b1-0", "b1-2", "b0-1+b1-0", "b0-1+b1-2", "b1-0+b1-2"}
    found = search_heads(file)  # in the same folder
    (layers,) = draw_gallery(file, sheets=["layers"])
    assert layers.name == "layers-0.png" and found.folder in layers.parents
    run = json.loads(next(found.folder.glob("gallery/layers-0-*/run.json")).read_text())
    assert set(run["config"]["metrics"]["names"]) == {"pick_score"}
    assert {path.name for path in found.folder.glob("gallery/layers-0-*/results/text/best-*")} == {"best-b0", "best-b1"}
    assert (np.asarray(Image.open(layers).convert("RGB")) == (213, 0, 0)).all(-1).sum() > 4 * 8 * 180
    for mistake, message in (("gallery.pairs.heads=[b0:9]", "b0 has 4"), ("gallery.heads.layers=[b7]", "'b7'")):
        code, _, error = command("heads", file, mistake, "--gallery", re.search(r"\.(\w+)", mistake)[1])
        assert code == 2 and message in error
    code, _, error = command("heads", file, "--gallery", "head")
    assert code == 2 and "did you mean 'heads'" in error


def _holds(sheet, cell):
    whole, part = np.asarray(sheet), np.asarray(cell)
    corners = np.argwhere((whole[:-191, :-191] == part[0, 0]).all(-1))
    return any(np.array_equal(whole[y : y + 192, x : x + 192], part) for y, x in corners)


def test_a_plan_needs_no_weights(config, folders, tmp_path):
    import shutil

    folder = shutil.copytree(folders["flux-dev"], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    plan = plan_search(config | of("flux-dev", {"flux-dev": folder}) | {"layers": None}, measure=False)
    assert plan.candidates == 4 * 4


def test_own_objectives_are_metrics_with_prompts(config, folders):
    config |= of("sd-1.5", folders) | {"objective": "planted:prompt_length", "cfg": 0.0}
    found = search_heads(config)
    assert found.table["objective"] == "-planted:prompt_length"
    assert found.table["test"]["none"]["tasks"]["text"]["planted:prompt_length"]["value"] == pytest.approx(5)
    assert "cfg" not in found.table["test"]
