"""HeadHunter: greedy search for the attention heads to perturb (Algorithm 1 of arXiv 2506.10978), for any objective.

    S = {};  R times:  score(h) = mean over images and tasks of the objective of results guided on S + {h}, for all h;
                       S = S + the k best

Every round is a benchmark (restore.bench) in a folder of its own, and every candidate one of its methods, so that
results, resuming and clusters work as there. The images of the search (`calibration`) and those of the final numbers
(`test`) are never the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from restore import disk
from restore.search.config import Head, format_heads, load_search, set_layers
from restore.search.hunt import HeadSearch, Progress


@dataclass
class SearchResult:
    """The result of a search. folder: of the search. heads: the best set, in the order in which they were taken.

    guidance: as in restore.guidance.build_guidance. table: the content of search.json, on which the report is based.
    """

    folder: Path
    heads: list[Head]
    guidance: list[dict[str, Any]]
    table: dict[str, Any]


def search_heads(
    config: str | os.PathLike | Mapping[str, Any], overrides: Sequence[str] = (), *, progress: Progress | None = None
) -> SearchResult:
    """Run or continue a search, and write search.json, guidance.yaml, report.html and report.md.

    config, overrides: see restore.search.config; everything is in config.out, runs/<name> by default.
    halving: successive halving (Jamieson & Talwalkar 2016) within a round: all candidates on the first batch of
        images, the better half on twice as many, and so on; the report lists what was skipped.
    progress: called with a benchmark's progress and {phase}.
    Raises RestoreError before anything runs for invalid configurations, images in both halves, and a folder with
    another search.
    """
    from restore.search.pages import write_search_report

    search = HeadSearch(load_search(config, overrides), progress)
    search.claim_folder()
    heads, rounds = [], []
    for number in range(1, search.config["rounds"] + 1):
        rounds.append(search.run_round(number, heads))
        heads += [tuple(head) for head in rounds[-1]["chosen"]]
    curve = search.run_curve(heads)
    point = min(curve, key=lambda point: (point["cost"], point["size"]))
    chosen = heads[: point["size"]]
    layers = {}
    for scale in search.scales:
        at_scale = [entry for entry in rounds[0]["layers"] if entry["scale"] == scale]
        layers[scale] = min(at_scale, key=lambda entry: entry["cost"])["name"]
    best = {"size": point["size"], "scale": point["scale"], "heads": format_heads(chosen), "layers": layers}
    table = {
        "name": search.config["name"],
        "objective": str(search.objective),
        "pool": search.pool,
        "none": rounds[0]["none"],
        "rounds": rounds,
        "curve": curve,
        "best": {**best, "layer": layers[best["scale"]], "layers": [list(item) for item in layers.items()]},
        "scale": search.scale,
        "scales": search.scales,
        "images": {half: search.describe_images(half) for half in search.halves},
        "test": search.run_test(search.make_tests(heads, curve, best)),
    }
    disk.write_json(search.folder / "search.json", table)
    guidance = set_layers(search.config["guidance"], chosen, best["scale"])
    comment = f"# {table['name']}: chosen on the calibration images by {table['objective']}, {point['cost']:.5g}"
    comment += f" with it, {table['none']['cost']:.5g} without\n"
    disk.write_bytes(search.folder / "guidance.yaml", (comment + yaml.safe_dump(guidance, sort_keys=False)).encode())
    table = json.loads(json.dumps(table))
    write_search_report(search.folder, table, search.config)
    return SearchResult(search.folder, chosen, guidance, table)
