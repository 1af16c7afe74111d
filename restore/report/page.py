"""A report as one HTML page with everything inside it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from restore.bench.protocol import flatten
from restore.report import figures, tables
from restore.report.style import CSS
from restore.report.tables import ARROWS, METRICS, Cell, Run, Table, number
from restore.report.words import COST_HEADS, cost_rows, summary_line, warnings_of


def document(title: str, parts: Sequence[str]) -> str:
    """A complete page from its parts, which are HTML already."""
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>'
    return f"{head}<body><main><h1>{html.escape(title)}</h1>{''.join(parts)}</main></body></html>\n"


def intro(runs: Sequence[Run]) -> str:
    """What the runs are: source, warnings, notes."""
    out = []
    for run in runs:
        source = run.config["source"]
        head = f"<strong>{html.escape(run.title)}</strong>" if len(runs) > 1 else ""
        if source:
            head += f" <span class='source'>{html.escape(source)}</span>"
        out.append(f"<p>{head}</p>")
        for style, notes in (("warnings", warnings_of(run)), ("notes", run.config["notes"] or [])):
            items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
            out.append(f"<ul class='{style}'>{items}</ul>" if items else "")
    return "".join(out)


def apart(differing) -> str:
    """How the protocols of runs differ that may not share a table."""
    out = ["<h2>These runs cannot share a table</h2>"]
    for a, b, found in differing:
        rows = "".join(
            f"<tr><th>{html.escape(key)}</th><td>{_brief(left)}</td><td>{_brief(right)}</td></tr>"
            for key, (left, right) in found.items()
        )
        out.append(
            f'<div class="scroll"><table class="flat"><thead><tr><th>differs in</th><th>{html.escape(a.title)}</th>'
            f"<th>{html.escape(b.title)}</th></tr></thead><tbody>{rows}</tbody></table></div>"
        )
    return "".join(out)


def _brief(value: Any) -> str:
    """A value of a protocol in a table cell; hashes by their beginning."""
    text = "—" if value is None else str(value)
    hexadecimal = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return html.escape(text[:16] + "…" if hexadecimal else text)


def _cell(cell: Cell, digits: int) -> str:
    value = number(cell.value, digits)
    value = f"<strong>{value}</strong>" if cell.best else value
    out = [f"<span class='value'>{value}</span>"]
    if cell.low is not None and cell.high is not None:
        out.append(f"<span class='interval'>{number(cell.low, digits)}–{number(cell.high, digits)}</span>")
    if cell.incomplete:
        out.append(f"<span class='incomplete'>{cell.done} of {cell.expected}</span>")
    if cell.published is not None:
        out.append(f"<span class='published'>published {number(cell.published, digits)}</span>")
    return f"<td>{''.join(out)}</td>"


def _heads(table: Table, group: Sequence[Run]) -> list[tuple[str, int]]:
    """Task titles with the number of columns under each."""
    titles = {task: tables.task_title(run, task) for run in reversed(group) for task in run.config["tasks"]}
    tasks = [task for task, _ in table.columns]
    return [(titles[task], tasks.count(task)) for task in dict.fromkeys(tasks)]


def results(table: Table, group: Sequence[Run]) -> str:
    """The table of a group of runs with its protocol in a sentence."""
    key = "Bold: best of its column. Small: 95 % bootstrap interval over images (for KID and IS: one standard deviation"
    key += " over subsets). Italic: published. Residual near 1 explains the measurement up to its noise."
    protocols = "".join(f"<p class='protocol'>{html.escape(summary_line(run))}</p>" for run in group)
    return "".join(_result_table(part, group) for part in tables.split(table)) + f"<p class='key'>{key}</p>{protocols}"


def _result_table(table: Table, group: Sequence[Run]) -> str:
    heads = "".join(f'<th colspan="{n}" class="task">{html.escape(title)}</th>' for title, n in _heads(table, group))
    names = "".join(
        f'<th title="{html.escape(METRICS[m].meaning)}">{METRICS[m].label} {ARROWS[METRICS[m].better]}</th>'
        for _, m in table.columns
    )
    body = "".join(
        f"<tr><th>{html.escape(title)}</th>{''.join(_cell(row[c], METRICS[c[1]].digits) for c in table.columns)}</tr>"
        for title, row in table.rows
    )
    return (
        f'<div class="scroll"><table class="results"><thead><tr><th></th>{heads}</tr><tr><th></th>{names}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def curves(group: Sequence[Run]) -> str:
    """Charts over the guidance scale, where one was swept."""
    charts = [figures.chart(chart) for run in group for chart in tables.curves(run)]
    return f"<h3>Trade-off over the guidance scale</h3><div class='charts'>{''.join(charts)}</div>" if charts else ""


def chosen_methods(run: Run, task: str, limit: int = 6) -> list[str]:
    """Methods for a picture grid: all, or of each sweep the first, middle and last value."""
    names = [m for m in run.table.get(task, {}) if run.table[task][m]["done"]]
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(run.config["methods"][name]["family"], []).append(name)
    if len(names) > limit:
        families = {k: sorted({v[0], v[len(v) // 2], v[-1]}, key=v.index) for k, v in families.items()}
    return [name for members in families.values() for name in members][: limit + 2]


def pictures(group: Sequence[Run]) -> str:
    """Measurement, methods, truth and spread of images spread evenly over the set."""
    out = []
    for run in group:
        for task in run.table:
            methods = chosen_methods(run, task)
            grids = _grid(run, task, methods) if methods else ""
            if grids:
                out.append(f"<h4>{html.escape(tables.task_title(run, task))}</h4>{grids}")
    note = "<p class='key'>Evenly spread over the set, not chosen. A spread map is white at 0.5 on [-1, 1].</p>"
    return f"<h3>Pictures</h3>{note}{''.join(out)}" if out else ""


def _grid(run: Run, task: str, methods: list[str]) -> str:
    folder = run.folder / "results" / task
    ids = sorted(path.stem for path in (folder / methods[0]).glob("*.png"))
    count = min(run.config["report"]["pictures"], len(ids))
    # Evenly over the set, not a choice: nobody picked these.
    ids = [ids[i * len(ids) // count] for i in range(count)]
    if not ids:
        return ""
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
    return figures.picture_grid([columns[i] for i in kept], [(n, [p[i] for i in kept]) for n, p in rows])


def cost(group: Sequence[Run]) -> str:
    """Time and memory of every cell."""
    rows = cost_rows(group)
    if not rows:
        return ""
    head = "".join(f"<th>{h}</th>" for h in ("task", "method", *COST_HEADS))
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in (task, method, *values)) + "</tr>"
        for task, method, values in rows
    )
    table = f'<div class="scroll"><table class="flat"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<h3>Cost</h3><details><summary>Time and memory of {len(rows)} cells</summary>{table}</details>"


def protocol(run: Run) -> str:
    """Everything that decides the numbers of a run."""
    rows = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in flatten(run.protocol).items()
    )
    return (
        f"<h3>Protocol of {html.escape(run.title)}</h3><details><summary>Everything that decides these numbers"
        f' </summary><div class="scroll"><table class="flat"><tbody>{rows}</tbody></table></div></details>'
    )
