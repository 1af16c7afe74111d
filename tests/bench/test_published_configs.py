"""Every published table's configuration from end to end, on stand-in networks: the blocks and layer names of the real
ones with eight channels and random weights, two steps, a handful of small images. The numbers mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from restore.bench.baselines import BASELINES
from restore.bench.config import build_method, list_cells, load_config
from restore.bench.run import run_benchmark
from restore.guidance import PAG, SAG, resolve_layers
from restore.method import Situation, find_preset
from restore.metrics import weights
from restore.paths import configs_dir
from restore.report.write import write_report
from restore.zoo import load_backbone

FOLDER = configs_dir() / "benchmark"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# One of each kind in every run of the tests; the others with `-m slow`.
QUICK = ("embedded", "figure41", "figures-sd", "table8-ffhq", "table9")
RUNS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@pytest.fixture(scope="module")
def world(tmp_path_factory, stand_ins, inception_weights, trunks, smooth_images, write_images):
    """Images, lists, prompts and metric weights that stand in for what the tables need."""
    root = tmp_path_factory.mktemp("world")
    write_images(root / "faces", smooth_images(2, 256, 0))
    write_images(root / "reference", smooth_images(6, 64, 1))
    (root / "names.txt").write_text("00000.png\n00001.png\n")
    (root / "prompts.txt").write_text("a cat\na dog\n")
    metric_weights = {"inception": str(inception_weights)} | {name: str(file) for name, file in trunks.items()}
    assert set(metric_weights) == set(weights.WEIGHTS)
    return root, stand_ins, metric_weights


def shrink(name: str, world) -> dict:
    """The configuration with stand-ins for its networks and data; its tasks, methods and layers as they are."""
    root, networks, metric_weights = world
    config = OmegaConf.load(FOLDER / f"{name}.yaml")
    kind = config.get("kind", "restoration")
    small = kind == "generation" and config.backbone != "embedded"
    cond = "-cond" if config.backbone.endswith("-cond") else ""
    config.backbone = str(networks[f"small-imagenet{cond}" if small else config.backbone])
    config.update({"device": "cpu", "precision": "fp32", "batch": 2, "threads": 1, "out": str(root / "runs" / name)})
    config.metrics.update({"weights": metric_weights, "allow_small": True, "fid_layer": "64"})
    if OmegaConf.is_missing(config.metrics, "reference"):
        config.metrics.reference = str(root / "reference")
    if kind == "restoration":
        config.data.update({"folder": str(root / "faces"), "limit": 2, "every": 1, "names": None})
        if "imagenet" in name:
            config.data.names = str(root / "names.txt")
        if name in ("table7-imagenet", "table8-ffhq"):
            config.metrics.lpips_net = "alex"  # VGG at 256 pixels would be most of the test's time
        if name in ("table4-ffhq", "table5-imagenet"):  # the tiny latent network has 64 pixels, an eighth of 512
            config.data.update({"size": 32, "name": "folder"})
            for task in config.tasks.values():
                task.solve_at = 64
                for key, value in {"size": 32, "margin": 4, "kernel_size": 15}.items():
                    if key in task.operator:
                        task.operator[key] = value
    for task in config.tasks.values():
        if "count" in task:
            task.count = 2 if config.metrics.get("group_by_prompt") else 4
            if "prompt_limit" in task:
                task.prompt_limit = 2
            if task.get("prompts") is not None or OmegaConf.is_missing(task, "prompts"):
                task.prompts = str(root / "prompts.txt")
        if task.get("backbone"):
            task.backbone = str(networks["small-imagenet-cond"])
        if kind == "restoration" or config.backbone == str(networks["embedded"]):
            task.labels = None  # the stand-in has no classes
    if name == "guidance-2026":
        config.methods = {key: method for key, method in config.methods.items() if not key.startswith("cfg")}
    for method in config.methods.values():
        if "autoguidance" in (method.get("guidance") or {}):
            method.guidance.autoguidance.model = str(networks["small-imagenet"])
        if method.get("steps"):
            method.steps = "ddim2" if str(method.steps).startswith(("ddim", "karras")) else 2
    if name in ("samplers", "samplers-2026"):  # one number of steps and two tasks of each
        config.tasks = {key: config.tasks[key] for key in ("box", "gaussian")}
        for method in config.methods.values():
            if "sweep" in method:
                method.sweep = {
                    "steps": [
                        {"quad": "quad:2", "karr": "karras:2", "ddim": "ddim2"}.get(str(method.sweep.steps[0])[:4], 2)
                    ]
                }
            method.per_task = {key: value for key, value in method.get("per_task", {}).items() if key in config.tasks}
            if "only" in method:
                method.only = list(config.tasks)
            if "iterations" in method.get("parameters", {}):
                method.parameters.iterations = 2
    if name in ("figure38", "figure40"):
        method = config.methods.pag
        method.sweep = {"guidance.pag.layers": list(method.sweep["guidance.pag.layers"])[::7]}
    if name == "table10":  # 63 combinations differ in nothing but names, which load_config has checked
        method = config.methods.pag
        method.sweep = {"guidance.pag.layers": [["i14"], ["i16", "o3"], ["i14", "i16", "i17", "m1", "o2", "o3"]]}
    return OmegaConf.to_container(config)


def test_every_table_of_the_paper_is_there():
    assert {"table1", "table2", "table3", "table6", "table9", "table10", "figure12", "embedded"} <= set(NAMES)
    assert {"figures-adm", "figures-sd", "figure38", "figure40", "figure41", "figure45"} <= set(NAMES)
    assert {"table4-ffhq", "table5-imagenet", "table7-imagenet", "table8-ffhq"} <= set(NAMES)


def check_resuming(config: dict, folder: Path):
    """A run that was killed in its last batch continues to the same bytes, and does nothing else."""
    *_, (task, method) = list_cells(load_config(config))
    lost = sorted((folder / "results" / task / method / "rows").glob("*.json"))[-1]
    picture = lost.parent.parent / f"{lost.stem}.png"
    before = picture.read_bytes()
    lost.unlink()
    picture.write_bytes(before[:100])
    again = run_benchmark(config)
    assert again.computed == 1 and picture.read_bytes() == before


@pytest.mark.parametrize("name", RUNS)
def test_configuration_runs_from_end_to_end(name, world):
    done = run_benchmark(shrink(name, world))
    table, names = done.table["table"], done.table["metrics"]
    cells = [cell for methods in table.values() for cell in methods.values()]
    assert all(cell["missing"] == 0 and cell["done"] == cell["expected"] for cell in cells)
    for metric in names:
        keys = {"pr": ["precision", "recall"]}.get(metric, [metric])
        for key in keys:
            assert all(key in {**c["means"], **c["set_values"], **c["cost"]} for c in cells), key
    check_resuming(shrink(name, world), done.folder)
    if name == "figure41":  # evaluations of the weaker model count, too
        assert {key: cell["cost"]["nfe"] for key, cell in table["cond"].items()} == {"none": 2, "cfg": 4, "pag": 4}
    # A stand-in whose guidance did nothing would make all of this worthless.
    plain, guided_method = {"table2": ("none", "pag"), "table8-ffhq": ("dps", "dps_pag")}.get(name, (None, None))
    if plain:
        for task in table:
            folders = [done.folder / "results" / task / method for method in (plain, guided_method)]
            files = [sorted(folder.glob("*.png")) for folder in folders]
            assert files[0] and any(a.read_bytes() != b.read_bytes() for a, b in zip(*files, strict=True))
    written = write_report([done.folder])
    text = written.markdown.read_text()
    ours = ("defaults", "embedded", "embedded-latent", "guidance-restoration", "guidance-samples", "kodak", "photos")
    ours += ("samplers-2026", "nonlinear", "guidance-2026")
    ours += ("pag-generation", "samplers", "figures-adm", "figures-sd", "figure40", "figure41", "figure45")
    assert "published" in text or name in ("table5-imagenet", "table7-imagenet", *ours)


@pytest.mark.parametrize("name", NAMES)
def test_published_values_belong_to_methods_and_tasks(name):
    raw = OmegaConf.load(FOLDER / f"{name}.yaml")
    open_keys = [f"{key}=x" for key in sorted(OmegaConf.missing_keys(raw))]
    config = load_config(FOLDER / f"{name}.yaml", open_keys)
    assert config["source"] and config["name"] == name
    for method, tasks in config["published"]["values"].items():
        assert method in config["methods"] or method in config["published"]["titles"], method
        assert set(tasks) <= set(config["tasks"])


@pytest.mark.parametrize("name", NAMES)
def test_layers_exist_in_the_network_they_are_meant_for(name, stand_ins):
    """By name alone: the stand-ins have the published networks' blocks. Sweeps are expanded, all 63 of Table 10 too."""
    raw = OmegaConf.load(FOLDER / f"{name}.yaml")
    config = load_config(FOLDER / f"{name}.yaml", [f"{key}=x" for key in sorted(OmegaConf.missing_keys(raw))])
    networks = {}
    for task, method in list_cells(config):
        backbone = config["tasks"][task]["backbone"] or config["backbone"]
        folder = stand_ins[backbone.removesuffix("-cond")]
        if folder not in networks:
            networks[folder] = load_backbone(folder)[1]
        guidance = build_method(config, task, method).guidance
        for term in [term for term in (guidance.terms if guidance else ()) if isinstance(term, (PAG, SAG))]:
            layers = term.layers.split(",") if isinstance(term.layers, str) else term.layers
            assert len(resolve_layers(layers, networks[folder].attention)) == len(layers)


@pytest.mark.parametrize("name", NAMES)
def test_no_row_repeats_another(name):
    """With what presets add to a method that leaves parameters open."""
    raw = OmegaConf.load(FOLDER / f"{name}.yaml")
    config = load_config(FOLDER / f"{name}.yaml", [f"{key}=x" for key in sorted(OmegaConf.missing_keys(raw))])
    rows = {}
    for task, method in list_cells(config):
        own, chosen = config["tasks"][task], build_method(config, task, method)
        whole = chosen.describe()
        if config["kind"] == "restoration" and chosen.sampler not in BASELINES:
            backbone = own["backbone"] or config["backbone"]
            kind = "latents" if "latent" in backbone or backbone.startswith("sd-") else "pixels"
            preset = find_preset(Situation(backbone, own["operator"]["name"], kind=kind), chosen.sampler)
            whole = preset.override(steps=chosen.steps, guidance=chosen.guidance, parameters=chosen.parameters)
            whole = {key: value for key, value in whole.describe().items() if key != "source"}
        same = rows.setdefault((task, json.dumps(whole, sort_keys=True, default=str)), method)
        assert same == method, f"{task}: {method} is {same}"
