"""Sheets of pictures by single heads: every head, heads against their layer, heads and pairs of them.

Figures 1, 2 and 3 of HeadHunter (arXiv 2506.10978): one prompt, one seed, one cell for each set of heads. Every sheet
is a benchmark of one image in a folder of its own, so that an interrupted one continues.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw

from operators import RestoreError
from operators.naming import check_known
from restore import disk
from restore.images.folder import read_rgb
from restore.images.grids import draw_grid, fit_image
from restore.search.config import Head, build_benchmark, format_heads, list_heads, load_search
from restore.search.hunt import HeadSearch, Progress

SHEETS = ("heads", "layers", "pairs")
FRAME = (213, 0, 0)  # around the high-performing heads
DIGITS = 3


def draw_gallery(
    config: str | os.PathLike | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    sheets: Sequence[str] = SHEETS,
    cell: int = 192,
    progress: Progress | None = None,
) -> list[Path]:
    """Draw or finish sheets of a search's gallery, and return their PNG files, in gallery/ of the search's folder.

    config, overrides: of a search, whose `gallery` says prompts, seeds, layers and heads of each sheet. sheets: of
        SHEETS. cell: pixels of a picture on the sheet; the pictures themselves are in the sheets' folders.
    "heads": layers by heads. "layers": of each layer the picture without guidance, by the whole layer, by each head and
        by its `top` best heads together, which are framed and ranked by the objective on this one image. "pairs": heads
        alone on the diagonal, two of them elsewhere.
    What a configuration leaves open is taken from the search, if it is finished. Raises RestoreError as search_heads.
    """
    check_known(sheets, SHEETS, "a gallery has no sheet")
    search = HeadSearch(load_search(config, overrides), progress)
    search.claim_folder()
    return [Sheet(search, name, cell).draw() for name in sheets]


@dataclass(frozen=True)
class Shown:
    """A picture of a sheet, and the objective of it."""

    picture: PIL.Image.Image
    value: float | None = None

    def cell(self, caption: str, framed: bool = False) -> tuple[PIL.Image.Image, str]:
        """Return picture and caption, with the value of the objective; framed: in FRAME."""
        picture = self.picture.copy()
        if framed:
            box = (0, 0, picture.width - 1, picture.height - 1)
            PIL.ImageDraw.Draw(picture).rectangle(box, outline=FRAME, width=4)
        return picture, caption + ("" if self.value is None else f"\n{self.value:.{DIGITS}f}")


class Sheet:
    """One sheet of a search's gallery."""

    def __init__(self, search: HeadSearch, name: str, cell: int) -> None:
        self.search, self.name, self.cell = search, name, cell
        self.figure = search.config["gallery"][name]
        self.task = next(iter(search.halves["calibration"]["tasks"]))
        words = re.sub(r"[^a-z0-9]+", "-", (self.figure["prompt"] or "").lower()).strip("-")[:40].strip("-")
        self.key = "-".join(part for part in (name, words, str(self.figure["seed"])) if part)
        self.folder = search.folder / "gallery"
        weights = search.objective.weights.values()
        self.sign = -1 if all(weight < 0 for weight in weights) else 1  # PickScore is shown itself, not as a cost
        self.scores_images = not search.objective.set_metrics
        self.found = disk.read_json(search.folder / "search.json") or {}

    def draw(self) -> Path:
        """Compute what is missing, write the sheet and return its file."""
        rows, columns, titles = getattr(self, f"_draw_{self.name}")()
        sheet = draw_grid(
            [[picture for picture, _ in row] for row in rows],
            columns,
            titles,
            captions=[[caption for _, caption in row] for row in rows],
            cell=self.cell,
        )
        path = self.folder / f"{self.key}.png"
        with disk.open_atomic(path) as file:
            sheet.save(file, "PNG")
        return path

    def _draw_heads(self) -> tuple[list, list[str], list[str]]:
        """Layers by heads (Figure 1)."""
        heads = self._list_heads(self.figure["layers"])
        shown = self._run({_name([head]): [head] for head in heads})
        layers = list(dict.fromkeys(layer for layer, _ in heads))
        columns = range(1 + max(head for _, head in heads))
        empty = (None, "")
        rows = [
            [shown[_name([(layer, h)])].cell(f"{layer}:{h}") if (layer, h) in heads else empty for h in columns]
            for layer in layers
        ]
        return rows, [f"head {h}" for h in columns], layers

    def _draw_layers(self) -> tuple[list, list[str], list[str]]:
        """Each layer as a whole, its heads one by one, and the best of them together (Figure 2)."""
        layers, top = self._choose_layers(), self.figure["top"]
        heads = {layer: self._list_heads([layer]) for layer in layers}
        methods: dict[str, Any] = {"none": None}
        for layer in layers:
            methods |= {f"layer-{layer}": [layer]} | {_name([head]): [head] for head in heads[layer]}
        shown = self._run(methods, scored=True)
        best = {layer: self._rank(of, shown)[:top] for layer, of in heads.items()}
        shown |= self._run({f"best-{layer}": sorted(of) for layer, of in best.items()}, scored=True)
        widest, rows = max(map(len, heads.values())), []
        for layer in layers:
            row = [shown["none"].cell("no guidance"), shown[f"layer-{layer}"].cell(layer)]
            for head in heads[layer]:
                row.append(shown[_name([head])].cell(_spell(head), framed=head in best[layer]))
            row += [(None, "")] * (widest - len(heads[layer]))
            rows.append([*row, shown[f"best-{layer}"].cell(" ".join(format_heads(sorted(best[layer]))))])
        columns = [
            "no guidance",
            "whole layer",
            *(f"head {h}" for h in range(widest)),
            f"its {min(top, widest)} best heads",
        ]
        return rows, columns, layers

    def _draw_pairs(self) -> tuple[list, list[str], list[str]]:
        """Single heads on the diagonal, pairs elsewhere (Figure 3); the first row and column without guidance."""
        heads = self._choose_heads()
        methods: dict[str, Any] = {"none": None}
        for i, first in enumerate(heads):
            methods |= {_name({first, second}): sorted({first, second}) for second in heads[i:]}
        shown, names = self._run(methods), [_spell(head) for head in heads]
        rows = []
        for i, first in enumerate(heads):
            row = [shown["none"].cell("no guidance") if i == 0 else (None, "")]
            for second in heads:
                caption = " + ".join(dict.fromkeys([_spell(first), _spell(second)]))
                row.append(shown[_name({first, second})].cell(caption))
            rows.append(row)
        return rows, ["", *names], names

    def _choose_layers(self) -> list[str]:
        """Return the layers of the figure: the user's, the search's worst and best, or the outer ones."""
        if self.figure["layers"]:
            return list(dict.fromkeys(layer for layer, _ in self._list_heads(self.figure["layers"])))
        if not self.found:
            return list(dict.fromkeys([self.search.layers[0], self.search.layers[-1]]))
        entries = [entry for entry in self.found["rounds"][0]["layers"] if entry["scale"] == self.found["scale"]]
        ranked = [entry["name"] for entry in sorted(entries, key=lambda entry: entry["cost"])]
        return list(dict.fromkeys([ranked[-1], ranked[0]]))

    def _choose_heads(self) -> list[Head]:
        """Return the heads of the figure of pairs: the user's, or the first three that the search took."""
        if self.figure["heads"]:
            return self._list_heads(self.figure["heads"])
        taken = [tuple(head) for entry in self.found.get("rounds", ()) for head in entry["chosen"]]
        if not taken:
            raise RestoreError(
                "gallery.pairs.heads must name heads before the search has chosen some, got none; try"
                f" gallery.pairs.heads=[{_spell(self.search.pool[0])},{_spell(self.search.pool[-1])}]"
            )
        return taken[:3]

    def _list_heads(self, names: Sequence[str] | None) -> list[Head]:
        """Return the heads of layers ("b5") and single heads ("b5:0,3") of the pool, in its order."""
        if names is None:
            return list(self.search.pool)
        chosen: set[Head] = set()
        for name in names:
            layer, _, numbers = str(name).partition(":")
            of = [head for head in list_heads(self.search.attention, [layer]) if head in self.search.pool]
            wanted = [head for head in of if not numbers or str(head[1]) in re.split(r"\s*,\s*", numbers.strip())]
            if not wanted:
                raise RestoreError(
                    f"gallery.{self.name} must name heads of the search, got {name}; {layer} has {len(of)}"
                )
            chosen |= set(wanted)
        return [head for head in self.search.pool if head in chosen]

    def _rank(self, heads: Sequence[Head], shown: Mapping[str, Shown]) -> list[Head]:
        """Return heads by the objective on this image or, where one image has no value, on the search's images."""
        if self.scores_images:
            return sorted(heads, key=lambda head: self.sign * shown[_name([head])].value)
        ranking = [tuple(entry["head"]) for entry in self.found["rounds"][0]["ranking"]] if self.found else []
        if not set(heads) <= set(ranking):
            raise RestoreError(
                f"{self.search.objective} has no value for one image; run the search before gallery.layers"
            )
        return sorted(heads, key=ranking.index)

    def _run(self, methods: Mapping[str, Any], scored: bool = False) -> dict[str, Shown]:
        """Return the picture of each method, none of them larger than a cell, with the objective if `scored`."""
        objective = self.search.objective if scored and self.scores_images else None
        config = self._build(methods, objective.metrics if objective else [])
        results = self.search.run_config(config, f"gallery {self.name}", self.search.images["calibration"])
        shown = {}
        for name in methods:
            (one,) = results(name, 1)
            value = self.sign * objective.score([one]).value if objective else None
            shown[name] = Shown(fit_image(PIL.Image.fromarray(read_rgb(one.files[0])), self.cell), value)
        return shown

    def _build(self, methods: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
        """Return the configuration of a benchmark of one image; other heads or another prompt have another folder."""
        entries = {
            name: {"guidance": None} if heads is None else self.search.make_method(heads)
            for name, heads in methods.items()
        }
        prompt = self.figure["prompt"]
        digest = hashlib.sha256(json.dumps([prompt, entries], sort_keys=True).encode()).hexdigest()[:8]
        out = disk.make_folder(self.folder) / f"{self.key}-{digest}"
        config = build_benchmark(self.search.config, "calibration", entries, metrics, out)
        config["tasks"] = {self.task: config["tasks"][self.task]}
        if config.get("kind", "restoration") == "restoration":
            config["data"]["limit"] = 1
            return config
        config["seed"], task = self.figure["seed"], config["tasks"][self.task]
        task["count"] = 1
        if prompt is not None:
            disk.write_bytes(out.with_suffix(".txt"), (prompt + "\n").encode())
            task |= {"prompts": str(out.with_suffix(".txt")), "template": None}
        return config


def _name(heads: Any) -> str:
    return "+".join(f"{layer}-{head}" for layer, head in sorted(heads))


def _spell(head: Head) -> str:
    return f"{head[0]}:{head[1]}"
