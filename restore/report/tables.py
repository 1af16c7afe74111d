"""The tables of a report, as data: what each cell says, before anybody decides how it looks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from operators import RestoreError
from restore import disk
from restore.bench.baselines import BASELINES
from restore.bench.protocol import comparable
from restore.bench.run import read_manifest
from restore.bench.schema import Benchmark
from restore.metrics import sets
from restore.metrics import table as metric_table
from restore.metrics.table import Metric

ARROWS = {1: "↑", -1: "↓", 0: ""}
# (x, y) of the trade-off chart: the first whose metrics are there.
TRADE_OFFS = (("lpips", "fid"), ("lpips", "psnr"), ("ssim", "psnr"), ("residual_ratio", "psnr"))


@dataclass(frozen=True)
class Cell:
    """One number. low, high: its 95 % interval, or mean -/+ the package's own deviation (`deviation` says which).

    done, expected: images it was computed on and should have been. published: the paper's number. best: of its column.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    deviation: bool = False
    done: int = 0
    expected: int = 0
    published: float | None = None
    best: bool = False

    @property
    def incomplete(self) -> bool:
        return self.done < self.expected


@dataclass
class Run:
    """A benchmark folder as a report reads it."""

    folder: Path
    config: dict[str, Any]
    protocol: dict[str, Any]
    table: dict[str, Any]
    created: str
    own: dict[str, list] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.config["title"] or self.config["name"]

    def metric(self, name: str) -> Metric:
        """How a metric is shown; those from outside as the run recorded them."""
        return Metric(*self.own[name]) if name in self.own else metric_table.find_metric(name)


@dataclass
class Table:
    """Rows by method, columns by (task, metric)."""

    columns: list[tuple[str, str]]
    metrics: dict[str, Metric]
    rows: list[tuple[str, dict[tuple[str, str], Cell]]] = field(default_factory=list)


def read_run(folder: str | Path) -> Run:
    """A run with its metrics. Raises RestoreError for a folder without a run or without any result."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    path = folder / "metrics.json"
    if not path.is_file():
        raise RestoreError(f"{folder} has no metrics.json: the run has not finished; run the benchmark again to go on")
    found, config = disk.read_json(path), manifest["config"]
    if not isinstance(found, dict) or not isinstance(found.get("table"), dict):
        raise RestoreError(f"{path} is damaged; run the benchmark again, which measures anew")
    lacking = [field.name for field in dataclasses.fields(Benchmark) if field.name not in config]
    if lacking:
        raise RestoreError(f"{folder / 'run.json'} is damaged: its configuration lacks {', '.join(lacking)}")
    return Run(folder, config, manifest["protocol"], found["table"], manifest["created"], found.get("shown", {}))


def shown_metrics(run: Run) -> list[str]:
    """Metrics that are columns, in the order of the configuration."""
    asked = run.config["report"]["columns"] or run.config["metrics"]["names"]
    asked = [each for name in asked for each in metric_table.GROUPS.get(name, (name,))]
    against = (n for cells in run.table.values() for cell in cells.values() for n in cell["set_values"])
    return list(dict.fromkeys([*asked, *(name for name in against if name.startswith(sets.FULL_PREFIX))]))


def cell_of(entry: Mapping[str, Any] | None, metric: str, published: float | None) -> Cell:
    """The cell of one metric from a (task, method) entry of metrics.json."""
    if entry is None:
        return Cell(None, published=published)
    counts = {"done": entry["done"], "expected": entry["expected"], "published": published}
    if metric in entry["means"]:
        m = entry["means"][metric]
        value = math.inf if m["mean"] is None and metric == "psnr" else m["mean"]
        return Cell(value, m["low"], m["high"], **counts)
    if metric in entry["set_values"]:
        value, deviation = entry["set_values"][metric], entry["set_values"].get(f"{metric}_std")
        # Rounding alone: every subset was the whole set, and no spread is known.
        if deviation is None or deviation < max(1e-4 * abs(value), 1e-6):
            return Cell(value, **counts)
        return Cell(value, value - deviation, value + deviation, True, **counts)
    return Cell(entry["cost"].get(metric), **counts)


def method_title(run: Run, method: str) -> str:
    titles = run.config["published"]["titles"]
    entry = run.config["methods"].get(method)
    return (entry and entry["title"]) or titles.get(method) or method


def family_title(run: Run, family: str) -> str:
    """The title that a sweep's methods share."""
    return next(m["family_title"] for m in run.config["methods"].values() if m["family"] == family)


def task_title(run: Run, task: str) -> str:
    return run.config["tasks"][task]["title"] or task


def build_table(runs: Sequence[Run]) -> Table:
    """One table of runs with comparable protocols: columns of all, rows of each; published-only rows last."""
    columns: list[tuple[str, str]] = []
    for run in runs:
        for task in run.config["tasks"]:
            columns += [(task, metric) for metric in shown_metrics(run) if (task, metric) not in columns]
    tasks = list(dict.fromkeys(task for task, _ in columns))
    columns.sort(key=lambda column: tasks.index(column[0]))
    table = Table(columns, {metric: run.metric(metric) for run in reversed(runs) for metric in shown_metrics(run)})
    for run in runs:
        values = run.config["published"]["values"]
        prefix = f"{run.title}: " if len(runs) > 1 else ""
        for method in [*run.config["methods"], *(m for m in values if m not in run.config["methods"])]:
            row = {}
            for task, metric in columns:
                said = ((values.get(method) or {}).get(task) or {}).get(metric)
                row[task, metric] = cell_of(run.table.get(task, {}).get(method), metric, said)
            table.rows.append((prefix + method_title(run, method), row))
    _mark_best(table)
    return table


def _mark_best(table: Table) -> None:
    """The best complete cell of every column that has a better and a worse, if there is something to compare."""
    for column in table.columns:
        better = table.metrics[column[1]].better
        if not better:
            continue
        cells = [(row[column], i) for i, (_, row) in enumerate(table.rows)]
        complete = [
            (c.value, i) for c, i in cells if c.value is not None and math.isfinite(c.value) and not c.incomplete
        ]
        if len(complete) < 2:
            continue
        # Equal as printed is equal: a digit that nobody sees decides nothing.
        digits = table.metrics[column[1]].digits
        top = max(round(value, digits) * better for value, _ in complete)
        for value, i in complete:
            if round(value, digits) * better == top:
                cell = table.rows[i][1][column]
                table.rows[i][1][column] = replace(cell, best=True)


def group_runs(runs: Sequence[Run]) -> tuple[list[list[Run]], list[tuple[Run, Run, dict[str, tuple]]]]:
    """Runs that may share a table, and for every pair of groups how their protocols differ."""
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            if not comparable(group[0].protocol, run.protocol):
                group.append(run)
                break
        else:
            groups.append([run])
    first = [group[0] for group in groups]
    apart = [(a, b, comparable(a.protocol, b.protocol)) for i, a in enumerate(first) for b in first[i + 1 :]]
    return groups, apart


def split(table: Table, limit: int = 10) -> list[Table]:
    """The table as one or more of at most `limit` columns, cut between tasks, so that a page can hold them."""
    parts: list[list[tuple[str, str]]] = []
    for task in dict.fromkeys(task for task, _ in table.columns):
        columns = [column for column in table.columns if column[0] == task]
        if parts and len(parts[-1]) + len(columns) <= limit:
            parts[-1] += columns
        else:
            parts.append(columns)
    return [
        Table(columns, table.metrics, [(title, {c: row[c] for c in columns}) for title, row in table.rows])
        for columns in parts
    ]


def number(value: float | None, digits: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "—"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def curves(run: Run) -> list[dict[str, Any]]:
    """Charts over a swept guidance scale or number of steps, as data for figures.chart.

    Where the configuration's report names a curve: its first metric across and every other one up, a chart each per
    task; else, over a scale, the first of TRADE_OFFS that was measured. A line per sweep, labelled with the scale or
    the network evaluations, and the methods outside of sweeps as single points. Without any of these, one chart per
    metric against the scale.
    """
    families: dict[str, list[tuple[float, str]]] = {}
    chosen = run.config["report"]["curve"]
    for name, method in run.config["methods"].items():
        swept = method["swept"]
        if isinstance(swept.get("scale"), (int, float)):
            families.setdefault(method["family"], []).append((float(swept["scale"]), name))
        elif chosen and "steps" in swept:
            families.setdefault(method["family"], []).append((len(families.get(method["family"], [])), name))
    if not families:
        return []
    shown = shown_metrics(run)
    trade_off = next((p for p in TRADE_OFFS if set(p) <= set(shown)), None)
    pairs = [(chosen[0], up) for up in chosen[1:]] if chosen else [trade_off] if trade_off else []
    inside = {name for members in families.values() for _, name in members}
    charts = []

    def axis(metric: str) -> str:
        return heading(run.metric(metric))

    for task, cells in run.table.items():

        def value(name: str, metric: str, cells=cells) -> float | None:
            return cell_of(cells.get(name), metric, None).value

        def label(name: str, scale: float, cells=cells) -> str:
            return f"{scale:g}" if "scale" in run.config["methods"][name]["swept"] else str(cells[name]["cost"]["nfe"])

        for across, up in pairs:
            series = []
            # Without the baselines: far from every sampler, they would squeeze the curve into a point.
            others = [n for n in cells if n not in inside and run.config["methods"][n]["sampler"] not in BASELINES]
            for name in others:
                point = (value(name, across), value(name, up), "")
                series.append({"name": method_title(run, name), "line": False, "points": [point]})
            for family, members in families.items():
                members = [(s, n) for s, n in sorted(members) if n in cells]
                points = [(value(n, across), value(n, up), label(n, s)) for s, n in members]
                scaled = members and "scale" in run.config["methods"][members[0][1]]["swept"]
                said = " (labels: scale s)" if scaled else ""
                series.append({"name": family_title(run, family) + said, "line": True, "points": points})
            charts.append({"title": task_title(run, task), "x": axis(across), "y": axis(up), "series": series})
        for metric in [] if pairs else shown:
            series = []
            for family, members in families.items():
                points = [(scale, value(name, metric), "") for scale, name in sorted(members)]
                series.append({"name": family_title(run, family), "line": True, "points": points})
            charts.append(
                {"title": task_title(run, task), "x": "guidance scale s", "y": axis(metric), "series": series}
            )
    for chart in charts:
        for series in chart["series"]:
            series["points"] = [p for p in series["points"] if p[0] is not None and p[1] is not None
                                and math.isfinite(p[0]) and math.isfinite(p[1])]  # fmt: skip
        chart["series"] = [s for s in chart["series"] if s["points"]]
    return [chart for chart in charts if chart["series"]]


def heading(metric: Metric) -> str:
    """The label with the arrow that says which way is better."""
    return f"{metric.label} {ARROWS[metric.better]}".strip()
