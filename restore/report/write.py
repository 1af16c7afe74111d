"""Reports of benchmark runs for people: one self-contained HTML file and the same tables in Markdown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from operators import RestoreError
from restore import disk
from restore.bench.protocol import flatten
from restore.report import figures, tables
from restore.report.tables import Run, number

COST_HEADS = ("task", "method", "network evaluations", "seconds per image", "steps/s", "peak memory MB", "not sampling")
COST_HEADS += ("device",)


@dataclass(frozen=True)
class Report:
    """The files written, and how the protocols of the runs differ where they may not share a table."""

    html: Path
    markdown: Path
    differences: list[tuple[str, str, dict[str, tuple]]]


def report(runs: Sequence[str | os.PathLike], out: str | os.PathLike | None = None, *, private: bool = False) -> Report:
    """Write report.html and report.md about one or several runs, to `out` (the first run's folder by default).

    Runs with comparable protocols share a table; others get their own, after a table of how they differ.
    private: leave out every picture that derives from the data set (for data that must not be published).
    Raises RestoreError for a folder that holds no finished run.
    """
    if not runs:
        raise RestoreError("a report needs at least one run folder")
    read = [tables.read_run(folder) for folder in runs]
    groups, apart = tables.group_runs(read)
    folder = disk.make_folder(out or read[0].folder)
    said = {run.folder: _said(run) for run in read}
    context = {
        "title": read[0].title if len(read) == 1 else "Benchmark report",
        "runs": [said[run.folder] for run in read],
        "apart": [(a.title, b.title, [(k, _brief(v), _brief(w)) for k, (v, w) in d.items()]) for a, b, d in apart],
        "groups": [
            _group(group, len(groups) > 1, private) | {"runs": [said[r.folder] for r in group]} for group in groups
        ],
        "cost_heads": COST_HEADS,
    }
    files = [folder / "report.html", folder / "report.md"]
    for file in files:
        text = environment().get_template(f"{file.name}.j2").render(context)
        disk.write_bytes(file, text.encode("utf-8"))
    return Report(*files, [(a.title, b.title, d) for a, b, d in apart])


def environment(*more: Path) -> jinja2.Environment:
    """How templates of reports are read and filled; more: folders of further ones."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, *more]),
        autoescape=lambda name: name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    bar = lambda value: str(value).replace("|", "\\|").replace("\n", " ")  # noqa: E731
    made.filters |= {"number": number, "heading": tables.heading, "data_uri": figures.data_uri, "bar": bar}
    return made


def _said(run: Run) -> dict[str, Any]:
    """What is said of one run in words: its warnings, its protocol in a sentence and in full."""
    ran = [p for cells in run.table.values() for cell in cells.values() for p in cell["cost"].get("protocols", []) if p]
    details = flatten({**run.protocol, "ran_with": [p for i, p in enumerate(ran) if p not in ran[:i]]})
    return {
        "title": run.title,
        "config": run.config,
        "warnings": warnings_of(run),
        "summary": summary_line(run),
        "details": list(details.items()),
    }


def _group(group: Sequence[Run], several: bool, private: bool) -> dict[str, Any]:
    table = tables.build_table(group)
    grids = [] if private else [g for run in group for task in run.table if (g := picture_grid(run, task))]
    return {
        "heading": " and ".join(run.title for run in group) if several or len(group) > 1 else None,
        "table": _laid_out(table, group),
        "parts": [_laid_out(part, group) for part in tables.split(table)],
        "charts": [figures.chart(chart) for run in group for chart in tables.curves(run)],
        "pictures": grids,
        "cost": [row for run in group for row in cost_rows(run)],
    }


def _laid_out(table: tables.Table, group: Sequence[Run]) -> dict[str, Any]:
    """Columns and rows of a table, with the titles of the tasks and how many columns are under each."""
    titles = {task: tables.task_title(run, task) for run in reversed(group) for task in run.config["tasks"]}
    tasks = [task for task, _ in table.columns]
    metrics = [table.metrics[metric] for _, metric in table.columns]
    return {
        "heads": [(titles[task], tasks.count(task)) for task in dict.fromkeys(tasks)],
        "metrics": metrics,
        "named": [(titles[task], metric) for task, metric in zip(tasks, metrics, strict=True)],
        "rows": [(name, list(zip((row[c] for c in table.columns), metrics, strict=True))) for name, row in table.rows],
    }


def _brief(value: Any) -> str:
    """A value of a protocol in a table cell; hashes by their beginning."""
    text = "—" if value is None else str(value)
    return text[:16] + "…" if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def summary_line(run: Run) -> str:
    """The protocol in one sentence, to stand under a table."""
    p = run.protocol
    images = p["images"]
    what = f"{images['count']} images of {images['set']} (sha256 {images['sha256'][:12]})" if images else (
        "; ".join(f"{tables.task_title(run, k)}: {t['count']} images" for k, t in run.config["tasks"].items())
    )  # fmt: skip
    sigmas = sorted({t["sigma_y"] for t in p["tasks"].values() if "sigma_y" in t})
    noise = f"sigma_y = {', '.join(map(str, sigmas))} on {p['sigma_range']}" if sigmas else ""
    weights = [name[:12] for files in p["backbone"].values() for name in files.values()]
    backbone = ", ".join(p["backbone"]) + (f" (sha256 {', '.join(weights[:3])})" if weights else "")
    metrics = p["metrics"]
    parts = [what, noise, f"seed {p['seed']}", backbone, p["precision"], metrics.get("lpips", "")]
    return "; ".join(part for part in [*parts, metrics.get("implementation", "")] if part) + "."


def warnings_of(run: Run) -> list[str]:
    """What is wrong with a run, as far as it can be known: what is missing, too small or not the published thing."""
    notes = []
    for task, cells in run.table.items():
        for method, cell in cells.items():
            if cell["missing"]:
                where = f"{tables.method_title(run, method)}, {tables.task_title(run, task)}"
                notes.append(
                    f"Incomplete: {where}: {cell['done']} of {cell['expected']} images; {cell['missing']} missing."
                )
    small = run.config["metrics"]["allow_small"]
    if small and any(cell["set_values"] for cells in run.table.values() for cell in cells.values()):
        notes.append("FID and the other set metrics were computed on fewer images than they need (allow_small).")
    own = [e["file"] for e in run.protocol["metrics"].get("weights", {}).values() if not e["published"]]
    if own:
        notes.append(
            f"Metrics used weights that are not the published ones ({', '.join(own)}): not comparable with papers."
        )
    return notes


def cost_rows(run: Run) -> list[tuple[str, ...]]:
    """Time and memory of every cell, under COST_HEADS."""
    rows = []
    for task, cells in run.table.items():
        for method, cell in cells.items():
            c = cell["cost"]
            if c:
                memory = f"{number(c['peak_memory_mb'], 0)} ({c['memory_of']})"
                values = [str(c["nfe"]), number(c["seconds_per_image"], 3), number(c["iterations_per_second"], 2)]
                values += [memory, f"{100 * c['overhead']:.1f} %", ", ".join(c["devices"])]
                rows.append((tables.task_title(run, task), tables.method_title(run, method), *values))
    return rows


def chosen_methods(run: Run, task: str, limit: int = 6) -> list[str]:
    """Methods for a picture grid: all, or of each sweep the first, middle and last value."""
    names = [m for m in run.table.get(task, {}) if run.table[task][m]["done"]]
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(run.config["methods"][name]["family"], []).append(name)
    if len(names) > limit:
        families = {k: sorted({v[0], v[len(v) // 2], v[-1]}, key=v.index) for k, v in families.items()}
    return [name for members in families.values() for name in members][: limit + 2]


def picture_grid(run: Run, task: str) -> dict[str, Any] | None:
    """Measurement, methods, truth and spread of images spread evenly over the set; None where there are none."""
    methods = chosen_methods(run, task)
    folder = run.folder / "results" / task
    ids = sorted(path.stem for path in (folder / methods[0]).glob("*.png")) if methods else []
    count = min(run.config["report"]["pictures"], len(ids))
    # Evenly over the set, not a choice: nobody picked these.
    ids = [ids[i * len(ids) // count] for i in range(count)]
    if not ids:
        return None
    columns = ["measurement", *(tables.method_title(run, m) for m in methods), "truth"]
    spread = next((m for m in reversed(methods) if list((folder / m / "spread").glob("*.png"))), None)
    if spread:
        columns.append(f"spread of {tables.method_title(run, spread)}")
    rows = []
    for name in ids:
        paths = [run.folder / "measurements" / task / f"{name}.png"]
        paths += [folder / m / f"{name}.png" for m in methods] + [run.folder / "truth" / f"{name}.png"]
        if spread:
            paths.append(folder / spread / "spread" / f"{name}.png")
        rows.append((name, [path if path.exists() else None for path in paths]))
    kept = [i for i in range(len(columns)) if any(paths[i] for _, paths in rows)]
    return {
        "title": tables.task_title(run, task),
        "columns": [columns[i] for i in kept],
        "rows": [(name, [paths[i] for i in kept]) for name, paths in rows],
    }
