"""Reports of benchmark runs for people: one self-contained HTML file and the same tables in Markdown."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from operators import RestoreError
from restore import atomic
from restore.evaluation import figures, tables
from restore.evaluation.protocol import flatten
from restore.evaluation.style import CSS
from restore.evaluation.tables import ARROWS, METRICS, Cell, Run, Table, number


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
    folder = Path(out) if out else read[0].folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RestoreError(f"{folder} cannot be made: {atomic.reason(error)}; choose another folder") from error
    title = read[0].title if len(read) == 1 else "Benchmark report"
    parts = [f"<h1>{html.escape(title)}</h1>", _intro(read)]
    lines = [f"# {title}", "", *_intro_markdown(read)]
    if apart:
        parts.append(_apart(apart))
        lines += _apart_markdown(apart)
    for group in groups:
        table = tables.build_table(group)
        heading = " and ".join(run.title for run in group)
        if len(groups) > 1 or len(group) > 1:
            parts.append(f"<h2>{html.escape(heading)}</h2>")
            lines += ["", f"## {heading}"]
        parts += [_results(table, group), _curves(group), "" if private else _pictures(group), _cost(group)]
        parts += [_protocol(run) for run in group]
        lines += _results_markdown(table, group) + _cost_markdown(group)
        for run in group:
            lines += _protocol_markdown(run)
    page = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    page += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    page += f"<style>{CSS}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    written = Report(folder / "report.html", folder / "report.md", [(a.title, b.title, d) for a, b, d in apart])
    atomic.write_bytes(written.html, page.encode("utf-8"))
    atomic.write_bytes(written.markdown, ("\n".join(lines).strip() + "\n").encode("utf-8"))
    return written


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
    fidelity = metrics.get("fidelity", {}).get("implementation", "")
    parts = [what, noise, f"seed {p['seed']}", backbone, p["precision"], metrics.get("lpips", ""), fidelity]
    return "; ".join(part for part in parts if part) + "."


def notes_of(run: Run) -> list[str]:
    """What a reader must know before believing the table."""
    notes = list(run.config["notes"] or [])
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
    fidelity = run.protocol["metrics"].get("fidelity", {})
    own = [e["file"] for e in [*fidelity.values(), run.protocol["metrics"].get("lpips_weights")]
           if isinstance(e, dict) and not e.get("published", True)]  # fmt: skip
    if own:
        notes.append(
            f"Metrics used weights that are not the published ones ({', '.join(own)}): not comparable with papers."
        )
    return notes


def _intro(runs: Sequence[Run]) -> str:
    out = []
    for run in runs:
        source = run.config["source"]
        head = f"<strong>{html.escape(run.title)}</strong>" if len(runs) > 1 else ""
        if source:
            head += f" <span class='source'>{html.escape(source)}</span>"
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in notes_of(run))
        out.append(f"<p>{head}</p>" + (f"<ul class='notes'>{notes}</ul>" if notes else ""))
    return "".join(out)


def _intro_markdown(runs: Sequence[Run]) -> list[str]:
    lines = []
    for run in runs:
        if run.config["source"]:
            lines.append(f"{run.title + ': ' if len(runs) > 1 else ''}{run.config['source']}")
        lines += [f"- {note}" for note in notes_of(run)]
    return lines


def _apart(apart) -> str:
    out = ["<h2>These runs cannot share a table</h2>"]
    for a, b, found in apart:
        rows = "".join(
            f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v[0]))}</td><td>{html.escape(str(v[1]))}</td></tr>"
            for k, v in found.items()
        )
        out.append(
            f'<div class="scroll"><table class="flat"><thead><tr><th>differs in</th><th>{html.escape(a.title)}</th>'
            f"<th>{html.escape(b.title)}</th></tr></thead><tbody>{rows}</tbody></table></div>"
        )
    return "".join(out)


def _apart_markdown(apart) -> list[str]:
    lines = ["", "## These runs cannot share a table"]
    for a, b, found in apart:
        lines += ["", f"| differs in | {a.title} | {b.title} |", "|---|---|---|"]
        lines += [f"| {key} | {_bar(left)} | {_bar(right)} |" for key, (left, right) in found.items()]
    return lines


def _cell(cell: Cell, digits: int) -> str:
    value = number(cell.value, digits)
    value = f"<strong>{value}</strong>" if cell.best else value
    out = [f"<span class='value'>{value}</span>"]
    if cell.low is not None and cell.high is not None:
        out.append(f"<span class='interval'>{number(cell.low, digits)}–{number(cell.high, digits)}</span>")
    if cell.incomplete:
        out.append(f"<span class='incomplete'>{cell.done} of {cell.expected}</span>")
    if cell.published is not None:
        out.append(f"<span class='published'>published {cell.published:g}</span>")
    return f"<td>{''.join(out)}</td>"


def _heads(table: Table, group: Sequence[Run]) -> list[tuple[str, int]]:
    """Task titles with the number of columns under each."""
    titles = {task: tables.task_title(run, task) for run in reversed(group) for task in run.config["tasks"]}
    tasks = [task for task, _ in table.columns]
    return [(titles[task], tasks.count(task)) for task in dict.fromkeys(tasks)]


def _results(table: Table, group: Sequence[Run]) -> str:
    heads = "".join(f'<th colspan="{n}" class="task">{html.escape(title)}</th>' for title, n in _heads(table, group))
    names = "".join(
        f'<th title="{html.escape(METRICS[m].meaning)}">{METRICS[m].label} {ARROWS[METRICS[m].better]}</th>'
        for _, m in table.columns
    )
    body = "".join(
        f"<tr><th>{html.escape(title)}</th>{''.join(_cell(row[c], METRICS[c[1]].digits) for c in table.columns)}</tr>"
        for title, row in table.rows
    )
    key = "Bold: best of its column. Small: 95 % bootstrap interval over images (for KID and IS: one standard deviation"
    key += " over subsets). Grey: published. Residual near 1 explains the measurement up to its noise."
    protocols = "".join(f"<p class='protocol'>{html.escape(summary_line(run))}</p>" for run in group)
    return (
        f'<div class="scroll"><table class="results"><thead><tr><th></th>{heads}</tr><tr><th></th>{names}</tr></thead>'
        f"<tbody>{body}</tbody></table></div><p class='key'>{key}</p>{protocols}"
    )


def _results_markdown(table: Table, group: Sequence[Run]) -> list[str]:
    titles = {task: tables.task_title(run, task) for run in reversed(group) for task in run.config["tasks"]}
    several = len({task for task, _ in table.columns}) > 1
    heads = [f"{titles[t] + ': ' if several else ''}{METRICS[m].label} {ARROWS[METRICS[m].better]}".strip()
             for t, m in table.columns]  # fmt: skip
    lines = ["", "| method | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for title, row in table.rows:
        cells = []
        for column in table.columns:
            cell, digits = row[column], METRICS[column[1]].digits
            text = f"**{number(cell.value, digits)}**" if cell.best else number(cell.value, digits)
            if cell.low is not None and cell.high is not None:
                text += f" ({number(cell.low, digits)}–{number(cell.high, digits)})"
            if cell.incomplete:
                text += f" [{cell.done} of {cell.expected} images]"
            if cell.published is not None:
                text += f" / published {cell.published:g}"
            cells.append(text)
        lines.append(f"| {_bar(title)} | " + " | ".join(cells) + " |")
    key = "In brackets: 95 % bootstrap intervals over images; for KID and IS one standard deviation over subsets."
    return [*lines, "", key, *(f"\nProtocol: {summary_line(run)}" for run in group)]


def _curves(group: Sequence[Run]) -> str:
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


def _pictures(group: Sequence[Run]) -> str:
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


COST_HEADS = ("network evaluations", "seconds per image", "steps/s", "peak memory MB", "not sampling", "device")


def _cost_rows(group: Sequence[Run]) -> list[tuple[str, str, list[str]]]:
    rows = []
    for run in group:
        for task, cells in run.table.items():
            for method, cell in cells.items():
                c = cell["cost"]
                if c:
                    memory = f"{number(c['peak_memory_mb'], 0)} ({c['memory_of']})"
                    values = [str(c["nfe"]), number(c["seconds_per_image"], 3), number(c["iterations_per_second"], 2)]
                    values += [memory, f"{100 * c['overhead']:.1f} %", ", ".join(c["devices"])]
                    rows.append((tables.task_title(run, task), tables.method_title(run, method), values))
    return rows


def _cost(group: Sequence[Run]) -> str:
    rows = _cost_rows(group)
    if not rows:
        return ""
    head = "".join(f"<th>{h}</th>" for h in ("task", "method", *COST_HEADS))
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in (task, method, *values)) + "</tr>"
        for task, method, values in rows
    )
    table = f'<div class="scroll"><table class="flat"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<h3>Cost</h3><details><summary>Time and memory of {len(rows)} cells</summary>{table}</details>"


def _cost_markdown(group: Sequence[Run]) -> list[str]:
    rows = _cost_rows(group)
    head = "| task | method | " + " | ".join(COST_HEADS) + " |"
    lines = [f"| {_bar(t)} | {_bar(m)} | " + " | ".join(map(_bar, values)) + " |" for t, m, values in rows]
    return ["", "### Cost", "", head, "|---" * (len(COST_HEADS) + 2) + "|", *lines] if rows else []


def _protocol(run: Run) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in flatten(run.protocol).items()
    )
    return (
        f"<h3>Protocol of {html.escape(run.title)}</h3><details><summary>Everything that decides these numbers"
        f' </summary><div class="scroll"><table class="flat"><tbody>{rows}</tbody></table></div></details>'
    )


def _protocol_markdown(run: Run) -> list[str]:
    lines = [f"| {_bar(key)} | {_bar(value)} |" for key, value in flatten(run.protocol).items()]
    return ["", f"### Protocol of {run.title}", "", "| | |", "|---|---|", *lines]


def _bar(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
