from __future__ import annotations

import copy
import sys
import types

import pytest

from operators import RestoreError
from restore.bench.config import build_method, list_cells, load_config, select_result_keys
from restore.guidance import PAG

BASE = {
    "name": "small",
    "backbone": "embedded",
    "data": {"folder": "photos", "size": 32},
    "tasks": {
        "sr": {"operator": {"name": "super_resolution", "factor": 4, "noise": {"name": "gaussian", "sigma": 0.05}}},
        "blur": {"operator": {"name": "gaussian_blur", "kernel_size": 9, "std": 1.0}},
    },
    "methods": {
        "dps": {"sampler": "dps", "steps": 10, "parameters": {"zeta": 1.0}},
        "pag": {
            "title": "DPS + PAG",
            "sampler": "dps",
            "steps": 10,
            "parameters": {"zeta": 1.0},
            "guidance": {"pag": {"scale": 1.0, "layers": ["m1"]}},
            "sweep": {"guidance.pag.scale": [0.5, 2.0]},
            "per_task": {"blur": {"parameters": {"zeta": 0.4}, "guidance": {"pag": {"layers": ["i2"]}}}},
        },
        "bicubic": {"sampler": "bicubic", "only": ["sr"]},
    },
}


def changed(*path_and_value):
    config = copy.deepcopy(BASE)
    *path, last, value = path_and_value
    inner = config
    for key in path:
        inner = inner[key]
    inner[last] = value
    return config


def test_sweeps_become_methods_and_tasks_may_differ():
    config = load_config(BASE)
    assert list(config["methods"]) == ["dps", "pag_scale=0.5", "pag_scale=2.0", "bicubic"]
    swept = config["methods"]["pag_scale=2.0"]
    assert swept["family"] == "pag" and swept["swept"] == {"scale": 2.0} and swept["title"] == "DPS + PAG, scale 2.0"
    assert build_method(config, "sr", "pag_scale=2.0").describe()["guidance"] == [
        {"pag": {"scale": 2.0, "layers": ["m1"]}}
    ]
    on_blur = build_method(config, "blur", "pag_scale=2.0").describe()
    assert on_blur["guidance"] == [{"pag": {"scale": 2.0, "layers": ["i2"]}}] and on_blur["parameters"] == {"zeta": 0.4}
    assert config["methods"]["pag_scale=0.5"]["guidance"]["pag"]["scale"] == 0.5
    assert ("blur", "bicubic") not in list_cells(config) and ("sr", "bicubic") in list_cells(config)


def test_layers_can_be_swept():
    config = load_config(changed("methods", "pag", "sweep", {"guidance.pag.layers": [["i2"], ["i2", "m1"]]}))
    assert "pag_layers=i2+m1" in config["methods"]


def test_overrides_and_words_that_do_not_matter():
    config = load_config(BASE, ["seed=3", "methods.dps.steps=20", "data.limit=4"])
    assert config["seed"] == 3 and config["methods"]["dps"]["steps"] == 20 and config["data"]["limit"] == 4
    worded = load_config(changed("tasks", "sr", "title", "Super-resolution"), ["engine=ray", "metrics.names=[psnr]"])
    assert select_result_keys(worded) == select_result_keys(load_config(BASE))
    assert select_result_keys(config) != select_result_keys(load_config(BASE))


@pytest.mark.parametrize(
    "config, message",
    [
        (changed("bacth", 2), r"no key bacth; did you mean 'batch'\?"),
        (changed("data", "folders", "x"), r"no key data\.folders; did you mean 'folder'\?"),
        (changed("methods", "dps", "step", 4), r"no key methods\.dps\.step; did you mean 'steps'\?"),
        (changed("methods", "dps", "sampler", "dsp"), r"methods\.dps: unknown sampler 'dsp'; did you mean 'dps'\?"),
        (changed("methods", "dps", "parameters", {}), r"methods\.dps: sampler dps needs the parameter 'zeta'"),
        (changed("methods", "dps", "parameters", {"zetta": 1}), "no parameter 'zetta'; did you mean 'zeta'"),
        (changed("methods", "dps", "steps", None), r"methods\.dps: steps"),
        (changed("methods", "dps", "guidance", {"pga": {}}), r"methods\.dps: .*'pga'; did you mean 'pag'"),
        (changed("methods", "bicubic", "only", ["srr"]), r"the task 'srr'; did you mean 'sr'\?"),
        (changed("methods", "dps", "per_task", {"sr": {"sampler": "psld"}}), r"per_task\.sr: a task cannot change"),
        (changed("methods", "bicubic", None), r"lacks methods\.bicubic\.sampler"),
        (
            changed("tasks", "sr", "operator", {"name": "super_resolutoin"}),
            "tasks.sr: .*did you mean 'super_resolution'",
        ),
        (changed("tasks", "sr", "resample", "bilinear"), "no resampling 'bilinear'"),
        (changed("tasks", "sr", "sr4x"), "task 'sr4x'; did you mean 'sr4'"),
        (changed("data", "folder", None), r"data\.folder open"),
        (changed("data", "folder", "???"), r"leaves data\.folder open"),
        (changed("data", "name", "ffhq"), "data set named 'ffhq'; did you mean 'ffhq-256'"),
        (changed("metrics", {"names": ["psrn"]}), "unknown metric 'psrn'; did you mean 'psnr'"),
        (changed("batch", 0), "batch=0"),
        (changed("seed", "abc"), "seed='abc' must be a whole number"),
        (changed("seed", -1), "seed=-1 must be a whole number of 0 or more"),
        (changed("data", "size", "big"), r"data\.size='big' must be a whole number"),
        (changed("checkpointing", "perhaps"), "checkpointing='perhaps' must be true or false"),
        (changed("kind", "restauration"), r"did you mean 'restoration'\?"),
        (changed("methods", {}), "lacks methods"),
        (changed("backbone", None), "lacks backbone"),
        (changed("data", 4), "data must be a mapping"),
        (changed("tasks", "sr", 4), r"tasks\.sr must be a mapping"),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(RestoreError, match=message):
        load_config(config)


def test_tasks_by_name_and_samplers_from_outside(monkeypatch):
    config = load_config(changed("tasks", {"sr": "sr4", "blur": {"operator": "gaussian-blur", "title": "Blur"}}))
    assert config["tasks"]["sr"]["operator"]["factor"] == 4 and config["tasks"]["blur"]["title"] == "Blur"
    assert config["tasks"]["blur"]["operator"]["name"] == "gaussian_blur"

    def walk(prior, operator, y, *, noise, steps, stride, length=1.0, guidance=None, condition=None, callback=None):
        raise NotImplementedError

    monkeypatch.setitem(sys.modules, "my_samplers", types.SimpleNamespace(walk=walk))
    mine = {"sampler": "my_samplers:walk", "steps": 3, "parameters": {"stride": 2}}
    assert load_config(changed("methods", {"mine": mine}))["methods"]["mine"]["sampler"] == "my_samplers:walk"
    with pytest.raises(RestoreError, match="needs the parameter 'stride'"):
        load_config(changed("methods", {"mine": mine | {"parameters": {"length": 2.0}}}))
    with pytest.raises(RestoreError, match="'my_samplers:run' cannot be imported"):
        load_config(changed("methods", {"mine": mine | {"sampler": "my_samplers:run"}}))


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(RestoreError, match="does not exist; did you mean 'table9'"):
        load_config(tmp_path / "tabel9.yaml")
    assert load_config("table9", ["metrics.reference=x"])["name"] == "table9"
    (tmp_path / "bad.yaml").write_text("a: [1, 2\nb: }")
    with pytest.raises(RestoreError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    with pytest.raises(RestoreError, match="key=value"):
        load_config(BASE, ["seed"])


def test_a_key_with_a_line_break_is_one_sentence():
    with pytest.raises(RestoreError, match="has no key see") as caught:
        load_config(BASE | {"see\nd": 1})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../holiday", "a/b", "a\\b", "..", ".hidden", "", "a\nb", "x" * 201])
@pytest.mark.parametrize("place", ["name", "tasks", "methods"])
def test_names_become_file_names_that_stay_in_the_run(place, name):
    config = copy.deepcopy(BASE)
    if place == "name":
        config["name"] = name
    else:
        config[place][name] = config[place].pop(next(iter(config[place])))
        config["methods"] = {key: {**entry, "only": None, "per_task": {}} for key, entry in config["methods"].items()}
    with pytest.raises(RestoreError, match=f"name in {place} must be a file name"):
        load_config(config)


def test_names_that_some_file_systems_take_for_one():
    config = copy.deepcopy(BASE)
    config["methods"]["DPS"] = config["methods"]["dps"]
    with pytest.raises(RestoreError, match="'dps' and 'DPS'"):
        load_config(config)


def test_entries_of_lists_are_set_by_number():
    """The call of docs/guidance.md for the latent prior: two layers in lists of guidances, no classes."""
    layers = [f"methods.{name}.guidance.pag.layers=i3" for name in ("pag", "pag_tag", "pag_tsr", "pag_slg", "pag_ssg")]
    layers += [f"methods.{name}.guidance.0.pag.layers=i3" for name in ("pag_zero", "pag_tcfg", "pag_fdg")]
    without = [f"methods.{name}.only=[]" for name in ("cfg", "cfg_zero", "cfg_tcfg", "cfg_fdg")]
    latent = ["backbone=embedded-latent", "tasks.faces.labels=null", "metrics.reference=faces", *layers, *without]
    config = load_config("guidance-2026", latent)
    assert len(list_cells(config)) == 40
    terms = [term for cell in list_cells(config)[1:] for term in build_method(config, *cell).guidance.terms]
    assert {term.layers for term in terms if isinstance(term, PAG)} == {"i3"}
    for wrong, said in (("5.pag.scale=1", "list index out of range"), ("x.pag.scale=1", "must name an entry")):
        with pytest.raises(RestoreError, match=said):
            load_config("guidance-2026", ["metrics.reference=faces", f"methods.pag_zero.guidance.{wrong}"])
