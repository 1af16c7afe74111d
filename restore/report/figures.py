"""Small self-contained figures for reports: SVG charts and pictures as data URIs."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Okabe & Ito's colours, which stay apart for colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 290, 58, 16, 30, 46


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers covering [low, high], about `count` of them, one beyond each end."""
    if high <= low:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    rough = (high - low) / max(count - 1, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _label(value: float, step: float) -> str:
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9) + (1 if f'{step:e}'.startswith('2.5') else 0))}f}"


def chart(data: Mapping[str, Any]) -> str:
    """An SVG element: data["series"] of {name, line, points: [(x, y, label)]}, axis titles x and y, a title."""
    points = [p for series in data["series"] for p in series["points"]]
    x_ticks = ticks(min(p[0] for p in points), max(p[0] for p in points))
    y_ticks = ticks(min(p[1] for p in points), max(p[1] for p in points))
    # The legend is in HTML flow below the plot, one line per series, so that names of any length fit.
    height = HEIGHT + 16 * len(data["series"])

    def px(x: float) -> float:
        return LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    out = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img"'
        f' aria-label="{html.escape(data["title"])}">',
        f'<text x="{LEFT}" y="17" class="chart-title">{html.escape(data["title"])}</text>',
    ]
    for value in x_ticks:
        out.append(f'<line x1="{px(value):.1f}" x2="{px(value):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="grid"/>')
        text = _label(value, x_ticks[1] - x_ticks[0])
        out.append(f'<text x="{px(value):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{text}</text>')
    for value in y_ticks:
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(value):.1f}" y2="{py(value):.1f}" class="grid"/>')
        text = _label(value, y_ticks[1] - y_ticks[0])
        out.append(f'<text x="{LEFT - 6}" y="{py(value) + 4:.1f}" text-anchor="end">{text}</text>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    out.append(f'<text x="{middle_x}" y="{HEIGHT - 12}" text-anchor="middle">{html.escape(data["x"])}</text>')
    out.append(
        f'<text transform="translate(14 {middle_y}) rotate(-90)" text-anchor="middle">{html.escape(data["y"])}</text>'
    )
    for i, series in enumerate(data["series"]):
        colour = COLOURS[i % len(COLOURS)]
        places = [(px(x), py(y), label) for x, y, label in series["points"]]
        if series["line"] and len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
            dash = ' stroke-dasharray="5 3"' if i >= len(COLOURS) else ""  # the colours begin again
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        for x, y, label in places:
            if series["line"]:
                out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" fill="{colour}"/>')
            else:
                out.append(f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>')
            if label:
                # Beside the point, and never over the right edge.
                right = x > WIDTH - 60
                anchor, dx = ("end", -6) if right else ("start", 6)
                out.append(f'<text x="{x + dx:.1f}" y="{y - 5:.1f}" text-anchor="{anchor}">{html.escape(label)}</text>')
        y = HEIGHT + 16 * i + 4
        out.append(f'<rect x="{LEFT}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        out.append(f'<text x="{LEFT + 16}" y="{y}">{html.escape(series["name"])}</text>')
    return "\n".join([*out, "</svg>"])


def heat_map(data: Mapping[str, Any]) -> str:
    """An SVG element: data["rows"] of (name, [(value, note) or None]), below 0 blue and above 0 orange; digits, title,
    and what the columns are (`x`)."""
    rows = data["rows"]
    columns = max(len(cells) for _, cells in rows)
    top = max((abs(cell[0]) for _, cells in rows for cell in cells if cell), default=0) or 1
    wide, high, left = 58 if columns <= 16 else 22, 22, 20 + 7 * max(len(name) for name, _ in rows)
    width, height = max(left + wide * columns + 8, WIDTH), TOP + high * len(rows) + 40
    out = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
        f' aria-label="{html.escape(data["title"])}">',
        f'<text x="6" y="17" class="chart-title">{html.escape(data["title"])}</text>',
    ]
    for i, (name, cells) in enumerate(rows):
        y = TOP + high * i
        out.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{html.escape(name)}</text>')
        for j, cell in enumerate(cells):
            if cell is None:
                continue
            share, x = min(abs(cell[0]) / top, 1), left + wide * j
            full = (0, 114, 178) if cell[0] < 0 else (213, 94, 0)
            colour = "#" + "".join(f"{round(255 + share * (c - 255)):02x}" for c in full)
            out.append(f'<g><title>{html.escape(cell[1])}</title><rect x="{x}" y="{y}" width="{wide - 2}"')
            out.append(f' height="{high - 2}" fill="{colour}"/>')
            if wide > 22:
                ink = "#ffffff" if share > 0.6 else "#1b1f24"
                text = f'<text x="{x + wide / 2 - 1}" y="{y + 14}" text-anchor="middle" style="fill:{ink}">'
                out.append(f"{text}{cell[0]:+.{data['digits']}f}</text>")
            out.append("</g>")
    y = TOP + high * len(rows) + 14
    out += [f'<text x="{left + wide * (j + 0.5) - 1}" y="{y}" text-anchor="middle">{j}</text>' for j in range(columns)]
    middle = left + wide * columns / 2
    out.append(f'<text x="{middle}" y="{y + 18}" text-anchor="middle">{html.escape(data["x"])}</text>')
    return "\n".join([*out, "</svg>"])


def data_uri(path: Path) -> str:
    """A PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
