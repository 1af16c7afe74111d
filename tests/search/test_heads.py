"""Searches on a tiny network with random weights, compared with brute force and planted solutions."""

from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path

import killed
import numpy as np
import planted
import pytest
import torch
import yaml
from PIL import Image

import restore
import restore.restorer  # imported before forking, or every child would spend seconds on it
from operators import RestoreError
from restore import guidance as guidances
from restore.app import cli
from restore.bench import sampling
from restore.bench.batches import load_images
from restore.bench.config import build_method, load_config
from restore.guidance import describe_guidance
from restore.images import io
from restore.images.folder import read_rgb
from restore.metrics import sets, single
from restore.search import config as configs
from restore.search import objective, plan_search, search_heads

NOISE = {"name": "gaussian", "sigma": 0.05}
FILES = ("search.json", "guidance.yaml", "report.html", "report.md")


@pytest.fixture
def config(tmp_path, tiny_run, smooth_images, write_images):
    write_images(tmp_path / "some", smooth_images(4, 16, 0))
    write_images(tmp_path / "others", smooth_images(3, 16, 1))
    return {
        **tiny_run,
        "tasks": {"sr": {"operator": {"name": "super_resolution", "factor": 4, "noise": NOISE}}},
        "method": {"sampler": "diffpir", "steps": 3, "parameters": {"lam": 1.0, "zeta": 1.0}},
        "guidance": {"pag": {"scale": 3.0}},
        "objective": "psnr",
        "layers": ["i3", "m1", "o0"],
        "calibration": {"folder": str(tmp_path / "some")},
        "test": {"folder": str(tmp_path / "others")},
    }


load = functools.cache(restore.load)


def results_of(config, layers):
    """(results, truths) of the calibration images by the sampler itself, without a search."""
    methods = {"one": {"guidance": configs.set_layers(config["guidance"], layers) if layers else None}}
    search = configs.load_search(config)
    checked = load_config(configs.build_benchmark(search, "calibration", methods, ["psnr"], "nowhere"))
    images = load_images(checked)
    restorer = load(config["backbone"], device="cpu")
    x = torch.stack([images.tensor(i) for i in range(len(images))])
    estimates = []
    for first in range(0, len(x), config["batch"]):
        part = slice(first, first + config["batch"])
        options = {"seed": 0, "samples": 1, "device": torch.device("cpu")}
        method = build_method(checked, "sr", "one")
        estimates.append(
            sampling.restore_batch(restorer, x[part], images.ids[part], checked["tasks"]["sr"], method, **options)
        )
    results = torch.cat([estimate.samples[:, 0] for estimate in estimates])
    return torch.cat([io.to_tensor(pixels) for pixels in io.to_uint8(results)]), x


def test_one_round_is_brute_force(config):
    torch.set_num_threads(1)
    found = search_heads(config)
    pool = [(layer, head) for layer, n in _heads(config).items() for head in range(n)]
    assert sorted(map(tuple, found.table["pool"])) == sorted(pool)
    costs = {}
    for layer, head in pool:
        results, truth = results_of(config, [(layer, head)])
        costs[layer, head] = -float(single.psnr(results, truth).mean())
    ranked = [(tuple(e["head"]), e["cost"]) for e in found.table["rounds"][0]["ranking"]]
    assert [head for head, _ in ranked] == sorted(costs, key=costs.get) and len(set(costs.values())) == len(costs)
    # A benchmark measures PSNR before rounding to 8 bits.
    assert all(cost == pytest.approx(costs[head], abs=1e-2) for head, cost in ranked)
    results, truth = results_of(config, None)
    assert found.table["none"]["cost"] == pytest.approx(-float(single.psnr(results, truth).mean()), abs=1e-2)
    change = found.table["rounds"][0]["ranking"][0]["change"]
    assert change["low"] <= change["mean"] <= change["high"]
    assert change["mean"] == pytest.approx(ranked[0][1] - found.table["none"]["cost"])
    assert found.heads == [ranked[0][0]]


def _heads(config):
    attention = load(config["backbone"], device="cpu").backbone.attention.values()
    return {layer.short: layer.heads for layer in attention if layer.short in config["layers"]}


@pytest.mark.parametrize("name", ["closeness", "whole"])
def test_a_planted_set_is_found(config, name, monkeypatch):
    torch.set_num_threads(1)
    wanted = [("i3", 1), ("o0", 0)]
    results, truth = results_of(config, wanted)
    monkeypatch.setattr(planted, "TARGETS", {x.numpy().tobytes(): y for x, y in zip(truth, results, strict=True)})
    found = search_heads(config | {"objective": f"planted:{name}", "rounds": 2})
    assert sorted(found.heads) == wanted
    assert found.table["curve"][-1]["cost"] == pytest.approx(0, abs=1e-12) or name == "closeness"
    assert guidances.build_guidance(found.guidance).terms[0].layers == ("i3:1", "o0:0")
    (term,) = yaml.safe_load((found.folder / "guidance.yaml").read_text())
    assert term == {"pag": {"scale": 3.0, "layers": ["i3:1", "o0:0"]}}
    for method in ("none", "heads-1", "heads-2", "layer", "all"):
        entry = found.table["test"][method]
        assert entry["tasks"]["sr"]["psnr"]["low"] < entry["tasks"]["sr"]["psnr"]["high"]
        assert (entry["objective"]["change"]["low"] is None) == (name == "whole")


def test_the_report_says_which_number_is_from_which_images(config):
    found = search_heads(config | {"rounds": 2, "tasks": config["tasks"] | {"box": {"operator": "inpaint-box"}}})
    page, text = ((found.folder / f"report.{kind}").read_text() for kind in ("html", "md"))
    digests = [found.table["images"][part]["sha256"][:12] for part in ("calibration", "test")]
    for written in (page, text):
        assert all(digest in written for digest in digests) and digests[0] != digests[1]
        assert "chosen on the calibration images: 4 images" in written and "of the test are of 3 images" in written
        assert "best layer: " in written and "all 3 layers" in written and "no guidance" in written
    assert page.count("<rect") >= len(found.table["pool"]) and "number of heads" in page
    sections = text.split("\n## ")
    ranked = re.findall(r"^\| \d+ \| (\w+:\d+) \|", text.partition("### Round 1")[2], re.M)
    assert len(ranked) == 2 * len(found.table["pool"]) - 1
    assert "sr: PSNR" in sections[1] and "box: SSIM" in sections[1]


def test_halving_finds_the_plant_and_says_what_it_skipped(config, monkeypatch):
    torch.set_num_threads(1)
    wanted = [("m1", 1)]
    results, truth = results_of(config, wanted)
    monkeypatch.setattr(planted, "TARGETS", {x.numpy().tobytes(): y for x, y in zip(truth, results, strict=True)})
    found = search_heads(config | {"objective": "planted:distance", "halving": True})
    for kept in found.folder.rglob("objective/**/*.json"):  # a value that cannot be read is computed again
        kept.write_text("{")
    assert search_heads(config | {"objective": "planted:distance", "halving": True}).table == found.table
    (skipped,) = found.table["rounds"][0]["skipped"]
    pool = len(found.table["pool"])
    assert found.heads == wanted
    assert (skipped["images"], skipped["of"], len(skipped["heads"])) == (2, 4, pool // 2)
    layer, head = skipped["heads"][0]
    rows = found.folder / "round-01" / "results" / "sr" / f"{layer}-{head}" / "rows"
    assert len(list(rows.glob("*.json"))) == 2
    counts = [entry["images"] for entry in found.table["rounds"][0]["ranking"]]
    assert counts == sorted(counts, reverse=True) and counts.count(2) == pool // 2
    names = ", ".join(f"{layer}:{head}" for layer, head in skipped["heads"])
    note = f"Halving, round 1: {pool // 2} heads were scored on 2 of 4 images only, the rest skipped: {names}."
    assert all(note in (found.folder / f"report.{suffix}").read_text() for suffix in ("md", "html"))


def _child(config):
    torch.set_num_threads(1)
    search_heads(config)


def contents(run: Path) -> dict[str, bytes]:
    files = [run / name for name in FILES] + sorted(run.glob("*/results/**/*.png"))
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in files}


def test_kills_change_nothing(config, tmp_path):
    torch.set_num_threads(1)
    config |= {"rounds": 2, "halving": True}
    whole = dict(config, out=str(tmp_path / "undisturbed"))
    search_heads(whole)
    kills, code = killed.kill_until_done(_child, config, kills=4, seconds=(0.3, 1.5), attempts=60, patience=120)
    assert kills >= 3 and code == 0
    assert contents(Path(config["out"])) == contents(Path(whole["out"]))
    search = Path(whole["out"]) / "search.json"
    before = {path: path.stat().st_mtime_ns for path in Path(config["out"]).rglob("results/**/*.png")}
    assert search_heads(config).table == json.loads(search.read_text())
    assert before == {path: path.stat().st_mtime_ns for path in Path(config["out"]).rglob("results/**/*.png")}


def test_halves_that_share_an_image_are_refused(config, tmp_path):
    pixels = read_rgb(tmp_path / "some" / "00002.png")
    Image.fromarray(pixels).save(tmp_path / "others" / "another-name.bmp")
    with pytest.raises(RestoreError, match="share 1 of their images, such as 00002 and another-name"):
        search_heads(config)
    assert not Path(config["out"]).exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"objective": {"psnr": 1.0}}, "the weight of psnr must be negative"),
        ({"objective": "residual_ratio"}, "residual_ratio has no direction"),
        ({"objective": "lpisp"}, "did you mean 'lpips'"),
        ({"guidance": True}, "guidance must be a mapping .*got True"),
        ({"guidance": [3]}, "guidance term must be .*got 3"),
        ({"objective": "clip_score"}, "clip_score compares images with prompts"),
        ({"guidance": {"pag": {"scale": 1.0, "layers": "m1"}}}, "must leave its layers open, got 0 terms"),
        ({"guidance": [{"pag": {"scale": 1.0}}, {"pag": {"scale": 2.0}}]}, "must leave its layers open, got 2 terms"),
        ({"objective": "kid_vgg16", "halving": True}, "kid_vgg16 needs all of them"),
        ({"name": "../../holiday"}, "name must be a file name without folders"),
        ({"halving": True, "batch": 4}, "give batch= less than 4"),
        ({"metrics": {"names": ["seconds_per_image"]}}, "must be of images or sets, got seconds_per_image"),
        ({"metrics": {"names": ["spread"]}}, "samples must be 2 or more for spread, got 1"),
        ({"objective": {"coverage": -1.0}}, "samples must be 2 or more for coverage, got 1"),
        (
            {"metrics": {"names": ["residual_ratio"]}, "tasks": {"sr": "sr4", "jpeg": {"operator": "jpeg-rounding"}}},
            "Gaussian noise in every",
        ),
        ({"rounds": 99}, "must be at most.*rounds=99"),
        ({"rounds": 0}, "rounds must be .*rounds=0"),
        ({"rouns": 2}, "did you mean 'rounds'"),
        ({"layers": ["i4"]}, "no attention layer is called 'i4'"),
        ({"methods": {}}, "has no key 'methods'"),
        ({"method": {"sampler": "diffpir"}}, "methods.none: steps is missing"),
        ({"calibration": {}}, "calibration.folder"),
        ({"calibration": {"limmit": 1}}, "calibration.limmit"),
    ],
)
def test_mistakes_are_one_sentence(config, change, message):
    with pytest.raises(RestoreError, match=message):
        search_heads(config | change)


def test_an_impossible_operator_claims_no_folder(config):
    config["tasks"]["sr"]["operator"]["factr"] = 4
    with pytest.raises(RestoreError, match="tasks.sr: .*did you mean 'factor'"):
        search_heads(config)
    assert not Path(config["out"]).exists()


def test_another_search_is_not_mixed_into_a_folder(config):
    config["layers"] = ["m1"]
    search_heads(config)
    with pytest.raises(RestoreError, match="holds another search .*guidance.pag.scale: 3.0 there, 2.0 here"):
        search_heads(config, ["guidance.pag.scale=2.0"])
    search_heads(config, ["title=Heads"])


def test_terms_schedules_and_combinations_pass_through(config):
    guidance = {"pag": {"scale": 2.0, "strength": 0.5, "target": "uniform", "schedule": "cosine"}, "combine": "apg"}
    built = guidances.build_guidance(configs.set_layers(guidance, [("m1", 0), ("i3", 1), ("m1", 1)]))
    plain = guidances.PAG(2.0, ["m1:0,1", "i3:1"], target="uniform", strength=0.5, schedule="cosine")
    assert built == guidances.Guidance((plain,), "apg")


def test_shares_of_a_kernel_distance_are_its_jackknife():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(7, 5)), generator.normal(size=(9, 5)) + 0.3
    as_tensors = [torch.from_numpy(a) for a in (x, y)]
    each = objective.jackknife_kernel_distance(x, y, paired=False)

    def distance(x, y):
        k = [(a @ b.T / 5 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
        within = [(m.sum() - np.trace(m)) / (len(m) * (len(m) - 1)) for m in k[:2]]
        return sum(within) - 2 * k[2].mean()

    for i in range(7):
        assert each[i] == pytest.approx(7 * distance(x, y) - 6 * distance(np.delete(x, i, 0), y))
    y = y[:7]
    both = objective.jackknife_kernel_distance(x, y, paired=True)
    for i in range(7):
        assert both[i] == pytest.approx(7 * distance(x, y) - 6 * distance(np.delete(x, i, 0), np.delete(y, i, 0)))
    assert distance(x, y) == pytest.approx(sets.kid(as_tensors[0], as_tensors[1][:7])["kid"], rel=1e-6)


def test_the_command_plans_searches_and_writes_a_guidance_that_runs(config, tmp_path, monkeypatch, capsys):
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump(config))

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["restore", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr()

    _, planned = command("heads", file, "layers=[m1]", "--dry-run")
    pool = _heads(config)["m1"]
    assert f"{pool} heads" in planned.out and f"calibration: {pool + 4} evaluations" in planned.out
    assert "test: 4 evaluations" in planned.out and "minutes" in planned.out and not Path(config["out"]).exists()
    code, output = command("heads", file, "layers=[m1]")
    assert code == 0 and "report.html" in output.out and (Path(config["out"]) / "guidance.yaml").exists()
    code, output = command("heads", file, "rouns=2")
    assert code == 2 and "did you mean 'rounds'" in output.err and output.err.count("\n") == 1
    photo, out = tmp_path / "some" / "00000.png", tmp_path / "out"
    run = ["run", photo, "--task", "sr4", "--degrade", "--sampler", "diffpir", "--steps", "2", "-o", out]
    run += ["--backbone", config["backbone"], "--guidance", f"{config['out']}/guidance.yaml", "--device", "cpu"]
    assert command(*run)[0] == 0
    (sidecar,) = out.glob("*.json")
    assert "m1:" in sidecar.read_text()


def test_a_plan_counts_what_a_search_computes(config):
    planned = plan_search(config | {"rounds": 2}, measure=False)
    found = search_heads(config | {"rounds": 2})
    cells = {
        where: len([p for p in found.folder.glob(f"{where}/results/*/*") if p.is_dir()])
        for where in ("round-01", "round-02", "curve", "test")
    }
    assert planned.test == cells.pop("test") and planned.calibration == sum(cells.values())
    assert (planned.candidates, planned.images) == (len(found.table["pool"]), (4, 3))


def test_the_shipped_search_is_of_every_head_and_states_the_halves():
    with pytest.raises(RestoreError, match="leaves calibration.folder open"):
        configs.load_search("embedded")
    search = configs.load_search("embedded", ["calibration.folder=faces", "test.folder=ffhq"])
    pool = configs.list_heads(load("embedded", device="cpu").backbone.attention, search["layers"])
    assert len(pool) == 28 and len({layer for layer, _ in pool}) == 7
    methods = {"one": {"guidance": configs.set_layers(search["guidance"], pool[:3])}}
    for part, count in (("calibration", 16), ("test", 64)):
        checked = load_config(configs.build_benchmark(search, part, methods, ["psnr"], "nowhere"))
        assert checked["data"]["limit"] == count and set(checked["tasks"]) == {"box", "sr4"}
        assert build_method(checked, "box", "one").parameters == {"lam": 3.0, "zeta": 1.0}
        guidance = build_method(checked, "sr4", "one").guidance
        assert describe_guidance(guidance) == [{"pag": {"scale": 1.0, "layers": ["i5:0,1,2"]}}]


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_manifest_is_one_sentence(config, content):
    folder = Path(config["out"])
    folder.mkdir()
    (folder / "config.json").write_text(content)
    with pytest.raises(RestoreError, match="config.json is damaged; start the search again in another folder"):
        search_heads(config)
    assert (folder / "config.json").read_text() == content
