"""The report of a search: report.html and report.md, in the style of benchmark reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
        "curves": [figures.place_chart(chart) for chart in build_curves(table)],
        "test_curves": [figures.place_chart(chart) for chart in build_metric_curves(table, rest)],
        "points": [
            [str(p["size"]), f"{p['scale']:g}", " ".join(p["heads"]), *(map(_format_change, (p["change"], test)))]
            for p, test in zip(table["curve"], tests, strict=True)
        ],
        "map": figures.place_heat_map(build_heat_map(table)),
        "rankings": [
            [[str(i), "{}:{}".format(*e["head"]), *_format_score(e)] for i, e in enumerate(entry["ranking"], 1)]
            for entry in table["rounds"]
        ],
        "layers": [
            [e["name"], f"{e['scale']:g}", *_format_score(e)]
            for e in sorted(first["layers"], key=lambda e: (e["scale"], e["cost"]))
        ]
        + [["all layers", f"{table['scale']:g}", *_format_score(first["all"])]],
        "guidance": (folder / "guidance.yaml").read_text(encoding="utf-8"),
        "protocol": list(flatten(read_manifest(folder / "test")["protocol"]).items()),
    }
    render_templates("heads", folder, context, Path(__file__).parent)


def name_at(table: Mapping[str, Any], name: str, scale: float) -> str:
    """Return the name of a method of the test at a scale; see HeadSearch.name_at."""
    return name if scale == table["scale"] else f"{name}-w{scale:g}"


def _test_objectives(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The change of the objective on the test images at each point of the curve."""
    names = [name_at(table, f"heads-{p['size']}", p["scale"]) for p in table["curve"]]
    return [table["test"][name]["objective"]["change"] for name in names]


def list_search_warnings(table: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know before the numbers."""
    notes, chosen = [], (table["best"]["size"], table["best"]["scale"])
    number = next(i for i, point in enumerate(table["curve"]) if (point["size"], point["scale"]) == chosen)
    best = table["curve"][number]
    if best["change"]["mean"] is not None and best["change"]["mean"] >= 0:
        notes.append("No set of heads is better than no guidance on the calibration images; the best of them is shown.")
    change = _test_objectives(table)[number]
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
    title = "Change by one head, calibration images"
    return {"rows": list(rows.items()), "title": title, "x": "head", "digits": DIGITS}


def build_curves(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the change of the objective over the number of heads, calibration and test, for figures.place_chart.

    One curve for each scale, and the best layer of each as a dashed level (HeadHunter, Figure 4).
    """
    layers = {(e["scale"], e["name"]): e["change"]["mean"] for e in table["rounds"][0]["layers"]}
    best = {scale: layers[scale, name] for scale, name in table["best"]["layers"]}
    tests = {s: table["test"][name_at(table, "layer", s)]["objective"]["change"]["mean"] for s in table["scales"]}
    changes = {
        "Calibration images (chosen on them)": ([p["change"]["mean"] for p in table["curve"]], best),
        "Test images": ([change["mean"] for change in _test_objectives(table)], tests),
    }
    return [
        {**_build_chart(table, values, 0.0, levels), "title": title, "y": "change of the objective"}
        for title, (values, levels) in changes.items()
    ]


def build_metric_curves(table: Mapping[str, Any], rest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every metric of the test over the number of heads, as `build_curves`; the values, not their changes."""
    charts = []
    for task, metrics in table["test"]["none"]["tasks"].items():
        for metric in metrics:

            def value(method: str, task: str = task, metric: str = metric) -> float | None:
                found = table["test"][method]["tasks"][task][metric]["value"]
                return None if found is None or not math.isfinite(found) else found

            points = [value(name_at(table, f"heads-{p['size']}", p["scale"])) for p in table["curve"]]
            levels = {scale: value(name_at(table, "layer", scale)) for scale in table["scales"]}
            row, title = METRICS.get(metric), ((rest.get("tasks") or {}).get(task) or {}).get("title") or task
            label = format_heading(row) if row else metric
            charts.append({**_build_chart(table, points, value("none"), levels), "title": title, "y": label})
    return [chart for chart in charts if any(len(series["points"]) > 1 for series in chart["series"])]


def _build_chart(
    table: Mapping[str, Any], values: Sequence[float | None], none: float | None, levels: Mapping[float, float | None]
) -> dict[str, Any]:
    """A curve and a level for each scale. values: at the points of table["curve"]; none: without guidance."""
    series, last = [], max(point["size"] for point in table["curve"])
    for colour, scale in enumerate(table["scales"]):
        start = [] if none is None else [(0, none, "")]
        mine = [(p["size"], v, "") for p, v in zip(table["curve"], values, strict=True) if p["scale"] == scale]
        points = start + [point for point in mine if point[1] is not None]
        series.append({"name": f"heads, scale {scale:g}", "line": True, "points": points, "colour": colour})
        if levels[scale] is not None:
            level = [(0, levels[scale], ""), (last, levels[scale], "")]
            name = f"best layer, scale {scale:g}"
            series.append({"name": name, "line": True, "level": True, "points": level, "colour": colour})
    return {"x": "number of heads", "series": series}


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
