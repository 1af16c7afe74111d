"""The configuration of a benchmark: checked, completed, its sweeps expanded into methods."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from numbers import Integral
from typing import Any

from omegaconf import OmegaConf

from operators import RestoreError, factory
from operators.naming import AUTO, check_known, lookup
from restore import samplers
from restore.backbones.graphs import MODES
from restore.backbones.text_to_image import PipelineOptions
from restore.batch import check_sharing
from restore.bench.baselines import BASELINES
from restore.bench.datasets import KNOWN_SETS
from restore.bench.schema import Benchmark
from restore.config import fill_defaults, read_config
from restore.disk import require_file_names
from restore.method import Method
from restore.metrics import table
from restore.task import read_task

# Each kind of benchmark with its samplers (a restoration also takes "module:function"), and their parameters.
KINDS = {
    "restoration": {**samplers.SAMPLERS, **BASELINES},
    "generation": {"ddpm": (), "ddim": ("eta",)},  # restore.samplers.generate
    "text_to_image": {"pipeline": ()},  # an unmodified diffusers pipeline
}
# What decides the bytes of a result; the rest may change when a run is continued.
RESULT_KEYS = ("kind", "backbone", "precision", "seed", "samples", "batch", "data", "tasks", "methods", "threads")

SWEEPABLE = ("guidance", "parameters", "steps")


def load_config(
    config: str | os.PathLike | Mapping[str, Any], overrides: Sequence[str] = (), placeholder: str | None = None
) -> dict[str, Any]:
    """Return a complete configuration as plain containers, with sweeps expanded into methods.

    config: a YAML file, the name of a shipped one (table8-ffhq) or a mapping. overrides: `key=value` with dots
    between levels, as on the command line. placeholder: in place of values left open (`???`).
    Raises RestoreError for unknown keys (with the nearest known one), values of another type, missing values and
    methods that cannot run.
    """
    complete = fill_defaults(
        Benchmark, _normalize(read_config(config, overrides, "benchmark", placeholder=placeholder))
    )
    complete["methods"] = dict(_expand_sweeps(complete["methods"]))
    _check(complete)
    return complete


def list_cells(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every (task, method) that runs, in order."""
    cells = [(task, method) for task in config["tasks"] for method in config["methods"]]
    only = {method: entry["only"] for method, entry in config["methods"].items()}
    return [(task, method) for task, method in cells if only[method] is None or task in only[method]]


def build_method(config: Mapping[str, Any], task: str, method: str) -> Method:
    """Return the Method of a cell as it is configured, with the changes of `per_task`; its sampler may be a baseline.

    Raises RestoreError for an invalid guidance.
    """
    entry = config["methods"][method]
    merged = {key: copy.deepcopy(entry[key]) for key in ("sampler", "steps", "guidance", "parameters")}
    # Nested mappings merge: guidance.pag.layers may change while the scale stays. Lists are replaced.
    return Method.from_config(_merge(merged, entry["per_task"].get(task) or {}, depth=3))


def select_result_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that decides the bytes of the results, without words for the reader."""
    selected = {key: copy.deepcopy(config[key]) for key in RESULT_KEYS}
    # Where a pipeline lies decides no result. Left out if nothing is set, so that older runs can be continued.
    places = ("device_map", "offload")
    if options := {key: value for key, value in config["pipeline"].items() if value and key not in places}:
        selected["pipeline"] = options
    selected |= {"model_options": options} if (options := config["model_options"]) else {}
    for entry in (*selected["tasks"].values(), *selected["methods"].values()):
        if not entry.get("model_options"):
            entry.pop("model_options", None)
        for words in ("title", "family_title", "note"):
            entry.pop(words, None)
    return selected


def _merge(old: Any, new: Any, depth: int) -> Any:
    if depth == 0 or not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merge(old.get(key), value, depth - 1) for key, value in new.items()}


def _normalize(given: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out keys without a value, replace names of tasks by their operators, and check what must be a mapping."""
    sections = {f.name: f.default_factory() for f in fields(Benchmark) if f.default_factory is not MISSING}
    result = {str(key): value for key, value in given.items() if value is not None}
    for key, section in sections.items():
        value = result.get(key, {} if key in ("tasks", "methods") else None)
        if isinstance(section, list) and not isinstance(value, (list, type(None))):
            raise RestoreError(f"{key} must be a list, got {value!r}")
        if value is None or isinstance(section, list):
            continue
        if not isinstance(value, dict) or (key in ("tasks", "methods") and not value):
            raise RestoreError(f"{key} must be a mapping, got {value!r}" if value else f"the configuration lacks {key}")
        if key == "model_options":
            continue
        if is_dataclass(section):
            result[key] = _drop_nothing(value)
            continue
        for name, entry in value.items():
            entry = {"operator": entry} if key == "tasks" and isinstance(entry, str) else entry or {}
            if not isinstance(entry, dict):
                raise RestoreError(f"{key}.{name} must be a mapping, got {entry!r}")
            value[name] = entry = _drop_nothing(entry)
            if isinstance(entry.get("operator"), str):
                entry["operator"] = read_task(entry["operator"])
        result[key] = {str(name): entry for name, entry in value.items()}
    return result


def _drop_nothing(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}


def _expand_sweeps(methods: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """`sweep: {guidance.pag.scale: [1, 2]}` of method pag becomes methods pag_scale=1 and pag_scale=2."""
    for name, method in methods.items():
        sweep = method.pop("sweep")
        variants = [(name, method | {"family": name, "family_title": method["title"] or name, "swept": {}})]
        for dotted, values in sweep.items():
            if not isinstance(values, list) or not values:
                raise RestoreError(f"methods.{name}.sweep.{dotted} must be a list of values, got {values!r}")
            if dotted.split(".")[0] not in SWEEPABLE:
                raise RestoreError(f"methods.{name}.sweep must vary guidance, parameters or steps, got {dotted}")
            last = dotted.rsplit(".", 1)[-1]
            following = []
            for (key, variant), value in ((v, value) for v in variants for value in values):
                words = "+".join(map(str, value)) if isinstance(value, list) else str(value)
                words = words.replace(":", "-")  # it becomes a folder's name
                sections = OmegaConf.create({section: variant[section] for section in SWEEPABLE})
                OmegaConf.update(sections, dotted, value, merge=False)  # a list's entry by number: guidance.0.pag.scale
                variant = copy.deepcopy(variant) | OmegaConf.to_container(sections)
                variant["swept"] |= {last: value}
                if variant["title"]:
                    variant["title"] += f", {last} {words}"
                following.append((f"{key}_{last}={words}", variant))
            variants = following
        yield from variants


def _check(config: dict[str, Any]) -> None:
    kind = config["kind"]
    require_file_names([config["name"]], "name")
    for key in ("tasks", "methods"):
        require_file_names(config[key], key)
    check_known([kind], KINDS, "there is no kind of benchmark")
    check_known([config["engine"]], ("local", "ray"), "there is no engine")
    check_known([config["compile"] or MODES[0]], MODES, "there is no mode of compile")
    check_known([config["data"]["name"]], KNOWN_SETS, "there is no data set named")
    for key, least in (("samples", 1), ("seed", 0)):
        if config[key] < least:
            raise RestoreError(f"{key}={config[key]} must be a whole number of {least} or more")
    is_size = isinstance(config["batch"], Integral) and not isinstance(config["batch"], bool) and config["batch"] >= 1
    if not is_size and (config["batch"] != AUTO or kind != "restoration"):
        known = f", or {AUTO}" if kind == "restoration" else f" for kind={kind}"
        raise RestoreError(f"batch={config['batch']} must be a whole number of 1 or more{known}")
    if kind == "restoration" and config["data"]["folder"] is None:
        raise RestoreError("the configuration leaves data.folder open; give data.folder=FOLDER")
    for name, task in config["tasks"].items():
        with locate_errors(f"tasks.{name}"):
            _check_task(task, kind)
            check_sharing(task["operator"], task["per_image"], 1 if config["batch"] == AUTO else config["batch"])
    for name, entry in config["methods"].items():
        for task in [*(entry["only"] or []), *entry["per_task"]]:
            check_known([task], config["tasks"], f"methods.{name} names the task")
        for task in config["tasks"]:
            with locate_errors(f"methods.{name}.per_task.{task}"):
                changes = entry["per_task"].get(task) or {}
                check_known(changes, ("steps", "guidance", "parameters"), "a task cannot change")
            with locate_errors(f"methods.{name}"):
                _check_method(build_method(config, task, name), kind)
    table.select_metrics(config["metrics"]["names"])
    check_known([config["report"]["layout"]], ("columns", "rows"), "report.layout has no choice")
    PipelineOptions(**config["pipeline"])


def _check_task(task: Mapping[str, Any], kind: str) -> None:
    if kind == "restoration":
        if not isinstance(task["operator"], dict) or not task["operator"]:
            raise RestoreError("operator is missing; give one such as {name: super_resolution, factor: 8}")
        factory.find_operator(task["operator"].get("name"))
        if any(factory.read_extent(task["operator"])[1]) and task["solve_at"]:
            raise RestoreError("border must be 'reflect' or 'circular' for solve_at=, got 'unknown'")
        check_known([task["resample"]], ("bicubic", "nearest"), "there is no resampling")
    elif not task["count"]:
        raise RestoreError("count, the number of images to make, is missing")
    elif task["prompt_limit"] is not None and task["prompt_limit"] < 1:
        raise RestoreError(f"prompt_limit must be a whole number from 1 on, got {task['prompt_limit']}")
    elif kind == "generation" and task["prompts"]:
        raise RestoreError("prompts need kind=text_to_image")


def _check_method(method: Method, kind: str) -> None:
    if kind != "restoration":
        check_known([method.sampler], KINDS[kind], "there is no sampler")
        check_known(method.parameters, KINDS[kind][method.sampler], f"{method.sampler} has no parameter")
    else:
        lookup(method.sampler, KINDS[kind], "sampler")
    if method.sampler in BASELINES:
        return
    if method.steps is None:
        raise RestoreError("steps is missing; a benchmark states its steps, as presets may change")
    if kind == "text_to_image" and not str(method.steps).isdigit():
        raise RestoreError(f"steps must be a whole number for a pipeline, got {method.steps}")
    if kind == "restoration":
        samplers.check_parameters(method.sampler, method.parameters)


@contextmanager
def locate_errors(place: str) -> Iterator[None]:
    """Within the block, name the place in the configuration in error messages."""
    try:
        yield
    except RestoreError as error:
        raise RestoreError(f"{place}: {error}") from error
