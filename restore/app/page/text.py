"""Sentences and HTML that the page shows."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from restore.memory import Plan, format_range, widen

LONG = 300  # seconds from which on the page says what would be faster


def to_sentence(message: str) -> str:
    """Return a message with a full stop and a capital, unless it begins with a file's name."""
    first = message.split(" ")[0]
    start = first if "." in first or "-" in first else first[:1].upper() + first[1:]
    return start + message[len(first) :] + ("" if message[-1:] in ".…!?" else ".")


def hide_folders(message: str, *paths: str | Path | None) -> str:
    """Return a message without the folders that these files and folders lie in."""
    for path in map(Path, filter(None, paths)):
        for folder in (path / "out", path / "in", path, path.parent):
            message = message.replace(f"{folder}/", "")
    return message


def format_status(
    sentence: str, share: float | None = None, detail: str = "", lines: Sequence[str] = (), bad: bool = False
) -> str:
    """Return HTML with a sentence, a bar of the `share` done, a detail and the lines of earlier photos."""
    parts = [f'<p role="status">{html.escape(to_sentence(sentence))}</p>']
    if share is not None:
        parts.append(f'<progress aria-label="Progress" max="1" value="{share:.3f}"></progress>')
    parts += [f"<small>{html.escape(detail)}</small>"] if detail else []
    if lines:
        parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>")
    return f'<div class="status{" bad" if bad else ""}">{"".join(parts)}</div>'


def format_plan(plan: Plan, count: int, note: str = "") -> str:
    """Return HTML that says what the first of `count` photos takes, in plain words and below them in full.

    note: what was seen in it.
    """
    if not plan.fits:
        need, free = plan.memory / 1e9, plan.available / 1e9
        return f"<b>Too large for this machine:</b> it needs {need:.1f} GB of memory, {free:.1f} GB are free. Crop it."
    each = " for the first photo" if count > 1 else ""
    takes, advice = f"<b>Takes {format_range(*widen(plan.seconds, plan.busy))}</b>", ""
    if plan.seconds > LONG:
        pixels = plan.size[0] * plan.size[1]
        less = format_range(*widen(plan.seconds / 4, plan.busy))
        large = f": the result has {pixels / 1e6:.1f} million pixels" if pixels > 4e6 else ""
        advice = f"{large}. Cropped to a quarter of its area: {less}"
    seen = f"{html.escape(to_sentence(note))}<br>" if note else ""
    return f"{seen}{takes}{each}{advice}<br><small>{html.escape(plan.format())}</small>"


def label_versions(spread: Mapping[str, Any] | None = None) -> str:
    """Return what stands above several versions; spread: what the side-car says of it, if anything."""
    narrow = spread is not None and spread["verdict"] in ("too narrow", "estimates")
    what = "the truth may differ from them more than they do from each other" if narrow else "all equally likely"
    return f"Three versions, {what}"


def format_versions(plan: Plan) -> str:
    """Return HTML that offers more versions of a result; plan: of all of them."""
    takes = format_range(*widen(plan.seconds, plan.busy))
    crop = " Crop the photo to what matters, and it takes as much less." if plan.seconds > LONG else ""
    return (
        f"<b>What is guesswork?</b> {plan.samples} versions agree with your photo equally well and differ where they "
        f"guess. They take {takes}.{crop}<br><small>{html.escape(plan.format())}</small>"
    )
