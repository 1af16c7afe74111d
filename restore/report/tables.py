"""Tables and charts of a report, as data: what each cell contains, independent of how it is displayed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from operators import RestoreError
from restore import disk
from restore.bench.baselines import BASELINES
from restore.bench.protocol import find_conflicts
from restore.bench.run import read_manifest
from restore.bench.schema import Benchmark
from restore.metrics.sets import FULL_PREFIX
from restore.metrics.table import GROUPS, Metric, find_metric

ARROWS = {1: "↑", -1: "↓", 0: ""}
# (x, y) of the trade-off chart: the first pair that was measured.
TRADE_OFFS = (("lpips", "fid"), ("lpips", "psnr"), ("ssim", "psnr"), ("residual_ratio", "psnr"))

Column = tuple[str, str]  # (task, metric)


@dataclass(frozen=True)
class Cell:
    """One number with its interval [low, high].

    done, expected: images it was computed on and should have been. published: the paper's number. best: of its column.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    done: int = 0
    expected: int = 0
    published: float | None = None
    best: bool = False

    @property
    def incomplete(self) -> bool:
        return self.done < self.expected


@dataclass
class Run:
    """A benchmark folder as a report reads it. results: task to method to its entry of metrics.json."""

    folder: Path
    config: dict[str, Any]
    protocol: dict[str, Any]
    results: dict[str, dict[str, Any]]
    own_metrics: dict[str, list] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.config["title"] or self.config["name"]

    @property
    def columns(self) -> list[str]:
        """The metrics that are columns, in the order of the configuration."""
        names = self.config["report"]["columns"] or self.config["metrics"]["names"]
        names = [member for name in names for member in GROUPS.get(name, (name,))]
        computed = [n for cells in self.results.values() for cell in cells.values() for n in cell["set_values"]]
        full = (n for n in computed if n.startswith(FULL_PREFIX))
        full = (n for n in full if n.removesuffix("_std") == n or n.removesuffix("_std") not in computed)
        return list(dict.fromkeys([*names, *full]))

    def find_metric(self, name: str) -> Metric:
        """Return how a metric is shown; those from outside the package as the run recorded them, or by their name: a
        report imports nothing, as the run may be somebody else's. Raises RestoreError for an unknown name."""
        if name in self.own_metrics:
            label, better, digits, meaning = self.own_metrics[name]
            return Metric(str(label), int(better), int(digits), str(meaning))
        return Metric(name, 0, 3, name) if ":" in name else find_metric(name)

    def method_title(self, method: str) -> str:
        entry = self.config["methods"].get(method)
        return (entry and entry["title"]) or self.config["published"]["titles"].get(method) or method

    def task_title(self, task: str) -> str:
        return self.config["tasks"][task]["title"] or task

    def image_title(self, task: str, name: str) -> str:
        """Return the name of a picture: its class if the task lists classes, else its file's."""
        labels = self.config["tasks"][task]["labels"]
        if isinstance(labels, list) and name.isdecimal():
            label = labels[int(name) % len(labels)]
            return f"{name}, class {label}"
        return name

    def iterate_cells(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield (title of the task, title of the method, entry of metrics.json)."""
        for task, cells in self.results.items():
            for method, cell in cells.items():
                yield self.task_title(task), self.method_title(method), cell


@dataclass
class Table:
    """Rows by method: (title, cells by column). titles: of the tasks."""

    columns: list[Column]
    metrics: dict[str, Metric]
    titles: dict[str, str]
    rows: list[tuple[str, dict[Column, Cell]]] = field(default_factory=list)

    @property
    def heads(self) -> list[tuple[str, int]]:
        """The title of each task and the number of its columns, from left to right."""
        tasks = [task for task, _ in self.columns]
        return [(self.titles[task], tasks.count(task)) for task in dict.fromkeys(tasks)]


@dataclass(frozen=True)
class ProtocolDifference:
    """Why two runs cannot share a table: their titles, and key to the pair of values of all that differs."""

    first: str
    second: str
    values: dict[str, tuple]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The keys and values as text, hashes abbreviated."""
        rows = []
        for key, pair in self.values.items():
            texts = ("—" if value is None else str(value) for value in pair)
            rows.append((key, *(re.sub("^([0-9a-f]{16})[0-9a-f]{48}$", r"\1…", text) for text in texts)))
        return rows


def read_run(folder: str | Path) -> Run:
    """Read a finished run. Raises RestoreError if the folder has no run, no results, or damaged files."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    path = folder / "metrics.json"
    if not path.is_file():
        raise RestoreError(f"{folder} has no metrics.json: the run has not finished; run the benchmark again to go on")
    metrics, config = disk.read_json(path), manifest["config"]
    if not isinstance(metrics, dict) or not isinstance(metrics.get("table"), dict):
        raise RestoreError(f"{path} is damaged; run the benchmark again, which measures anew")
    for names, what in ((metrics["table"], "tasks"), *((cells, "methods") for cells in metrics["table"].values())):
        disk.require_file_names(names, f"{what} of {path}")  # pictures are read by them
    missing = [item.name for item in dataclasses.fields(Benchmark) if item.name not in config]
    if missing:
        raise RestoreError(f"{folder / 'run.json'} is damaged: its configuration has no {', '.join(missing)}")
    return Run(folder, config, manifest["protocol"], metrics["table"], metrics.get("shown", {}))


def make_cell(entry: Mapping[str, Any] | None, metric: str, published: float | None = None) -> Cell:
    """Return the cell of one metric from a (task, method) entry of metrics.json; None: only published."""
    if entry is None:
        return Cell(None, published=published)
    counts = {"done": entry["done"], "expected": entry["expected"], "published": published}
    if metric in entry["means"]:
        m = entry["means"][metric]
        value = math.inf if m["mean"] is None and metric == "psnr" else m["mean"]
        return Cell(value, m["low"], m["high"], **counts)
    if metric in entry["set_values"]:
        value, deviation = entry["set_values"][metric], entry["set_values"].get(f"{metric}_std")
        # Only rounding: every subset was the whole set, and no deviation is known.
        if deviation is None or deviation < max(1e-4 * abs(value), 1e-6):
            return Cell(value, **counts)
        return Cell(value, value - deviation, value + deviation, **counts)
    return Cell(entry["cost"].get(metric), **counts)


def build_results_table(runs: Sequence[Run]) -> Table:
    """Build one table of runs with comparable protocols: columns of all, rows of each, published-only rows last."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.config["tasks"]))
    columns = list(dict.fromkeys((task, m) for run in runs for task in run.config["tasks"] for m in run.columns))
    columns.sort(key=lambda column: tasks.index(column[0]))
    metrics = {metric: run.find_metric(metric) for run in reversed(runs) for metric in run.columns}
    titles = {task: run.task_title(task) for run in reversed(runs) for task in run.config["tasks"]}
    table = Table(columns, metrics, titles)
    for run in runs:
        published = run.config["published"]["values"]
        prefix = f"{run.title}: " if len(runs) > 1 else ""
        for method in dict.fromkeys([*run.config["methods"], *published]):
            row = {}
            for task, metric in columns:
                paper = ((published.get(method) or {}).get(task) or {}).get(metric)
                row[task, metric] = make_cell(run.results.get(task, {}).get(method), metric, paper)
            table.rows.append((prefix + run.method_title(method), row))
    for column in columns:
        _mark_best(table, column)
    return table


def _mark_best(table: Table, column: Column) -> None:
    """Mark the best complete cells of a column whose metric has a direction, if there are several to compare."""
    metric = table.metrics[column[1]]
    # Rounded as displayed: a digit that nobody sees decides nothing.
    scores = [
        (row, round(row[column].value, metric.digits) * metric.better)
        for _, row in table.rows
        if row[column].value is not None and math.isfinite(row[column].value) and not row[column].incomplete
    ]
    if metric.better and len(scores) > 1:
        top = max(score for _, score in scores)
        for row, score in scores:
            row[column] = dataclasses.replace(row[column], best=score == top)


def group_runs(runs: Sequence[Run]) -> tuple[list[list[Run]], list[ProtocolDifference]]:
    """Return the groups of runs that may share a table, and how the protocols of each pair of groups differ."""
    groups: list[list[Run]] = []
    for run in runs:
        group = next((group for group in groups if not find_conflicts(group[0].protocol, run.protocol)), [])
        if not group:
            groups.append(group)
        group.append(run)
    pairs = combinations((group[0] for group in groups), 2)
    return groups, [ProtocolDifference(a.title, b.title, find_conflicts(a.protocol, b.protocol)) for a, b in pairs]


def split_table(table: Table, limit: int = 10) -> list[Table]:
    """Cut a table between tasks into parts of at most `limit` columns each, so that a page can hold them."""
    parts: list[list[Column]] = []
    for task in dict.fromkeys(task for task, _ in table.columns):
        columns = [column for column in table.columns if column[0] == task]
        if parts and len(parts[-1]) + len(columns) <= limit:
            parts[-1] += columns
        else:
            parts.append(columns)
    return [dataclasses.replace(table, columns=columns) for columns in parts]


def format_number(value: float | None, digits: int) -> str:
    """Return a number as displayed: "—" for None and NaN."""
    if value is None or math.isnan(value):
        return "—"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def format_heading(metric: Metric) -> str:
    """Return the metric's label with an arrow that says which direction is better."""
    return f"{metric.label} {ARROWS[metric.better]}".strip()


def build_charts(run: Run) -> list[dict[str, Any]]:
    """Return charts over a swept guidance scale, number of steps or layers, as data for figures.place_chart.

    If the configuration's report names a `curve`: its first metric on the x axis and every other one on the y axis, a
    chart for each and each task; else, for a swept scale, the first of TRADE_OFFS that was measured; else one chart
    per metric against the scale or the layer (PAG, Figures 38 and 40), for sets of layers of several sizes against
    their number, with the mean of each (Figure 39). Each sweep is a line, labelled with the scale or the number of
    network evaluations, and the other methods are single points.
    """
    methods, curve = run.config["methods"], run.config["report"]["curve"]
    families: dict[str, list[tuple[float, str]]] = {}
    for name, method in methods.items():
        scale, members = method["swept"].get("scale"), families.get(method["family"], [])
        if isinstance(scale, (int, float)):
            families[method["family"]] = [*members, (float(scale), name)]
        elif "layers" in method["swept"] or (curve and "steps" in method["swept"]):
            families[method["family"]] = [*members, (len(members), name)]
    if not families:
        return []
    pairs = [(curve[0], y) for y in curve[1:]] if curve else [p for p in TRADE_OFFS if set(p) <= set(run.columns)][:1]
    pairs = pairs or [(None, metric) for metric in run.columns]
    charts = [_build_chart(run, task, x, y, [*families.values()]) for task in run.results for x, y in pairs]
    return [chart for chart in charts if chart["series"]]


def _build_chart(run: Run, task: str, x: str | None, y: str, families: list[list[tuple[float, str]]]) -> dict[str, Any]:
    """One chart. families: of swept methods, each a list of (scale or index, method)."""
    methods, cells = run.config["methods"], run.results[task]

    def place(name: str, scale: float, label: str) -> tuple[float | None, float | None, str]:
        return make_cell(cells[name], x).value if x else scale, make_cell(cells[name], y).value, label if x else ""

    swept = {name for members in families for _, name in members}
    # Without the baselines: far from every sampler, they would squeeze the curve into a point.
    others = [name for name in cells if x and name not in swept and methods[name]["sampler"] not in BASELINES]
    series = [{"name": run.method_title(name), "line": False, "points": [place(name, 0, "")]} for name in others]
    ticks: dict[float, str] = {}
    for members in families:
        first = methods[members[0][1]]
        if not x and "layers" in first["swept"]:
            lines, ticks = _place_layers(run, [name for _, name in members if name in cells], place)
            series += lines
            continue
        points = []
        for scale, name in sorted(members):
            if name in cells:
                own = methods[name]["swept"]
                label = f"{scale:g}" if "scale" in own else str(cells[name]["cost"].get("nfe"))
                points.append(place(name, scale, _join(own["layers"]) if "layers" in own else label))
        legend = " (labels: scale s)" if x and "scale" in first["swept"] else ""
        series.append({"name": first["family_title"] + legend, "line": True, "points": points})
    for line in series:
        line["points"] = [p for p in line["points"] if all(v is not None and math.isfinite(v) for v in p[:2])]
    own = "guidance scale s" if not ticks else "number of layers" if "1" in ticks.values() else "layer"
    x_title = format_heading(run.find_metric(x)) if x else own
    titles = {"title": run.task_title(task), "x": x_title, "y": format_heading(run.find_metric(y)), "ticks": ticks}
    return {**titles, "series": [line for line in series if line["points"]]}


def _join(layers: str | Sequence[str]) -> str:
    return layers if isinstance(layers, str) else "+".join(layers)


def _place_layers(run: Run, names: Sequence[str], place: Callable) -> tuple[list[dict[str, Any]], dict[float, str]]:
    """Return the lines of a sweep over sets of layers, and the names of positions on its x axis.

    Sets of one size stand side by side; those of several over their number of layers, with the mean of each number.
    """
    methods = run.config["methods"]
    sets = {name: methods[name]["swept"]["layers"] for name in names}
    title = methods[names[0]]["family_title"] if names else ""
    sizes = sorted({len(_join(layers).split("+")) for layers in sets.values()})
    if len(sizes) == 1:
        points = [place(name, i, "") for i, name in enumerate(sets)]
        return [{"name": title, "line": True, "points": points}], {
            i: _join(layers) for i, layers in enumerate(sets.values())
        }
    points = [place(name, len(_join(layers).split("+")), "") for name, layers in sets.items()]
    means = []
    for size in sizes:
        values = [value for position, value, _ in points if position == size and value is not None]
        means += [(size, sum(values) / len(values), "")] if values else []
    lines = [{"name": title, "line": False, "points": points}, {"name": "mean", "line": True, "points": means}]
    return lines, {size: str(size) for size in sizes}
