"""Positions and colours of the charts in reports, drawn as SVG by charts.html.j2, and PNG files as data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image

# Okabe & Ito's colours, which stay apart for colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a")
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 380, 58, 364, 30, 244  # of a chart, and of its plot


def choose_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers that cover [low, high]."""
    if high <= low:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    rough = (high - low) / max(count - 1, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _place_axis(values: list[float], start: float, end: float) -> tuple[Any, list[tuple[float, str]]]:
    """A function from values to positions between `start` and `end`, and the ticks: positions and labels."""
    ticks = choose_ticks(min(values), max(values))
    step = ticks[1] - ticks[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + f"{step:e}".startswith("2.5"))

    def place(value: float) -> float:
        return round(start + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (end - start), 1)

    return place, [(place(value), f"{value:.{digits}f}") for value in ticks]


def place_chart(chart: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of the macro `chart` for "series", a list of {name, line, points: [(x, y, label)]}.

    A series may give the number of its `colour`, and be a `level`, a dashed line without points.
    chart["title"], chart["x"], chart["y"]: titles of the chart and its axes. chart["ticks"]: names of values of x in
    place of numbers, if there are any.
    """
    points = [point for series in chart["series"] for point in series["points"]]
    place_x, x_ticks = _place_axis([x for x, _, _ in points], LEFT, RIGHT)
    if names := chart.get("ticks"):
        x_ticks = [(place_x(x), name) for x, name in names.items()]
    place_y, y_ticks = _place_axis([y for _, y, _ in points], BOTTOM, TOP)
    series = []
    for i, line in enumerate(chart["series"]):
        points = [(place_x(x), place_y(y), label) for x, y, label in line["points"]]
        number = line.get("colour", i)
        level = line.get("level", False)
        look = {"colour": COLOURS[number % len(COLOURS)], "level": level, "dashed": level or number >= len(COLOURS)}
        series.append({**line, "points": points, **look})
    box = {"width": WIDTH, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
    return {**chart, **box, "series": series, "x_ticks": x_ticks, "y_ticks": y_ticks}


def place_heat_map(heat_map: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of the macro `heat_map` for "rows", a list of (name, [(value, note) or None]).

    Values below 0 are blue, above 0 orange. heat_map["title"]; heat_map["x"]: what the columns are;
    heat_map["digits"]: of the values.
    """
    columns = max(len(cells) for _, cells in heat_map["rows"])
    largest = max((abs(cell[0]) for _, cells in heat_map["rows"] for cell in cells if cell), default=0) or 1
    digits = heat_map["digits"]
    rows = [(n, [cell and _colour_cell(*cell, largest, digits) for cell in cells]) for n, cells in heat_map["rows"]]
    left = 20 + 7 * max(len(name) for name, _ in rows)
    return {**heat_map, "rows": rows, "columns": columns, "left": left, "cell": 58 if columns <= 16 else 22}


def _colour_cell(value: float, note: str, largest: float, digits: int) -> dict[str, Any]:
    share = min(abs(value) / largest, 1)
    hue = (0, 114, 178) if value < 0 else (213, 94, 0)
    colour = "#" + "".join(f"{round(255 + share * (c - 255)):02x}" for c in hue)
    return {"text": f"{value:+.{digits}f}", "note": note, "colour": colour, "dark": share > 0.6}


def to_data_uri(path: Path, longest: int | None = None) -> str:
    """Return a PNG file as a data URI; longest: reduce larger pictures (Lanczos) to a longer side of so many pixels."""
    content = path.read_bytes()
    if longest is not None:
        with PIL.Image.open(io.BytesIO(content)) as picture:
            if max(picture.size) > longest:
                picture.thumbnail((longest, longest), PIL.Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                picture.save(buffer, "PNG")
                content = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
