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
from typing import Any, ClassVar

import yaml

from operators import RestoreError
from restore import disk
from restore.config import read_yaml
from restore.guidance.config import require_known_names
from restore.search.config import Head, format_heads, load_search, set_layers
from restore.search.hunt import HeadSearch, Progress
from restore.zoo.sharing import Shared, write_card

TABLE, GUIDANCE = "search.json", "guidance.yaml"


@dataclass
class SearchResult(Shared):
    """The result of a search. folder: of the search. heads: the best set, in the order in which they were taken.

    guidance: as in restore.guidance.build_guidance. table: the content of search.json, on which the report is based.
    `result.push_to_hub("owner/name")` and `SearchResult.from_pretrained("owner/name")`, which reads a search's folder,
    too, share search.json and guidance.yaml; the latter may name what is restore's, never code to import.
    """

    shared_files: ClassVar[Sequence[str]] = (TABLE, GUIDANCE)

    folder: Path
    heads: list[Head]
    guidance: list[dict[str, Any]]
    table: dict[str, Any]

    def _save_pretrained(self, save_directory: Path) -> None:
        require_known_names(self.guidance)
        disk.write_json(save_directory / TABLE, self.table)
        write_guidance(save_directory / GUIDANCE, self.guidance, self.table)
        write_card(save_directory / "README.md", describe_heads(self.table))

    @classmethod
    def _read_folder(cls, folder: Path) -> SearchResult:
        table, guidance = disk.read_json(folder / TABLE, required=True), read_yaml(folder / GUIDANCE, "guidance")
        require_known_names(guidance)
        try:
            heads = [(str(layer), int(head)) for part in table["rounds"] for layer, head in part["chosen"]]
            return cls(folder, heads[: table["best"]["size"]], guidance, table)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RestoreError(f"{folder / TABLE} must be of a finished search, got one without {error}") from error


def describe_heads(table: Mapping[str, Any]) -> str:
    """Return the model card of a head set."""
    best, none, tried = table["best"], table["none"]["cost"], len(table["rounds"][0]["ranking"])
    point = min(table["curve"], key=lambda point: (point["cost"], point["size"]))
    costs = f"{point['cost']:.5g} with them, {none:.5g} without"
    return f"""# Attention heads: {table["name"]}

{" ".join(best["heads"])}, scale {best["scale"]:g}: {best["size"]} of {tried} heads, found by greedy search
(HeadHunter, arXiv 2506.10978) for {table["objective"]}: {costs}, on the calibration
images, on which the choice is too good by construction. search.json compares it with others on further images.

```python
import restore
from restore.search import SearchResult

guidance = restore.guidance.build_guidance(SearchResult.from_pretrained("OWNER/NAME").guidance)  # this repository's
```
"""


def write_guidance(path: Path, guidance: Sequence[Mapping[str, Any]], table: Mapping[str, Any]) -> None:
    """Write the guidance of a search's heads as YAML, with a comment on what it was chosen for."""
    point = min(table["curve"], key=lambda point: (point["cost"], point["size"]))
    comment = f"# {table['name']}: chosen on the calibration images by {table['objective']}, {point['cost']:.5g}"
    comment += f" with it, {table['none']['cost']:.5g} without\n"
    disk.write_bytes(path, (comment + yaml.safe_dump(guidance, sort_keys=False)).encode())


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
    disk.write_json(search.folder / TABLE, table)
    guidance = set_layers(search.config["guidance"], chosen, best["scale"])
    write_guidance(search.folder / GUIDANCE, guidance, table)
    table = json.loads(json.dumps(table))
    write_search_report(search.folder, table, search.config)
    return SearchResult(search.folder, chosen, guidance, table)
