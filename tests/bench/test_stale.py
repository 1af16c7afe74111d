"""What was computed under another protocol, with other code or from other files is never taken for finished."""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import sys
from pathlib import Path

import pytest
import torch

import operators
import restore
from operators import RestoreError
from restore.bench.protocol import find_conflicts
from restore.bench.run import read_manifest, run_benchmark
from restore.versions import hash_own_code

CODE = """
import torch
from helper_of_mine import GAIN
from operators import Operator


class Dimmed(Operator):
    name = "dimmed"

    def A(self, x):
        return {factor} * x


def adjoint(prior, operator, y, *, noise, steps, guidance=None, condition=None, callback=None):
    return GAIN * operator.A_adjoint(y)


def target(a):
    return a.v


def schedule(t):
    return 1.0


def difference(result, truth):
    return {factor} * (result - truth).abs().mean(dim=(1, 2, 3))
"""
NOISE = {"name": "gaussian", "sigma": 0.05}


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A module of the user's and its helper; the returned function edits them."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("code_of_mine", "helper_of_mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def write(factor=0.5, gain=1.0):
        (tmp_path / "code_of_mine.py").write_text(CODE.format(factor=factor))
        (tmp_path / "helper_of_mine.py").write_text(f"GAIN = {gain}\n")
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)  # as a new process would: mtimes have seconds
        for name in ("code_of_mine", "helper_of_mine"):
            sys.modules.pop(name, None)

    write()
    yield write
    for name in ("code_of_mine", "helper_of_mine"):
        sys.modules.pop(name, None)


@pytest.fixture
def config(tmp_path, tiny_run, smooth_images, write_images):
    write_images(tmp_path / "photos", smooth_images(3, 16, 0))
    return {
        **tiny_run,
        "data": {"folder": str(tmp_path / "photos")},
        "tasks": {"sr": {"operator": {"name": "super_resolution", "factor": 4, "noise": NOISE}}},
        "methods": {"dps": {"sampler": "dps", "steps": 2, "parameters": {"zeta": 0.5}}},
    }


PAG = {"scale": 1.0, "layers": ["m1"]}


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": {"mine": {"sampler": "code_of_mine:adjoint", "steps": 2}}},
        {"tasks": {"dim": {"operator": {"name": "code_of_mine:Dimmed", "noise": NOISE}}}},
        {"tasks": {"two": {"operator": {"name": "compose", "operators": [{"name": "code_of_mine:Dimmed"}]}}}},
        {"guidance": {"pag": {**PAG, "target": "code_of_mine:target"}}},
        {"guidance": {"pag": {**PAG, "schedule": "code_of_mine:schedule"}}},
    ],
    ids=["sampler", "operator", "composition", "target", "schedule"],
)
def test_edited_code_is_another_benchmark(config, code, changes):
    config["methods"]["dps"]["guidance"] = changes.pop("guidance", None)
    config |= changes
    assert run_benchmark(config).computed > 0
    code()  # the same again
    assert run_benchmark(config).computed == 0
    code(factor=0.25)
    with pytest.raises(RestoreError, match=r"another benchmark \(code\.code_of_mine: "):
        run_benchmark(config)
    code(gain=2.0)
    with pytest.raises(RestoreError, match=r"another benchmark \(code\.helper_of_mine: "):
        run_benchmark(config)


def test_only_code_from_outside_is_hashed(code):
    shipped = operators.SuperResolution(4, noise=operators.GaussianNoise(0.05))
    method = restore.load("embedded").method(shipped, sampler="dps", guidance=restore.PAG(1.0, "i5"))
    assert (
        hash_own_code(shipped, method, "restore.samplers.dps:dps", "a title: words", "m1:3", torch.nn.Identity()) == {}
    )
    own = importlib.import_module("code_of_mine")
    names = {"code_of_mine", "helper_of_mine"}
    for thing in (
        own.Dimmed(),
        own.adjoint,
        "code_of_mine:schedule:20",
        {"a": [restore.PAG(1.0, "i5", target=own.target)]},
    ):
        assert hash_own_code(thing).keys() == names, thing


def test_metrics_follow_contents_not_paths(config, code, trunks, tmp_path):
    weights = tmp_path / "alexnet.pth"
    shutil.copy(trunks["alexnet"], weights)
    names = ["psnr", "lpips", "code_of_mine:difference"]
    config["metrics"] = {"names": names, "weights": {"alexnet": str(weights)}, "lpips_enlarge": 4}
    first = run_benchmark(config).table["table"]["sr"]["dps"]["means"]

    state = torch.load(weights)
    torch.save({key: 2 * value if "features.0" in key else value for key, value in state.items()}, weights)
    second = run_benchmark(config).table["table"]["sr"]["dps"]["means"]
    fresh = run_benchmark(config, [f"out={tmp_path / 'fresh'}"]).table["table"]["sr"]["dps"]["means"]
    assert second["lpips"] == fresh["lpips"] != first["lpips"]
    code(factor=0.25)
    third = run_benchmark(config).table["table"]["sr"]["dps"]["means"]
    assert third[names[2]]["mean"] == pytest.approx(second[names[2]]["mean"] / 2)


def test_a_reference_set_is_known_by_its_contents(config, inception_weights, tmp_path, smooth_images, write_images):
    write_images(tmp_path / "reference", smooth_images(4, 16, 5))
    config["metrics"] = {"names": ["kid"], "allow_small": True, "weights": {"inception": str(inception_weights)}}
    config["metrics"]["reference"] = str(tmp_path / "reference")
    first = run_benchmark(config).table["table"]["sr"]["dps"]["set_values"]
    assert run_benchmark(config).table["table"]["sr"]["dps"]["set_values"] == first
    write_images(tmp_path / "reference", smooth_images(4, 16, 6))
    second = run_benchmark(config).table["table"]["sr"]["dps"]["set_values"]
    assert run_benchmark(config, [f"out={tmp_path / 'fresh'}"]).table["table"]["sr"]["dps"]["set_values"] == second
    assert second != first


def test_weights_of_a_weaker_model_belong_to_the_protocol(config, tiny_adm, tmp_path):
    weak = shutil.copytree(tiny_adm, tmp_path / "weak")
    config["methods"]["dps"]["guidance"] = {"autoguidance": {"scale": 1.0, "model": str(weak)}}
    run_benchmark(config)
    (file,) = weak.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RestoreError, match="another benchmark .*backbone.*weak"):
        run_benchmark(config)


DELETE = Path.unlink


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def exchange(path):
    other = next(p for p in sorted(path.parent.glob("*.png")) if p.read_bytes() != path.read_bytes())
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("change", [DELETE, truncate, exchange], ids=["deleted", "truncated", "exchanged"])
def test_changed_pictures_are_computed_again(config, change):
    config |= {"samples": 2, "batch": 1}
    run_benchmark(config)
    run = Path(config["out"])
    whole = {p: p.read_bytes() for p in run.rglob("*.png")}
    files = ["results/sr/dps/00000.png", "results/sr/dps/samples/00001-1.png", "results/sr/dps/spread/00001.png"]
    for name in [*files, "truth/00002.png", "measurements/sr/00000.png"]:
        change(run / name)
        done = run_benchmark(config)
        assert (done.computed, done.reused) == (1, 2), name
        assert {p: p.read_bytes() for p in run.rglob("*.png")} == whole, name


def test_rows_of_earlier_versions_stay_valid(config):
    run_benchmark(config)
    for path in Path(config["out"]).rglob("rows/*.json"):
        row = json.loads(path.read_text())
        del row["files"]
        path.write_text(json.dumps(row))
    assert run_benchmark(config).computed == 0


@pytest.mark.parametrize("native", [True, False])
def test_the_protocol_has_the_precision_that_auto_became(config, monkeypatch, native):
    """All workers of a run use one precision; a run is not continued, nor compared, in another."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    config |= {"methods": {"dps": {"sampler": "dps", "steps": 1, "parameters": {"zeta": 0.5}}}, "precision": "auto"}
    (task,) = config["tasks"]
    table = run_benchmark(config, ["data.limit=1"]).table["table"]
    used, other = ("bf16", "fp32") if native else ("fp32", "bf16")
    protocol = read_manifest(Path(config["out"]))["protocol"]
    (ran,) = table[task]["dps"]["cost"]["protocols"]
    assert (protocol["precision"], ran["precision"]) == (used, {"bf16": "bfloat16", "fp32": "float32"}[used])
    assert run_benchmark(config, ["data.limit=1", f"precision={used}"]).reused == 1
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: not native)
    with pytest.raises(RestoreError, match=f"precision: {used} there, {other} here"):
        run_benchmark(config, ["data.limit=1"])
    assert find_conflicts(protocol, {**protocol, "precision": other}) == {"precision": (used, other)}


def test_the_configuration_of_a_model_folder_belongs_to_the_run(config, tiny_adm, tmp_path):
    folder = shutil.copytree(tiny_adm, tmp_path / "model")
    config = config | {"backbone": str(folder)}
    run_benchmark(config)
    (folder / "restore.json").write_text(json.dumps({"schedule": "cosine"}))
    with pytest.raises(RestoreError, match=r"holds another benchmark .*restore.json"):
        run_benchmark(config)
    # A run of an earlier version has recorded the weights alone.
    manifest = Path(config["out"]) / "run.json"
    run = json.loads(manifest.read_text())
    files = run["identity"]["backbone"][str(folder)]
    for name in [name for name in files if name.endswith(".json")]:
        del files[name]
    manifest.write_text(json.dumps(run))
    assert run_benchmark(config).computed == 0
