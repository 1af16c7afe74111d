"""Reports of benchmark runs for people: one self-contained HTML file and the same tables in Markdown."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from operators import RestoreError
from restore import atomic
from restore.report import markdown, page, tables


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
    parts, lines = [page.intro(read)], [f"# {title}", "", *markdown.intro(read)]
    if apart:
        parts.append(page.apart(apart))
        lines += markdown.apart(apart)
    for group in groups:
        table = tables.build_table(group)
        if len(groups) > 1 or len(group) > 1:
            heading = " and ".join(run.title for run in group)
            parts.append(f"<h2>{html.escape(heading)}</h2>")
            lines += ["", f"## {heading}"]
        parts += [page.results(table, group), page.curves(group), "" if private else page.pictures(group)]
        parts += [page.cost(group), *(page.protocol(run) for run in group)]
        lines += [*markdown.results(table, group), *markdown.cost(group)]
        lines += [line for run in group for line in markdown.protocol(run)]
    written = Report(folder / "report.html", folder / "report.md", [(a.title, b.title, d) for a, b, d in apart])
    atomic.write_bytes(written.html, page.document(title, parts).encode("utf-8"))
    atomic.write_bytes(written.markdown, ("\n".join(lines).strip() + "\n").encode("utf-8"))
    return written
