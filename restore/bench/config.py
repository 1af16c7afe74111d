"""The configuration of a benchmark: what it may hold, what is missing, and the methods a sweep stands for."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING as ABSENT
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import OmegaConf

from operators import RestoreError, factory
from operators.naming import check_known, lookup
from restore import samplers
from restore.bench.baselines import BASELINES
from restore.bench.datasets import KNOWN_SETS
from restore.bench.schema import Benchmark
from restore.config import fill, read_config
from restore.method import Method
from restore.metrics import table
from restore.paths import configs_dir

# Each kind of benchmark with its methods; those of a restoration are also any sampler, "module:function" included.
KINDS = {
    "restoration": {**samplers.SAMPLERS, **BASELINES},
    "generation": {"ddpm": (), "ddim": ("eta",)},  # restore.samplers.generate
    "text_to_image": {"pipeline": ()},  # an unmodified diffusers pipeline
}
# What decides the bytes of a result; the rest may change between two sessions of one run.
RESULT_KEYS = ("kind", "backbone", "precision", "seed", "samples", "batch", "data", "tasks", "methods", "threads")


def load_config(config: str | os.PathLike | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A checked, complete configuration as plain containers, sweeps expanded into methods.

    config: a YAML file, the name of a shipped one (table8-ffhq) or a mapping. overrides: `key=value` with dots
    between levels, as on the command line.
    Raises RestoreError for unknown keys (with the nearest known one), values of another type, missing values and
    methods that cannot run.
    """
    plain = read_config(config, overrides, "benchmark")
    complete = fill(Benchmark, _tidy(plain))
    complete["methods"] = dict(_expand_sweeps(complete["methods"]))
    _check(complete)
    return complete


def _tidy(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keys given as nothing left out, names of tasks replaced by what they stand for; mappings where there must be."""
    sections = {f.name: f.default_factory() for f in fields(Benchmark) if f.default_factory is not ABSENT}
    result = {str(key): value for key, value in given.items() if value is not None}
    for key, section in sections.items():
        value = result.get(key, {} if key in ("tasks", "methods") else None)
        if isinstance(section, list) and not isinstance(value, (list, type(None))):
            raise RestoreError(f"{key} must be a list, not {value!r}")
        if value is None or isinstance(section, list):
            continue
        if not isinstance(value, dict) or (key in ("tasks", "methods") and not value):
            raise RestoreError(f"{key} must be a mapping, not {value!r}" if value else f"the configuration lacks {key}")
        if is_dataclass(section):
            result[key] = {k: v for k, v in value.items() if v is not None}
            continue
        for name, entry in value.items():
            entry = {"operator": entry} if key == "tasks" and isinstance(entry, str) else entry or {}
            if not isinstance(entry, dict):
                raise RestoreError(f"{key}.{name} must be a mapping, not {entry!r}")
            entry = {k: v for k, v in entry.items() if v is not None}
            if isinstance(entry.get("operator"), str):
                entry["operator"] = task_operator(entry["operator"])
            value[name] = entry
        result[key] = {str(name): entry for name, entry in value.items()}
    return result


def task_operator(name: str) -> dict[str, Any]:
    """The operator's mapping in configs/task/NAME.yaml. Raises RestoreError for an unknown name."""
    files = {path.stem: path for path in sorted((configs_dir() / "task").glob("*.yaml"))}
    check_known([name], files, "there is no task")
    return OmegaConf.to_container(OmegaConf.load(files[name]))


def _set(mapping: dict[str, Any], dotted: str, value: Any) -> None:
    """mapping[a][b] = value for "a.b"; an entry of a list by its number (guidance.0.pag.scale)."""
    *parents, last = dotted.split(".")
    for parent in parents:
        key = int(parent) if isinstance(mapping, list) else parent
        if isinstance(mapping, dict) and mapping.get(key) is None:
            mapping[key] = {}
        mapping = mapping[key]
    mapping[last] = value


def _value_name(value: Any) -> str:
    name = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return name.replace(":", "-")  # it becomes a folder's


def _expand_sweeps(methods: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """`sweep: {guidance.pag.scale: [1, 2]}` of method pag becomes methods pag_scale=1 and pag_scale=2."""
    for name, method in methods.items():
        sweep = method.pop("sweep")
        expanded = [(name, method | {"family": name, "family_title": method["title"] or name, "swept": {}})]
        for dotted, values in sweep.items():
            if not isinstance(values, list) or not values:
                raise RestoreError(f"methods.{name}.sweep.{dotted} must be a list of values")
            if dotted.split(".")[0] not in ("guidance", "parameters", "steps"):
                raise RestoreError(f"methods.{name}.sweep can vary guidance, parameters and steps, not {dotted}")
            last = dotted.rsplit(".", 1)[-1]
            following = []
            for key, variant in expanded:
                for value in values:
                    changed = copy.deepcopy(variant)
                    _set(changed, dotted, value)
                    changed["swept"] = {**variant["swept"], last: value}
                    if variant["title"]:
                        changed["title"] = f"{variant['title']}, {last} {_value_name(value)}"
                    following.append((f"{key}_{last}={_value_name(value)}", changed))
            expanded = following
        yield from expanded


def settings(config: Mapping[str, Any], method: str, task: str) -> dict[str, Any]:
    """sampler, steps, guidance and parameters of a method on one task: its own, then what `per_task` changes."""
    entry = config["methods"][method]
    result = {key: copy.deepcopy(entry[key]) for key in ("sampler", "steps", "guidance", "parameters")}
    for key, value in (entry["per_task"].get(task) or {}).items():
        if isinstance(value, dict) and isinstance(result[key], dict):
            # Merge one level deeper than the mapping itself: guidance.pag.layers may change, the scale stay.
            for inner, change in value.items():
                old = result[key].get(inner)
                result[key][inner] = {**old, **change} if isinstance(old, dict) and isinstance(change, dict) else change
        else:
            result[key] = value
    return result


def method_of(chosen: Mapping[str, Any]) -> Method:
    """What `settings` says as the record that a Restorer runs. Raises RestoreError for a guidance that is none."""
    return Method.from_config({**chosen, "guidance": chosen["guidance"] or None})


def pairs(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every (task, method) that runs, in order."""
    return [
        (task, method)
        for task in config["tasks"]
        for method, entry in config["methods"].items()
        if entry["only"] is None or task in entry["only"]
    ]


def result_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides the bytes of the results, without words for the reader."""
    kept = {key: copy.deepcopy(config[key]) for key in RESULT_KEYS}
    for entry in (*kept["tasks"].values(), *kept["methods"].values()):
        for words in ("title", "family_title", "note"):
            entry.pop(words, None)
    return kept


def _check(config: dict[str, Any]) -> None:
    kind = config["kind"]
    check_known([kind], KINDS, "there is no kind of benchmark")
    check_known([config["engine"]], ("local", "ray"), "there is no engine")
    check_known([config["data"]["name"]], KNOWN_SETS, "there is no data set named")
    for key in ("batch", "samples"):
        if config[key] < 1:
            raise RestoreError(f"{key}={config[key]} must be a whole number of 1 or more")
    if config["seed"] < 0:
        raise RestoreError(f"seed={config['seed']} must be a whole number of 0 or more")
    if kind == "restoration" and config["data"]["folder"] is None:
        raise RestoreError("the configuration leaves data.folder open; give data.folder=FOLDER")
    for name, task in config["tasks"].items():
        if kind == "restoration":
            if not isinstance(task["operator"], dict) or not task["operator"]:
                raise RestoreError(f"tasks.{name} lacks its operator, such as {{name: super_resolution, factor: 8}}")
            with _at(f"tasks.{name}"):
                factory.find_operator(task["operator"].get("name"))
                check_known([task["resample"]], ("bicubic", "nearest"), "there is no resampling")
        elif not task["count"]:
            raise RestoreError(f"tasks.{name} lacks count, the number of images to make")
        elif kind == "generation" and task["prompts"]:
            raise RestoreError(f"tasks.{name}.prompts are for kind=text_to_image")
    for name, entry in config["methods"].items():
        for task in [*(entry["only"] or []), *entry["per_task"]]:
            check_known([task], config["tasks"], f"methods.{name} names the task")
        for task in config["tasks"]:
            with _at(f"methods.{name}.per_task.{task}"):
                changes = entry["per_task"].get(task) or {}
                check_known(changes, ("steps", "guidance", "parameters"), "a task cannot change")
            with _at(f"methods.{name}"):
                _check_method(settings(config, name, task), kind)
    table.select_metrics(config["metrics"]["names"])


def _check_method(chosen: dict[str, Any], kind: str) -> None:
    found = chosen["sampler"]
    if kind != "restoration":
        check_known([found], KINDS[kind], "there is no sampler")
        check_known(chosen["parameters"], KINDS[kind][found], f"{found} has no parameter")
    else:
        lookup(found, KINDS[kind], "sampler")
    if found not in BASELINES and chosen["steps"] is None:
        raise RestoreError("lacks steps: a benchmark states them, presets may change")
    method = method_of(chosen)
    if kind == "restoration" and found not in BASELINES:
        samplers.check_parameters(found, method.parameters)


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Says where in the configuration a mistake was found."""
    try:
        yield
    except RestoreError as error:
        raise RestoreError(f"{place}: {error}") from error
