"""A report as Markdown: the same tables, for diffs, issues and terminals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from restore.bench.protocol import flatten
from restore.report import tables
from restore.report.tables import ARROWS, METRICS, Run, Table, number
from restore.report.words import COST_HEADS, cost_rows, summary_line, warnings_of


def intro(runs: Sequence[Run]) -> list[str]:
    """What the runs are: source, warnings, notes."""
    lines = []
    for run in runs:
        if run.config["source"]:
            lines.append(f"{run.title + ': ' if len(runs) > 1 else ''}{run.config['source']}")
        lines += [f"- {note}" for note in [*warnings_of(run), *(run.config["notes"] or [])]]
    return lines


def apart(differing) -> list[str]:
    """How the protocols of runs differ that may not share a table."""
    lines = ["", "## These runs cannot share a table"]
    for a, b, found in differing:
        lines += ["", f"| differs in | {a.title} | {b.title} |", "|---|---|---|"]
        lines += [f"| {key} | {_bar(left)} | {_bar(right)} |" for key, (left, right) in found.items()]
    return lines


def results(table: Table, group: Sequence[Run]) -> list[str]:
    """The table of a group of runs with its protocol in a sentence."""
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
                text += f" / published {number(cell.published, digits)}"
            cells.append(text)
        lines.append(f"| {_bar(title)} | " + " | ".join(cells) + " |")
    key = "In brackets: 95 % bootstrap intervals over images; for KID and IS one standard deviation over subsets."
    return [*lines, "", key, *(f"\nProtocol: {summary_line(run)}" for run in group)]


def cost(group: Sequence[Run]) -> list[str]:
    """Time and memory of every cell."""
    rows = cost_rows(group)
    head = "| task | method | " + " | ".join(COST_HEADS) + " |"
    lines = [f"| {_bar(t)} | {_bar(m)} | " + " | ".join(map(_bar, values)) + " |" for t, m, values in rows]
    return ["", "### Cost", "", head, "|---" * (len(COST_HEADS) + 2) + "|", *lines] if rows else []


def protocol(run: Run) -> list[str]:
    """Everything that decides the numbers of a run."""
    lines = [f"| {_bar(key)} | {_bar(value)} |" for key, value in flatten(run.protocol).items()]
    return ["", f"### Protocol of {run.title}", "", "| | |", "|---|---|", *lines]


def _bar(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
