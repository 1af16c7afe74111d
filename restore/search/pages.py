"""The report of a search: report.html and report.md, in the style of benchmark reports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restore.bench.protocol import flatten
from restore.bench.run import read_manifest
from restore.metrics import table as metric_table
from restore.report import figures
from restore.report.tables import Cell, format_heading, format_number
from restore.report.write import render_templates

DIGITS = 4  # of objectives


def write(folder: Path, found: Mapping[str, Any], search: Mapping[str, Any]) -> None:
    """report.html and report.md about `found`, which is search.json."""
    rest = search["rest"]
    context = {
        "title": rest.get("title") or search["name"],
        "source": rest.get("source") or "",
        "warnings": warnings(found),
        "notes": rest.get("notes") or [],
        "said": said(found, search),
        "values": table(found, rest, "value"),
        "changes": table(found, rest, "change"),
        "curve": figures.draw_chart(curve(found)),
        "points": [point_row(found, point) for point in found["curve"]],
        "map": figures.draw_heat_map(heat_map(found)),
        "cells": [(name, [c and f"{c[0]:+.{DIGITS}f}" for c in cells]) for name, cells in heat_map(found)["rows"]],
        "columns": max(head for _, head in found["pool"]) + 1,
        "rankings": [ranking(found, i) for i in range(len(found["rounds"]))],
        "layers": [[e["name"], *scored(e)] for e in sorted(found["rounds"][0]["layers"], key=lambda e: e["cost"])]
        + [["all layers", *scored(found["rounds"][0]["all"])]],
        "guidance": (folder / "guidance.yaml").read_text(encoding="utf-8"),
        "protocol": list(flatten(read_manifest(folder / "test")["protocol"]).items()),
    }
    render_templates("heads", folder, context, Path(__file__).parent)


def warnings(found: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the numbers."""
    notes = []
    best = next(point for point in found["curve"] if point["size"] == found["best"]["size"])
    if best["change"]["mean"] is not None and best["change"]["mean"] >= 0:
        notes.append("No set of heads is better than no guidance on the calibration images; the best of them is shown.")
    chosen = found["test"][f"heads-{best['size']}"]["objective"]["change"]
    if chosen["high"] is not None and chosen["low"] <= 0 <= chosen["high"]:
        notes.append("On the test images the chosen set and no guidance do not differ beyond the 95 % interval.")
    elif chosen["mean"] is not None and chosen["mean"] > 0:
        notes.append("On the test images the chosen set is worse than no guidance.")
    for i, entry in enumerate(found["rounds"]):
        for skip in entry["skipped"]:
            names = ", ".join(f"{layer}:{head}" for layer, head in skip["heads"])
            notes.append(
                f"Halving, round {i + 1}: {len(skip['heads'])} heads were scored on {skip['images']} of {skip['of']}"
                f" images only, the rest skipped: {names}."
            )
    return notes


def said(found: Mapping[str, Any], search: Mapping[str, Any]) -> list[str]:
    """What was searched and on which images, in sentences."""
    parts = {}
    for part, images in found["images"].items():
        what = f"{images['set']}, sha256 {images['sha256'][:12]}" if "set" in images else f"seed {images['seed']}"
        parts[part] = f"{images['count']} images ({what})"
    rounds = f"{search['rounds']} round{'s' * (search['rounds'] > 1)} of {search['top']}"
    return [
        f"Objective: {found['objective']}, minimised, the mean over tasks; {len(found['pool'])} heads, {rounds}.",
        f"Heads, layers and the size of the set were chosen on the calibration images: {parts['calibration']}. The"
        f" numbers of the test are of {parts['test']}, none of them among those.",
    ]


def scored(entry: Mapping[str, Any]) -> list[str]:
    """Cost, change with its interval and number of images, as text."""
    change = entry["change"]
    text = "—" if change["mean"] is None else f"{change['mean']:+.{DIGITS}f}"
    if change["low"] is not None:
        text += f" [{change['low']:+.{DIGITS}f}, {change['high']:+.{DIGITS}f}]"
    return [format_number(entry["cost"], DIGITS), text, str(entry["images"])]


def ranking(found: Mapping[str, Any], i: int) -> list[list[str]]:
    """Rows of round i: rank, head, cost, change, images."""
    entries = found["rounds"][i]["ranking"]
    return [[str(n + 1), f"{e['head'][0]}:{e['head'][1]}", *scored(e)] for n, e in enumerate(entries)]


def point_row(found: Mapping[str, Any], point: Mapping[str, Any]) -> list[str]:
    """Size, heads, and the change on calibration and test images."""
    test = found["test"][f"heads-{point['size']}"]["objective"]
    return [str(point["size"]), " ".join(point["heads"]), scored(point)[1], scored(test)[1]]


def heat_map(found: Mapping[str, Any]) -> dict[str, Any]:
    """Layers by heads: the change of the objective by each head alone, for figures.draw_heat_map."""
    layers = list(dict.fromkeys(layer for layer, _ in found["pool"]))
    columns = max(head for _, head in found["pool"]) + 1
    rows = {layer: [None] * columns for layer in layers}
    for entry in found["rounds"][0]["ranking"]:
        layer, head = entry["head"]
        change = scored(entry)[1]
        if entry["change"]["mean"] is not None:
            rows[layer][head] = (entry["change"]["mean"], f"{layer}:{head} {change}, {entry['images']} images")
    title = "Change of the objective by one head, calibration images"
    return {"rows": list(rows.items()), "title": title, "x": "head", "digits": DIGITS}


def curve(found: Mapping[str, Any]) -> dict[str, Any]:
    """The change of the objective over the number of heads on both halves, for figures.draw_chart."""
    halves = {
        "calibration images (chosen on them)": {p["size"]: p["change"]["mean"] for p in found["curve"]},
        "test images": {
            p["size"]: found["test"][f"heads-{p['size']}"]["objective"]["change"]["mean"] for p in found["curve"]
        },
    }
    series = [
        {"name": name, "line": True, "points": [(0, 0.0, "")] + [(n, y, "") for n, y in of.items() if y is not None]}
        for name, of in halves.items()
    ]
    return {"title": "Heads in the set", "x": "number of heads", "y": "change of the objective", "series": series}


def table(found: Mapping[str, Any], rest: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Methods by (task, metric) on the test images, the objective first: values, or changes against no guidance."""
    first = next(iter(found["test"].values()))
    heads = [(("", "objective"), "Objective ↓", DIGITS, -1)]
    for task, metrics in first["tasks"].items():
        title = ((rest.get("tasks") or {}).get(task) or {}).get("title") or task
        for name in metrics:
            row = metric_table.METRICS.get(name)
            label = format_heading(row) if row else name
            heads.append(((task, name), f"{title}: {label}", row.digits if row else DIGITS, row.better if row else 0))
    rows = []
    for method, entry in found["test"].items():
        if what == "change" and method == "none":
            continue
        cells = []
        for (task, name), _, digits, _ in heads:
            e = entry["tasks"][task][name] if task else entry["objective"]
            if what == "change":
                e = {**e["change"], "value": e["change"]["mean"]}
            elif not task:
                e = {"value": e["cost"]}
            cells.append((Cell(e["value"], e.get("low"), e.get("high")), digits + (what == "change")))
        rows.append((entry["title"], cells))
    return {"heads": [label for _, label, _, _ in heads], "rows": rows}
