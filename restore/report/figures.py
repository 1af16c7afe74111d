"""Small self-contained figures for reports: SVG charts, and PNG files as data URIs."""

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


def choose_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers that cover [low, high]."""
    if high <= low:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    rough = (high - low) / max(count - 1, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _format_tick(value: float, ticks: list[float]) -> str:
    step = ticks[1] - ticks[0]
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9) + f'{step:e}'.startswith('2.5'))}f}"


def _open_svg(title: str, x: int, width: float, height: float) -> list[str]:
    title = html.escape(title)
    return [
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
        f' aria-label="{title}">',
        f'<text x="{x}" y="17" class="chart-title">{title}</text>',
    ]


def _draw_text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def draw_chart(data: Mapping[str, Any]) -> str:
    """Return an SVG element of data["series"], a list of {name, line, points: [(x, y, label)]}.

    data["title"], data["x"], data["y"]: titles of the chart and its axes.
    """
    points = [p for series in data["series"] for p in series["points"]]
    x_ticks, y_ticks = (choose_ticks(min(p[i] for p in points), max(p[i] for p in points)) for i in (0, 1))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def to_x(value: float) -> float:
        return LEFT + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - LEFT)

    def to_y(value: float) -> float:
        return bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - TOP)

    # The legend is below the plot, one line per series, so that names of any length fit.
    out = _open_svg(data["title"], LEFT, WIDTH, HEIGHT + 16 * len(data["series"]))
    for value in x_ticks:
        x = to_x(value)
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" class="grid"/>')
        out.append(_draw_text(x, bottom + 15, _format_tick(value, x_ticks)))
    for value in y_ticks:
        y = to_y(value)
        out.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        out.append(_draw_text(LEFT - 6, y + 4, _format_tick(value, y_ticks), "end"))
    out.append(_draw_text((LEFT + right) / 2, HEIGHT - 12, data["x"]))
    out.append(f'<g transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)">{_draw_text(0, 0, data["y"])}</g>')
    for i, series in enumerate(data["series"]):
        colour = COLOURS[i % len(COLOURS)]
        places = [(to_x(x), to_y(y), label) for x, y, label in series["points"]]
        if series["line"] and len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
            dash = ' stroke-dasharray="5 3"' if i >= len(COLOURS) else ""  # the colours begin again
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        for x, y, label in places:
            if series["line"]:
                out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" fill="{colour}"/>')
            else:
                out.append(f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>')
            if label:  # beside the point, and never over the right edge
                anchor, dx = ("end", -6) if x > WIDTH - 60 else ("start", 6)
                out.append(_draw_text(x + dx, y - 5, label, anchor))
        y = HEIGHT + 16 * i + 4
        out.append(f'<rect x="{LEFT}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        out.append(_draw_text(LEFT + 16, y, series["name"], "start"))
    return "\n".join([*out, "</svg>"])


def draw_heat_map(data: Mapping[str, Any]) -> str:
    """Return an SVG element of data["rows"], a list of (name, [(value, note) or None]).

    Values below 0 are blue, above 0 orange. data["title"]; data["x"]: what the columns are; data["digits"].
    """
    rows = data["rows"]
    columns = max(len(cells) for _, cells in rows)
    largest = max((abs(cell[0]) for _, cells in rows for cell in cells if cell), default=0) or 1
    cell_width, cell_height = 58 if columns <= 16 else 22, 22
    left, bottom = 20 + 7 * max(len(name) for name, _ in rows), TOP + cell_height * len(rows)
    out = _open_svg(data["title"], 6, max(left + cell_width * columns + 8, WIDTH), bottom + 40)
    for i, (name, cells) in enumerate(rows):
        y = TOP + cell_height * i
        out.append(_draw_text(left - 8, y + 15, name, "end"))
        for j, cell in enumerate(cells):
            if cell is None:
                continue
            share, x = min(abs(cell[0]) / largest, 1), left + cell_width * j
            hue = (0, 114, 178) if cell[0] < 0 else (213, 94, 0)
            colour = "#" + "".join(f"{round(255 + share * (c - 255)):02x}" for c in hue)
            out.append(f'<g><title>{html.escape(cell[1])}</title><rect x="{x}" y="{y}" width="{cell_width - 2}"')
            out.append(f' height="{cell_height - 2}" fill="{colour}"/>')
            if cell_width > 22:
                ink = "#ffffff" if share > 0.6 else "#1b1f24"
                text = f'<text x="{x + cell_width / 2 - 1}" y="{y + 14}" text-anchor="middle" style="fill:{ink}">'
                out.append(f"{text}{cell[0]:+.{data['digits']}f}</text>")
            out.append("</g>")
    out += [_draw_text(left + cell_width * (j + 0.5) - 1, bottom + 14, str(j)) for j in range(columns)]
    out.append(_draw_text(left + cell_width * columns / 2, bottom + 32, data["x"]))
    return "\n".join([*out, "</svg>"])


def encode_png(path: Path) -> str:
    """Return a PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
