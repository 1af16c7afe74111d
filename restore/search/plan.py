"""The work of a search, before it runs: `restore heads CONFIG --dry-run`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from restore import zoo
from restore.bench import run as benchmarks
from restore.bench.config import load_config
from restore.bench.pull import pull_needed_models
from restore.search.config import build_benchmark, load_search, split_cfg
from restore.search.hunt import HeadSearch
from restore.search.objective import Objective


@dataclass(frozen=True)
class SearchPlan:
    """The work of a search.

    calibration: (candidate, task) pairs on the calibration images; test: (method, task) pairs on the test images;
    images: of both halves; nfe, seconds: of everything, None if not measured.
    """

    candidates: int
    calibration: int
    test: int
    images: tuple[int, int]
    nfe: int | None
    seconds: float | None


def pull_search(config: str | os.PathLike | Mapping[str, Any], overrides: Sequence[str] = ()) -> Iterator[str]:
    """Download the models that a search needs, its metrics' included; the lines are those of pull_needed_models."""
    search = load_search(config, overrides, placeholder="-")
    kind = search["rest"].get("kind", "restoration")
    names = (search["rest"].get("metrics") or {}).get("names") or []
    names = dict.fromkeys([*names, *Objective.from_config(search["objective"], kind).metrics])
    yield from pull_needed_models(load_config(build_benchmark(search, "test", {"none": {}}, list(names), "-")))


def plan_search(
    config: str | os.PathLike | Mapping[str, Any], overrides: Sequence[str] = (), *, measure: bool = True
) -> SearchPlan:
    """Return the number of evaluations of a search, without halving.

    measure: also their cost, extrapolated from two steps without guidance and with the first and the last head.
    """
    search = HeadSearch(load_search(config, overrides))
    pool, top, rounds = search.pool, search.config["top"], search.config["rounds"]
    tasks, sizes = len(search.halves["test"]["tasks"]), len(search.curve_sizes(top * rounds))
    scales, levels = len(search.scales), len({search.scale, *search.scales})
    calibration = sum(len(pool) - top * r for r in range(rounds)) + levels * len(search.layers) + 1 + scales * sizes
    cfg = 1 if split_cfg(search.config["guidance"])[1] else 2 * (search.cfg > 0)
    test = scales * (sizes + 1) + 1 + cfg
    images = search.count_images("calibration"), search.count_images("test")
    nfe = seconds = None
    if measure and zoo.locate(search.halves["test"]["backbone"]).path is not None:  # a plan fetches no weights
        methods = {"none": {"guidance": None}, "first": search.make_method(pool[:1])}
        methods["last"] = search.make_method(pool[-1:])
        metrics = ["psnr"] * bool(search.images["test"])
        benchmark = build_benchmark(search.config, "calibration", methods, metrics, search.folder / "absent")
        lines = benchmarks.plan_benchmark(benchmark)
        if all(line.seconds is not None for line in lines):
            by_method = {m: [line for line in lines if line.method == m] for m in methods}
            cost = {m: sum(line.seconds for line in of) / images[0] for m, of in by_method.items()}
            evaluations = {m: sum(line.nfe for line in of) for m, of in by_method.items()}
            guided, plain = calibration * images[0] + test * images[1], sum(images)
            nfe = evaluations["first"] * guided + evaluations["none"] * plain
            # The prefix that a guided pass shares with the plain one depends on the layer: the mean of both ends.
            seconds = (cost["first"] + cost["last"]) / 2 * guided + cost["none"] * plain
    return SearchPlan(len(pool), (calibration + 1) * tasks, (test + 1) * tasks, images, nfe, seconds)
