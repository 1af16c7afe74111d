"""The configuration of a search, and the benchmarks that it consists of."""

from __future__ import annotations

import copy
import hashlib
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING

from operators import RestoreError
from operators.naming import AUTO, check_known, lookup
from restore import guidance as guidances
from restore.backbones.base import AttentionLayer
from restore.bench.batches import load_images, read_prompts
from restore.bench.datasets import ImageSet
from restore.bench.schema import Benchmark, Data
from restore.config import fill_defaults, read_config
from restore.guidance.config import list_entries
from restore.guidance.options import parse_spec
from restore.search.objective import Objective

Head = tuple[str, int]  # (layer, head)
CFG = 4.0  # w: diffusers' guidance_scale of 5


@dataclass
class ImageHalf(Data):
    """The images of calibration or test. In restoration a benchmark's `data`; in generation the number to generate
    for each task (`count`, by default one for each prompt) and the prompts, a file or a set of data/prompts; the halves
    have different seeds."""

    count: int | None = None
    prompts: str | None = None


@dataclass
class Figure:
    """One sheet of a gallery. prompt: None: the first of calibration. layers: its rows. heads: those shown singly and
    in pairs. top: heads that are taken together as the best of a layer."""

    prompt: str | None = None
    seed: int = 0
    layers: list[str] | None = None
    heads: list[str] | None = None
    top: int = 5


@dataclass
class Gallery:
    """Every head; heads against their layer; heads and pairs of them. See restore.search.gallery."""

    heads: Figure = field(default_factory=Figure)
    layers: Figure = field(default_factory=Figure)
    pairs: Figure = field(default_factory=Figure)


@dataclass
class Search:
    """The keys of a search, beside those of a benchmark except `data` and `methods`.

    method: a benchmark's method without guidance. guidance: as in restore.guidance.build_guidance, with one term whose
    `layers` are left out: those are searched, at its scale. objective: see restore.search.objective; clip: folder or
    hub id in place of every CLIP model of metrics.models. layers: layers whose heads are searched; None: all. rounds:
    R; top: k heads taken in each. sizes: of the sets that are compared; None: 1, 2, 4, ... and those at the ends of
    rounds. scales: at which they are compared, with the best layer of each; None: the guidance's. cfg: w of the rows
    with classifier-free guidance in the test; None: CFG; 0: no such rows. halving: see restore.search.heads. gallery:
    see restore.search.gallery.
    """

    name: str = MISSING
    out: str | None = None
    method: dict[str, Any] = field(default_factory=dict)
    guidance: Any = None
    objective: Any = "lpips"
    clip: str | None = None
    layers: list[str] | None = None
    rounds: int = 1
    top: int = 1
    sizes: list[int] | None = None
    scales: list[float] | None = None
    cfg: float | None = None
    halving: bool = False
    gallery: Gallery = field(default_factory=Gallery)
    calibration: ImageHalf = field(default_factory=ImageHalf)
    test: ImageHalf = field(default_factory=ImageHalf)


# What may change when a search is continued; the benchmarks check what decides their results.
CIRCUMSTANCES = (
    "out",
    "gallery",
    "title",
    "source",
    "notes",
    "engine",
    "workers",
    "worker",
    "device",
    "offline",
    "report",
)


def load_search(
    config: str | os.PathLike | Mapping[str, Any], overrides: Sequence[str] = (), placeholder: str | None = None
) -> dict[str, Any]:
    """Return a checked configuration as plain containers: the keys of Search, and `rest`, those of the benchmarks.

    config: a YAML file, the name of one in configs/search, or a mapping. placeholder: in place of values left open.
    Raises RestoreError as a benchmark's does.
    """
    plain = read_config(config, overrides, "search", placeholder=placeholder)
    own_keys = [item.name for item in fields(Search)]
    known = {item.name for item in fields(Benchmark)} - {"data", "methods"}
    check_known(plain, sorted(known | set(own_keys)), "the configuration of a search has no key")
    search = fill_defaults(Search, {k: v for k, v in plain.items() if k in own_keys and v is not None})
    search["rest"] = {key: value for key, value in plain.items() if key not in own_keys}
    if search["rest"].get("batch") == AUTO:  # its runs choose by their first batches
        raise RestoreError(f"batch must be a whole number in a search, got {AUTO}")
    if search["clip"]:
        metrics = search["rest"].get("metrics") or {}
        models = {name: search["clip"] for name in ("clip_l", "clip_h", "pick_score")}
        search["rest"]["metrics"] = {**metrics, "models": models | (metrics.get("models") or {})}
    for key in ("rounds", "top"):
        if search[key] < 1:
            raise RestoreError(f"{key} must be a whole number of 1 or more, got {key}={search[key]}")
    total = search["rounds"] * search["top"]
    if search["sizes"] is not None and not all(1 <= size <= total for size in search["sizes"] or [0]):
        raise RestoreError(f"sizes must be numbers from 1 to rounds x top = {total}, got {search['sizes']}")
    if search["scales"] is not None and (not search["scales"] or len(set(search["scales"])) < len(search["scales"])):
        raise RestoreError(f"scales must be different numbers, got {search['scales']}")
    if (search["cfg"] or 0) < 0:
        raise RestoreError(f"cfg must be 0 or more, got cfg={search['cfg']}")
    for key in ("guidance", "title", "sweep"):
        if key in search["method"]:
            raise RestoreError(f"the method of a search must have no {key}; give the guidance beside it")
    if (kind := plain.get("kind", "restoration")) != "restoration":
        for name, task in (plain.get("tasks") or {}).items():
            for key in ("count", "prompts"):
                if (task or {}).get(key) is not None:
                    raise RestoreError(
                        f"tasks.{name}.{key} must be left out in a search; give calibration.{key} and test.{key}"
                    )
    get_scale(search["guidance"])
    objective = Objective.from_config(search["objective"], kind)
    if search["halving"] and objective.set_metrics:
        name = objective.set_metrics[0]
        raise RestoreError(f"halving ranks on part of the images, but {name} needs all of them; leave one of both out")
    return search


def find_open_term(config: Any) -> tuple[list[dict[str, Any]], int]:
    """Return the terms of a guidance as a list of mappings, and the index of the one whose layers are searched.

    Raises RestoreError unless exactly one term takes `layers` and leaves them out.
    """
    terms, open_terms = list_entries(config), []
    for i, entry in enumerate(terms):
        if isinstance(entry, Mapping) and list(entry) == ["combine"]:
            continue
        name, options = parse_spec(entry, "guidance term")
        accepted = inspect.signature(lookup(name, guidances.TERMS, "guidance")).parameters
        if "layers" in accepted and not {"layers", "heads"} & set(options):
            open_terms.append(i)
    if len(open_terms) != 1:
        raise RestoreError(
            f"exactly one term of the guidance must leave its layers open, got {len(open_terms)} terms; give, for"
            " example, {pag: {scale: 1.0}}"
        )
    return copy.deepcopy(terms), open_terms[0]


def get_scale(config: Any) -> float:
    """Return the scale of the open term. Raises RestoreError as find_open_term, and if it has none."""
    terms, i = find_open_term(config)
    scale = parse_spec(terms[i], "guidance term")[1].get("scale")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise RestoreError(f"the guidance of a search must have a scale, got {scale!r}; try {{pag: {{scale: 1.0}}}}")
    return float(scale)


def set_layers(config: Any, layers: Sequence[Head] | Sequence[str], scale: float | None = None) -> list[dict[str, Any]]:
    """Return the guidance with `layers`, heads or names of whole layers, as the layers of its open term.

    scale: in place of that term's.
    """
    terms, i = find_open_term(config)
    name, options = parse_spec(terms[i], "guidance term")
    changes = {} if scale is None or scale == options.get("scale") else {"scale": scale}
    terms[i] = {name: {**options, **changes, "layers": format_heads(layers)}}
    return terms


def split_cfg(config: Any) -> tuple[list[dict[str, Any]], bool]:
    """Return the guidance without its open term, and whether that has classifier-free guidance."""
    terms, i = find_open_term(config)
    rest = terms[:i] + terms[i + 1 :]
    names = [parse_spec(term, "guidance term")[0] for term in rest if list(term) != ["combine"]]
    return rest, "cfg" in names


def format_heads(heads: Sequence[Head] | Sequence[str]) -> list[str]:
    """[("i5", 0), ("m1", 2), ("i5", 3)] -> ["i5:0,3", "m1:2"]; names of layers as they are."""
    layers: dict[str, list[int]] = {}
    for item in heads:
        name, *head = [item] if isinstance(item, str) else item
        layers.setdefault(name, []).extend(head)
    return [name + (":" + ",".join(map(str, sorted(of))) if of else "") for name, of in layers.items()]


def list_heads(attention: Mapping[str, AttentionLayer], layers: Sequence[str] | None = None) -> list[Head]:
    """Return every (layer, head) in order of execution, of all layers or those named, under the shortest names."""
    selected = guidances.resolve_layers(layers, attention) if layers is not None else list(attention.values())
    short = [layer.short for layer in attention.values()]
    if not selected:
        raise RestoreError("this backbone has no self-attention layer to search")
    return [
        (layer.short if layer.short and short.count(layer.short) == 1 else layer.path, head)
        for layer in selected
        for head in range(layer.heads)
    ]


def build_benchmark(
    search: Mapping[str, Any], half: str, methods: Mapping[str, Any], metrics: Sequence[str], out: Any
) -> dict[str, Any]:
    """Return the unchecked configuration of a benchmark on one half of the images, "calibration" or "test".

    methods: name to guidance and title. metrics: names of those to measure.
    """
    config, images = copy.deepcopy(dict(search["rest"])), dict(search[half])
    count, prompts = images.pop("count"), images.pop("prompts")
    if prompts and count is None:
        count = len(read_prompts(prompts))
    if config.get("kind", "restoration") == "restoration":
        config["data"] = images
        if images["folder"] is None:
            raise RestoreError(f"the configuration leaves {half}.folder open; give {half}.folder=FOLDER")
    else:
        config["seed"] = config.get("seed", 0) + (half == "test")
        tasks = config.get("tasks") or {}
        config["tasks"] = {name: {**(task or {}), "count": count, "prompts": prompts} for name, task in tasks.items()}
    entries = {name: {**search["method"], **entry} for name, entry in methods.items()}
    config["metrics"] = {**(config.get("metrics") or {}), "names": list(metrics)}
    return {**config, "name": f"{search['name']}-{half}", "out": str(out), "methods": entries}


def load_halves(calibration: Mapping[str, Any], test: Mapping[str, Any]) -> dict[str, ImageSet | None]:
    """Load the images of both halves, None in generation.

    Raises RestoreError if the halves share a prompt or an image: pixel for pixel at the size at which they are used,
    independent of file names.
    """
    images = {"calibration": load_images(calibration), "test": load_images(test)}
    if images["test"] is not None:
        ours, theirs = (
            {hashlib.sha256(half.pixels(i).tobytes()).digest(): name for i, name in enumerate(half.ids)}
            for half in images.values()
        )
        shared = [(ours[digest], name) for digest, name in theirs.items() if digest in ours]
        if shared:
            raise RestoreError(
                f"calibration and test must have different images, but share {len(shared)} of their images, such as"
                f" {shared[0][0]} and {shared[0][1]}; give other images to test"
            )
    for name, task in calibration["tasks"].items():
        files = [task["prompts"], test["tasks"][name]["prompts"]]
        if all(files) and (both := sorted(set(read_prompts(files[0])) & set(read_prompts(files[1])))):
            raise RestoreError(
                f"calibration and test must have different prompts, but share {len(both)}, such as '{both[0]}'"
            )
    return images
