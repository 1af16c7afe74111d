"""The configuration of a benchmark: what it may hold, what is missing, and the methods a sweep stands for."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from operators import RestoreError, factory
from restore.method import build_guidance
from restore.metrics.evaluate import split_metrics
from restore.paths import configs_dir

KINDS = ("restoration", "generation", "text_to_image")
SAMPLERS = {
    "restoration": ("dps", "psld", "baseline", "pseudo_inverse", "bicubic", "wiener"),
    "generation": ("ddpm", "ddim"),
    "text_to_image": ("pipeline",),
}
# What a benchmark must state although the sampler has presets: a preset may be corrected in a later version.
STATED = {"dps": ("zeta",), "psld": ("eta", "gamma")}
BASELINES = ("baseline", "pseudo_inverse", "bicubic", "wiener")
# Metrics beyond those of evaluate(): computed from rows, samples or costs of a run.
RUN_METRICS = ("residual_ratio", "spread", "coverage", "lpips_pairs", "iterations_per_second", "peak_memory_mb")

_OPEN = object()  # a mapping whose keys are checked by whoever receives it
_EACH = object()  # a mapping from free names to the mapping given as the second element
_REQUIRED = object()

_METHOD = {"title": None, "sampler": _REQUIRED, "steps": None, "guidance": _OPEN, "parameters": _OPEN, "only": None}
_METHOD |= {"per_task": _OPEN, "sweep": _OPEN, "note": None}
_TASK = {"title": None, "operator": _OPEN, "per_image": False, "solve_at": None, "note": None}
_TASK |= {
    "resample": "bicubic",
    "backbone": None,
    "labels": None,
    "prompts": None,
    "negative_prompt": "",
    "count": None,
}
SCHEMA: dict[str, Any] = {
    "name": _REQUIRED,
    "title": None,
    "source": None,
    "notes": [],
    "kind": "restoration",
    "out": None,
    "engine": "local",
    "workers": None,
    "worker": {"cpus": 1, "gpus": None},
    "device": "auto",
    "threads": None,
    "backbone": _REQUIRED,
    "precision": "fp32",
    "checkpointing": False,
    "offline": False,
    "seed": 0,
    "samples": 1,
    "batch": 1,
    "data": {
        "name": "folder",
        "folder": None,
        "names": None,
        "split": None,
        "size": None,
        "every": 1,
        "limit": None,
        "stretch": False,
    },
    "tasks": (_EACH, _TASK),
    "methods": (_EACH, _METHOD),
    "metrics": {
        "names": ["psnr", "ssim", "residual_ratio"],
        "lpips_net": "alex",
        "weights": _OPEN,
        "pr_network": "vgg16",
        "fid_layer": "2048",
        "allow_small": False,
        "reference": None,
        "full_reference": None,
        "group_by_prompt": False,
        "pairs": 100,
    },
    "published": {"source": None, "titles": _OPEN, "values": _OPEN, "note": None},
    "report": {"pictures": 6, "columns": None, "curve": None},
}
# What decides the bytes of a result; the rest may change between two sessions of one run.
RESULT_KEYS = ("kind", "backbone", "precision", "seed", "samples", "batch", "data", "tasks", "methods", "threads")


def load_config(config: str | os.PathLike | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A checked, complete configuration as plain containers, sweeps expanded into methods.

    config: a YAML file, the name of a shipped one (table8-ffhq) or a mapping. overrides: `key=value` with dots
    between levels, as on the command line.
    Raises RestoreError for unknown keys (with the nearest known one), missing values and methods that cannot run.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        if isinstance(config, (str, os.PathLike)):
            loaded = OmegaConf.load(_find(config))
        else:
            loaded = OmegaConf.create(copy.deepcopy(dict(config)))
        bad = [o for o in overrides if "=" not in o]
        if bad:
            raise RestoreError(f"{bad[0]} is no setting; write key=value")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise RestoreError(f"the configuration leaves {missing[0]} open; give {missing[0]}=VALUE")
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise RestoreError(f"the configuration cannot be read: {str(error).splitlines()[0]}") from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise RestoreError(f"{config} is not valid YAML: {' '.join(str(error).split())}") from error
        raise
    if not isinstance(plain, dict):
        raise RestoreError("the configuration must be a mapping of keys to values")
    complete = _complete(plain, SCHEMA, "")
    complete["methods"] = dict(_expand_sweeps(complete["methods"]))
    _check(complete)
    return complete


def _find(config: str | os.PathLike) -> Path:
    folder = configs_dir() / "benchmark"
    for path in (Path(config), folder / f"{config}.yaml"):
        if path.is_file():
            return path
    shipped = sorted(path.stem for path in folder.glob("*.yaml"))
    raise RestoreError(f"the configuration {config} does not exist; {nearest(Path(config).stem, shipped)}")


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean x?` or the list of what there is."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(map(str, known))}"


def _complete(given: Mapping[str, Any], schema: Mapping[str, Any], path: str) -> dict[str, Any]:
    for key in given:
        if key not in schema:
            raise RestoreError(f"the configuration has no key {path}{key}; {nearest(key, list(schema))}")
    result: dict[str, Any] = {}
    for key, default in schema.items():
        value, here = given.get(key), f"{path}{key}"
        if default is _REQUIRED:
            if value is None:
                raise RestoreError(f"the configuration lacks {here}")
        elif default is _OPEN:
            if value is not None and not isinstance(value, dict):
                raise RestoreError(f"{here} must be a mapping, not {value!r}")
            # An absent guidance and an empty one are the same: none.
            value = value or {}
        elif isinstance(default, tuple) and default[0] is _EACH:
            if not isinstance(value, dict) or not value:
                raise RestoreError(f"the configuration lacks {here}: a mapping from names to settings")
            for name, entry in value.items():
                if entry is not None and not isinstance(entry, dict):
                    raise RestoreError(f"{here}.{name} must be a mapping, not {entry!r}")
            value = {str(name): _complete(entry or {}, default[1], f"{here}.{name}.") for name, entry in value.items()}
        elif isinstance(default, dict):
            if value is not None and not isinstance(value, dict):
                raise RestoreError(f"{here} must be a mapping, not {value!r}")
            value = _complete(value or {}, default, f"{here}.")
        elif key not in given:
            value = copy.copy(default)
        result[key] = value
    return result


def _set(mapping: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        mapping = mapping.setdefault(parent, {})
    mapping[last] = value


def _value_name(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


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
    if kind not in KINDS:
        raise RestoreError(f"kind={kind} is unknown; {nearest(kind, KINDS)}")
    if config["engine"] not in ("local", "ray"):
        raise RestoreError(f"engine={config['engine']} is unknown; there are local and ray")
    for key in ("batch", "samples"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise RestoreError(f"{key}={config[key]} must be a whole number of 1 or more")
    if kind == "restoration" and config["data"]["folder"] is None:
        raise RestoreError("the configuration leaves data.folder open; give data.folder=FOLDER")
    for name, task in config["tasks"].items():
        if kind == "restoration" and not task["operator"]:
            raise RestoreError(f"tasks.{name} lacks its operator, such as {{name: super_resolution, factor: 8}}")
        if kind != "restoration" and not task["count"]:
            raise RestoreError(f"tasks.{name} lacks count, the number of images to make")
        if kind == "restoration":
            options = {k: v for k, v in task["operator"].items() if k != "noise"}
            known = factory.OPERATORS
            if options.get("name") not in known:
                raise RestoreError(f"tasks.{name}.operator has no known name; {nearest(options.get('name'), known)}")
    for name, method in config["methods"].items():
        known = SAMPLERS[kind]
        for task in [*(method["only"] or []), *method["per_task"]]:
            if task not in config["tasks"]:
                raise RestoreError(f"methods.{name} names task {task}; {nearest(task, list(config['tasks']))}")
        for task in config["tasks"]:
            for key in method["per_task"].get(task) or {}:
                if key not in ("steps", "guidance", "parameters"):
                    raise RestoreError(
                        f"methods.{name}.per_task.{task} can change steps, guidance, parameters, not {key}"
                    )
            chosen = settings(config, name, task)
            if chosen["sampler"] not in known:
                raise RestoreError(f"methods.{name}.sampler={chosen['sampler']}; {nearest(chosen['sampler'], known)}")
            if chosen["sampler"] not in BASELINES and chosen["steps"] is None:
                raise RestoreError(f"methods.{name} lacks steps: a benchmark states them, presets may change")
            for parameter in STATED.get(chosen["sampler"], ()):
                if parameter not in chosen["parameters"]:
                    raise RestoreError(
                        f"methods.{name} lacks parameters.{parameter} for task {task}; presets may change"
                    )
            build_guidance(chosen["guidance"])
    split_metrics([m for m in config["metrics"]["names"] if m not in RUN_METRICS])
