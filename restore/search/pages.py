"""The report of a search: report.html and report.md, in the style of benchmark reports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restore.bench.protocol import flatten
from restore.bench.run import read_manifest
from restore.metrics.table import METRICS
from restore.report import figures
from restore.report.tables import Cell, format_heading, format_number
from restore.report.write import render_templates

DIGITS = 4  # of objectives


def write_search_report(folder: Path, table: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write report.html and report.md about `table`, the content of search.json."""
    rest, first, tests = config["rest"], table["rounds"][0], _test_objectives(table)
    context = {
        "title": rest.get("title") or config["name"],
        "source": rest.get("source") or "",
        "warnings": list_search_warnings(table),
        "notes": rest.get("notes") or [],
        "summary": summarise_search(table, config),
        "values": build_test_table(table, rest, changes=False),
        "changes": build_test_table(table, rest, changes=True),
        "curve": figures.place_chart(build_curve(table)),
        "points": [
            [str(p["size"]), " ".join(p["heads"]), _format_change(p["change"]), _format_change(tests[p["size"]])]
            for p in table["curve"]
        ],
        "map": figures.place_heat_map(build_heat_map(table)),
        "rankings": [
            [[str(i), "{}:{}".format(*e["head"]), *_format_score(e)] for i, e in enumerate(entry["ranking"], 1)]
            for entry in table["rounds"]
        ],
        "layers": [[e["name"], *_format_score(e)] for e in sorted(first["layers"], key=lambda e: e["cost"])]
        + [["all layers", *_format_score(first["all"])]],
        "guidance": (folder / "guidance.yaml").read_text(encoding="utf-8"),
        "protocol": list(flatten(read_manifest(folder / "test")["protocol"]).items()),
    }
    render_templates("heads", folder, context, Path(__file__).parent)


def _test_objectives(table: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The change of the objective on the test images by the number of heads."""
    return {p["size"]: table["test"][f"heads-{p['size']}"]["objective"]["change"] for p in table["curve"]}


def list_search_warnings(table: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know before the numbers."""
    notes, size = [], table["best"]["size"]
    best = next(point for point in table["curve"] if point["size"] == size)
    if best["change"]["mean"] is not None and best["change"]["mean"] >= 0:
        notes.append("No set of heads is better than no guidance on the calibration images; the best of them is shown.")
    change = _test_objectives(table)[size]
    if change["high"] is not None and change["low"] <= 0 <= change["high"]:
        notes.append("On the test images the chosen set and no guidance do not differ beyond the 95 % interval.")
    elif change["mean"] is not None and change["mean"] > 0:
        notes.append("On the test images the chosen set is worse than no guidance.")
    for i, entry in enumerate(table["rounds"], 1):
        for skip in entry["skipped"]:
            names = ", ".join(f"{layer}:{head}" for layer, head in skip["heads"])
            notes.append(
                f"Halving, round {i}: {len(skip['heads'])} heads were scored on {skip['images']} of {skip['of']}"
                f" images only, the rest skipped: {names}."
            )
    return notes


def summarise_search(table: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Return in sentences what was searched and on which images."""
    halves = {}
    for half, images in table["images"].items():
        origin = f"{images['set']}, sha256 {images['sha256'][:12]}" if "set" in images else f"seed {images['seed']}"
        halves[half] = f"{images['count']} images ({origin})"
    rounds = f"{config['rounds']} round{'s' * (config['rounds'] > 1)} of {config['top']}"
    return [
        f"Objective: {table['objective']}, minimised, the mean over tasks; {len(table['pool'])} heads, {rounds}.",
        f"Heads, layers and the size of the set were chosen on the calibration images: {halves['calibration']}. The"
        f" numbers of the test are of {halves['test']}, none of them among those.",
    ]


def _format_change(change: Mapping[str, Any]) -> str:
    text = "—" if change["mean"] is None else f"{change['mean']:+.{DIGITS}f}"
    interval = "" if change["low"] is None else f" [{change['low']:+.{DIGITS}f}, {change['high']:+.{DIGITS}f}]"
    return text + interval


def _format_score(entry: Mapping[str, Any]) -> list[str]:
    return [format_number(entry["cost"], DIGITS), _format_change(entry["change"]), str(entry["images"])]


def build_heat_map(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the change of the objective by each single head, layers by heads, for figures.place_heat_map."""
    columns = max(head for _, head in table["pool"]) + 1
    rows = {layer: [None] * columns for layer, _ in table["pool"]}
    for entry in table["rounds"][0]["ranking"]:
        (layer, head), change = entry["head"], entry["change"]
        if change["mean"] is not None:
            note = f"{layer}:{head} {_format_change(change)}, {entry['images']} images"
            rows[layer][head] = (change["mean"], note)
    title = "Change of the objective by one head, calibration images"
    return {"rows": list(rows.items()), "title": title, "x": "head", "digits": DIGITS}


def build_curve(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the change of the objective over the number of heads on both halves, for figures.place_chart."""
    halves = {
        "calibration images (chosen on them)": {p["size"]: p["change"] for p in table["curve"]},
        "test images": _test_objectives(table),
    }
    series = []
    for name, changes in halves.items():
        points = [(n, change["mean"], "") for n, change in changes.items() if change["mean"] is not None]
        series.append({"name": name, "line": True, "points": [(0, 0.0, ""), *points]})
    return {"title": "Heads in the set", "x": "number of heads", "y": "change of the objective", "series": series}


def build_test_table(table: Mapping[str, Any], rest: Mapping[str, Any], changes: bool) -> dict[str, Any]:
    """Return methods by (task, metric) on the test images, the objective first: values, or changes by guidance."""
    tasks = next(iter(table["test"].values()))["tasks"]
    columns = [(None, "objective", "Objective ↓", DIGITS)]
    for task, metrics in tasks.items():
        title = ((rest.get("tasks") or {}).get(task) or {}).get("title") or task
        for name in metrics:
            row = METRICS.get(name)
            label, digits = (format_heading(row), row.digits) if row else (name, DIGITS)
            columns.append((task, name, f"{title}: {label}", digits))
    rows = []
    for method, entry in table["test"].items():
        if changes and method == "none":
            continue
        cells = []
        for task, name, _, digits in columns:
            e = entry["tasks"][task][name] if task else entry["objective"]
            value = e["change"]["mean"] if changes else e["value" if task else "cost"]
            bounds = e["change"] if changes else e
            cells.append((Cell(value, bounds.get("low"), bounds.get("high")), digits + changes))
        rows.append((entry["title"], cells))
    return {"heads": [label for _, _, label, _ in columns], "rows": rows}
