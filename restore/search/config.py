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
from operators.naming import check_known, lookup
from restore import guidance as guidances
from restore.backbones.base import AttentionLayer
from restore.bench.batches import load_images, read_prompts
from restore.bench.datasets import ImageSet
from restore.bench.schema import Benchmark, Data
from restore.config import fill, read_config
from restore.guidance.options import named
from restore.search.objective import Objective

Head = tuple[str, int]  # (layer, head)


@dataclass
class Images(Data):
    """One half of the images. Of a restoration: a benchmark's `data`. Else how many to make of each task or prompt
    (`count`) and the file of prompts; the halves have different seeds."""

    count: int | None = None
    prompts: str | None = None


@dataclass
class Search:
    """What a file of configs/search holds beside a benchmark's keys, of which it has all but `data` and `methods`.

    method: a benchmark's method without guidance. guidance: as restore.guidance.build takes it, with one term whose
    `layers` are left out: those are searched. objective: see restore.search.objective; clip: the folder or hub id of
    the model of clip_score or pick_score, None: the published one. layers: search among the heads of
    these; None: of all. rounds: R; top: k heads taken in each. halving: see restore.search.heads.
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
    halving: bool = False
    calibration: Images = field(default_factory=Images)
    test: Images = field(default_factory=Images)


OWN = tuple(item.name for item in fields(Search))
# What may change between two sessions of one search; the benchmarks watch over what decides their bytes.
CIRCUMSTANCES = ("out", "title", "source", "notes", "engine", "workers", "worker", "device", "offline", "report")


def load_config(config: str | os.PathLike | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A checked configuration as plain containers: the keys of Search, and `rest`, those of the benchmarks.

    config: a YAML file, the name of one in configs/search, or a mapping. Raises RestoreError as a benchmark's does.
    """
    plain = read_config(config, overrides, "search")
    known = {item.name for item in fields(Benchmark)} - {"data", "methods"}
    check_known(plain, sorted(known | set(OWN)), "the configuration of a search has no key")
    own = {key: value for key, value in plain.items() if key in OWN and value is not None}
    search = fill(Search, own)
    search["rest"] = {key: value for key, value in plain.items() if key not in OWN}
    for key in ("rounds", "top"):
        if search[key] < 1:
            raise RestoreError(f"{key}={search[key]} must be a whole number of 1 or more")
    for key in ("guidance", "title", "sweep"):
        if key in search["method"]:
            raise RestoreError(f"the method of a search has no {key}; its guidance stands beside it")
    searched_term(search["guidance"])
    objective = Objective.build(search["objective"], plain.get("kind", "restoration"), search["clip"])
    if search["halving"] and objective.of_sets:
        name = objective.of_sets[0]
        raise RestoreError(f"halving ranks on some of the images, but {name} is of all of them; leave one of both out")
    return search


def searched_term(config: Any) -> tuple[list[dict[str, Any]], int]:
    """The terms of a guidance as a list of mappings, and the number of the one whose layers are searched.

    Raises RestoreError unless exactly one term takes `layers` and leaves them out.
    """
    terms = [{k: v} for k, v in config.items()] if isinstance(config, Mapping) and "name" not in config else config
    terms = [terms] if isinstance(terms, Mapping) else terms or []
    if not isinstance(terms, list) or not all(isinstance(entry, (Mapping, str)) for entry in terms):
        raise RestoreError(f"the guidance of a search is a mapping or a list of terms, not {config!r}")
    terms = copy.deepcopy(terms)
    free = []
    for i, entry in enumerate(terms):
        if list(entry) == ["combine"]:
            continue
        name, options = named(entry, "guidance term")
        takes = inspect.signature(lookup(name, guidances.BRANCHES, "guidance")).parameters
        if "layers" in takes and not {"layers", "heads"} & set(options):
            free.append(i)
    if len(free) != 1:
        raise RestoreError(
            f"{len(free)} terms of the guidance leave their layers open; a search is about one, such as"
            " {pag: {scale: 1.0}}"
        )
    return terms, free[0]


def guidance_on(config: Any, chosen: Sequence[Head] | Sequence[str]) -> list[dict[str, Any]]:
    """The guidance with `chosen` as the layers of its searched term: heads, or names of whole layers."""
    terms, i = searched_term(config)
    name, options = named(terms[i], "guidance term")
    terms[i] = {name: {**options, "layers": spelled(chosen)}}
    return terms


def spelled(chosen: Sequence[Head] | Sequence[str]) -> list[str]:
    """[("i5", 0), ("m1", 2), ("i5", 3)] -> ["i5:0,3", "m1:2"]; names of layers as they are."""
    layers: dict[str, list[int]] = {}
    for item in chosen:
        if isinstance(item, str):
            layers[item] = []
        else:
            layers.setdefault(item[0], []).append(item[1])
    return [name + (":" + ",".join(map(str, sorted(of))) if of else "") for name, of in layers.items()]


def all_heads(attention: Mapping[str, AttentionLayer], layers: Sequence[str] | None = None) -> list[Head]:
    """Every (layer, head) in order of execution, of all layers or those named, each layer under its shortest name."""
    wanted = guidances.resolve(layers, attention) if layers is not None else list(attention.values())
    short = [layer.short for layer in attention.values()]
    if not wanted:
        raise RestoreError("this backbone has no self-attention layer to search")
    return [
        (layer.short if layer.short and short.count(layer.short) == 1 else layer.path, head)
        for layer in wanted
        for head in range(layer.heads)
    ]


def benchmark(
    search: Mapping[str, Any], part: str, methods: Mapping[str, Any], metrics: Sequence[str], out: Any
) -> dict[str, Any]:
    """The configuration, not yet checked, of a benchmark on one half of the images, "calibration" or "test".

    methods: name to guidance and title. metrics: the names of those to measure.
    """
    rest, images = copy.deepcopy(dict(search["rest"])), dict(search[part])
    count, prompts = images.pop("count"), images.pop("prompts")
    if rest.get("kind", "restoration") == "restoration":
        rest["data"] = images
        if images["folder"] is None:
            raise RestoreError(f"the configuration leaves {part}.folder open; give {part}.folder=FOLDER")
    else:
        rest["seed"] = rest.get("seed", 0) + (part == "test")
        tasks = rest.get("tasks") or {}
        rest["tasks"] = {name: {**(task or {}), "count": count, "prompts": prompts} for name, task in tasks.items()}
    entries = {name: {**search["method"], **entry} for name, entry in methods.items()}
    names = {"name": f"{search['name']}-{part}", "out": str(out), "methods": entries}
    rest["metrics"] = {**(rest.get("metrics") or {}), "names": list(metrics)}
    return {**rest, **names}


def _digest(images: ImageSet, i: int) -> bytes:
    return hashlib.sha256(images.pixels(i).tobytes()).digest()


def check_halves(calibration: Mapping[str, Any], test: Mapping[str, Any]) -> dict[str, ImageSet | None]:
    """The images of both halves. Raises RestoreError when they share one: pixel for pixel at the size at which they
    are used, whatever the files are called; or a prompt."""
    sets = {"calibration": load_images(calibration), "test": load_images(test)}
    if sets["test"] is not None:
        mine, others = ({_digest(part, i): key for i, key in enumerate(part.ids)} for part in sets.values())
        both = [(mine[digest], key) for digest, key in others.items() if digest in mine]
        if both:
            a, b = both[0]
            raise RestoreError(
                f"calibration and test share {len(both)} of their images, such as {a} and {b}: a set chosen on images"
                " says nothing about them; give other images to test"
            )
    for name, task in calibration["tasks"].items():
        prompts = [set(read_prompts(t["prompts"])) if t["prompts"] else set() for t in (task, test["tasks"][name])]
        if shared := sorted(prompts[0] & prompts[1]):
            raise RestoreError(f"calibration and test share {len(shared)} prompts, such as '{shared[0]}'; give others")
    return sets
