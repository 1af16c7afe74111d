"""Reports of benchmark runs: one self-contained HTML file and the same tables in Markdown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from operators import RestoreError
from restore import disk
from restore.bench.batches import find_truth, read_row
from restore.bench.protocol import flatten
from restore.metrics.statistics import FEW
from restore.report import figures, tables
from restore.report.tables import ProtocolDifference, Run, format_number

LARGEST = 256  # pixels of a picture's longer side, twice what is displayed
MARK = "written by restore"  # near the beginning of every report
COST_HEADS = ("task", "method", "network evaluations", "seconds per image", "steps/s", "peak memory MB")
COST_HEADS += ("overhead", "device")


@dataclass(frozen=True)
class WrittenReport:
    """The files of a report, and how the protocols of runs that may not share a table differ."""

    html: Path
    markdown: Path
    differences: list[ProtocolDifference]


def write_report(
    runs: Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    *,
    private: bool = False,
    overwrite: bool = False,
) -> WrittenReport:
    """Write report.html and report.md about one or several runs, to `out` (the first run's folder by default).

    Runs with comparable protocols share a table; others get their own, after a table of how they differ.
    private: omit every picture that derives from the data set (for data that must not be published).
    Raises RestoreError if a folder has no finished run, and if a file would be replaced that is no report of this
    program, unless `overwrite`.
    """
    if not runs:
        raise RestoreError("a report needs at least one run folder")
    loaded = [tables.read_run(folder) for folder in runs]
    groups, differences = tables.group_runs(loaded)
    folder = Path(out or loaded[0].folder)
    for path in (folder / "report.html", folder / "report.md"):
        if path.exists() and not overwrite and not _is_report(path):
            raise RestoreError(
                f"{path} exists and is no report of this program; give overwrite=True to replace it, or another out="
            )
    disk.make_folder(folder)
    context = {
        "title": loaded[0].title if len(loaded) == 1 else "Benchmark report",
        "runs": loaded,
        "differences": differences,
        "groups": [_describe_group(group, len(groups) > 1, private) for group in groups],
        "cost_heads": COST_HEADS,
    }
    render_templates("report", folder, context)
    return WrittenReport(folder / "report.html", folder / "report.md", differences)


def make_environment(*templates: Path) -> jinja2.Environment:
    """Return the environment of HTML templates: those of this folder and of `templates`, escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, *templates]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render_templates(name: str, out: Path, context: Mapping[str, Any], *templates: Path) -> None:
    """Write `out`/report.html and report.md from the templates NAME.html.j2 and NAME.md.j2.

    templates: folders of further templates, which may extend those of this one.
    """
    html = make_environment(*templates)
    html.filters |= {
        "number": format_number,
        "heading": tables.format_heading,
        "warnings": list_warnings,
        "summary": summarise_protocol,
        "settings": list_settings,
        "data_uri": partial(figures.to_data_uri, longest=LARGEST),
    }
    html.globals |= {"few": FEW, "mark": MARK}
    # Every expression of a Markdown template is escaped, unless it is a macro's output or marked `safe`.
    markdown = html.overlay(finalize=lambda value: value if hasattr(value, "__html__") else Markup(to_markdown(value)))
    for suffix, environment in (("html", html), ("md", markdown)):
        text = environment.get_template(f"{name}.{suffix}.j2").render(context)
        disk.write_bytes(out / f"report.{suffix}", text.encode("utf-8"))


def _is_report(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return MARK.encode() in file.read(1000)
    except OSError:
        return False


def to_markdown(value: Any) -> str:
    """Return a value as text on one line that Markdown shows as it is: no HTML, link, emphasis or column of a table."""
    text = " ".join(str(value).split())
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")
    text = re.sub(r"[\\`*|]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])", r"\\\g<0>", text)
    text = re.sub(r"^\d+(?=[.)] )", r"\g<0>\\", text)
    return re.sub(r"^(?:[#>]|[-+=~](?=[-+=~ ]|$))", r"\\\g<0>", text)


def list_settings(run: Run) -> list[tuple[str, Any]]:
    """Return the whole protocol of a run, with those of its batches, as (dotted key, value)."""
    protocols: list[Any] = []
    for _, _, cell in run.iterate_cells():
        protocols += [p for p in cell["cost"].get("protocols", []) if p and p not in protocols]
    return list(flatten({**run.protocol, "ran_with": protocols}).items())


def _describe_group(group: Sequence[Run], several: bool, private: bool) -> dict[str, Any]:
    table = tables.build_results_table(group)
    grids = [] if private else [build_picture_grid(run, task) for run in group for task in run.results]
    return {
        "heading": " and ".join(run.title for run in group) if several or len(group) > 1 else None,
        "runs": group,
        "table": table,
        "parts": tables.split_table(table),
        "charts": [figures.place_chart(chart) for run in group for chart in tables.build_charts(run)],
        "pictures": [grid for grid in grids if grid],
        "cost": [row for run in group for row in format_cost_rows(run)],
    }


def summarise_protocol(run: Run) -> str:
    """Return the protocol in one sentence, to stand under a table."""
    p, tasks = run.protocol, run.config["tasks"]
    if images := p["images"]:
        data = f"{images['count']} images of {images['set']} (sha256 {images['sha256'][:12]})"
    else:
        data = "; ".join(f"{run.task_title(name)}: {task['count']} images" for name, task in tasks.items())
    sigmas = sorted({t["sigma_y"] for t in p["tasks"].values() if "sigma_y" in t})
    noise = f"sigma_y = {', '.join(map(str, sigmas))} on {p['sigma_range']}" if sigmas else ""
    weights = [name[:12] for files in p["backbone"].values() for name in files.values()]
    backbone = ", ".join(p["backbone"]) + (f" (sha256 {', '.join(weights[:3])})" if weights else "")
    metrics = [p["metrics"].get(key, "") for key in ("lpips", "implementation")]
    return "; ".join(filter(None, [data, noise, f"seed {p['seed']}", backbone, p["precision"], *metrics])) + "."


def list_warnings(run: Run) -> list[str]:
    """Return what limits a run's numbers: missing images, sets that are too small, weights that are not published."""
    notes = []
    for task, method, cell in run.iterate_cells():
        if cell["missing"]:
            count = f"{cell['done']} of {cell['expected']} images; {cell['missing']} missing"
            notes.append(f"Incomplete: {method}, {task}: {count}.")
    for task, methods in run.results.items():
        for method in methods:
            rows = sorted((run.folder / "results" / task / method / "rows").glob("*.json"))
            if changed := [path.stem for path in rows if read_row(path) is None]:
                shown = ", ".join(changed[:5] + ["..."] * (len(changed) > 5))
                where = f"{run.method_title(method)}, {run.task_title(task)}: {len(changed)} of {len(rows)} images"
                notes.append(f"Pictures changed since they were measured: {where} ({shown}); run the benchmark again.")
    if run.config["metrics"]["allow_small"] and any(cell["set_values"] for _, _, cell in run.iterate_cells()):
        notes.append("FID and the other set metrics were computed on fewer images than they need (allow_small).")
    own = [e["file"] for e in run.protocol["metrics"].get("weights", {}).values() if not e["published"]]
    if own:
        notes.append(
            f"Metrics used weights other than the published ones ({', '.join(own)}): not comparable with papers."
        )
    return notes


def format_cost_rows(run: Run) -> list[tuple[str, ...]]:
    """Return time and memory of every cell, under COST_HEADS."""
    rows = []
    for task, method, cell in run.iterate_cells():
        if c := cell["cost"]:
            seconds, speed = format_number(c["seconds_per_image"], 3), format_number(c["iterations_per_second"], 2)
            memory = f"{format_number(c['peak_memory_mb'], 0)} ({c['memory_of']})"
            costs = (str(c["nfe"]), seconds, speed, memory, f"{100 * c['overhead']:.1f} %")
            rows.append((task, method, *costs, ", ".join(c["devices"])))
    return rows


def select_pictured_methods(run: Run, task: str, limit: int = 6) -> list[str]:
    """Return the methods of a picture grid: all, or of each sweep the first, middle and last value."""
    names = [name for name, cell in run.results[task].items() if cell["done"]]
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(run.config["methods"][name]["family"], []).append(name)
    if len(names) > limit:
        families = {k: sorted({v[0], v[len(v) // 2], v[-1]}, key=v.index) for k, v in families.items()}
    return [name for members in families.values() for name in members][: limit + 2]


def build_picture_grid(run: Run, task: str) -> dict[str, Any] | None:
    """Return the files of measurement, methods, truth and spread of images spread evenly over the set, or None."""
    in_rows = run.config["report"]["layout"] == "rows"
    methods = select_pictured_methods(run, task, len(run.results[task]) if in_rows else 6)
    folder = run.folder / "results" / task
    rows = sorted((folder / methods[0] / "rows").glob("*.json")) if methods else []
    ids = [path.stem for path in rows if read_row(path) is not None]
    count = min(run.config["report"]["pictures"], len(ids))
    if not count:
        return None
    # Evenly over the set: nobody chose these images.
    ids = [ids[i * len(ids) // count] for i in range(count)]
    columns = [("measurement", run.folder / "measurements" / task)]
    columns += [(run.method_title(method), folder / method) for method in methods]
    spread = next((m for m in reversed(methods) if list((folder / m / "spread").glob("*.png"))), None)
    if spread:
        columns.append((f"spread of {run.method_title(spread)}", folder / spread / "spread"))
    columns = [(title, [place / f"{name}.png" for name in ids]) for title, place in columns]
    columns.insert(1 + len(methods), ("truth", [find_truth(run.folder, task, name) for name in ids]))
    columns = [(title, files) for title, files in columns if any(path.exists() for path in files)]
    columns = [(title, [path if path.exists() else None for path in files]) for title, files in columns]
    title, names = run.task_title(task), [run.image_title(task, name) for name in ids]
    if in_rows:
        return {"title": title, "columns": names, "rows": columns}
    rows = [(name, [files[i] for _, files in columns]) for i, name in enumerate(names)]
    return {"title": title, "columns": [title for title, _ in columns], "rows": rows}
