"""Labelled pictures: comparison grids and strips through time (one row). Never part of the data path."""

from __future__ import annotations

from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch

from operators import RestoreError
from restore.images.io import to_pil

_GAP = 6
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


def draw_grid(
    rows: Sequence[Sequence[torch.Tensor | PIL.Image.Image | None]],
    column_titles: Sequence[str],
    row_titles: Sequence[str] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    cell: int = 192,
    font_size: int = 16,
) -> PIL.Image.Image:
    """Return a labelled table of pictures on a white background.

    rows: one image per column, a tensor (3, H, W) or (1, 3, H, W) in [-1, 1], a PIL image, or None for an empty cell,
    see `fit_image`. captions: a text under every cell. Raises RestoreError unless there is one image per title.
    """
    if not rows or any(len(row) != len(column_titles) for row in rows):
        raise RestoreError(f"every row of the grid must have {len(column_titles)} images, one per column title")
    if row_titles is not None and len(row_titles) != len(rows):
        raise RestoreError(f"row_titles must have {len(rows)} titles, one per row, got {len(row_titles)}")
    if captions is not None and [len(line) for line in captions] != [len(row) for row in rows]:
        raise RestoreError("captions must have one text per image")
    font, small = PIL.ImageFont.load_default(font_size), PIL.ImageFont.load_default(max(10, font_size - 3))
    heads = [_wrap(title, font, cell) for title in column_titles]
    sides = [_wrap(title, font, 110) for title in row_titles or []]
    head_height = _text_height(heads, font) + _GAP
    side_width = int(max((font.getlength(line) for side in sides for line in side.split("\n")), default=-_GAP)) + _GAP
    feet = [[_wrap(text, small, cell) for text in line] for line in captions or []]
    foot_height = max((_text_height(line, small) for line in feet), default=0)
    pictures = [[None if image is None else fit_image(image, cell) for image in row] for row in rows]
    heights = [picture.height for row in pictures for picture in row if picture is not None]
    row_height = max([*heights, _text_height(sides, font)]) if heights else cell
    step_x, step_y = cell + _GAP, row_height + foot_height + _GAP
    width, height = side_width + len(column_titles) * step_x + _GAP, head_height + len(rows) * step_y + 2 * _GAP
    sheet = PIL.Image.new("RGB", (width + _GAP, height), _PAPER)
    draw = PIL.ImageDraw.Draw(sheet)
    left, top = side_width + 2 * _GAP, head_height + _GAP
    for column, head in enumerate(heads):
        x = left + column * step_x + cell / 2
        draw.multiline_text((x, top - _GAP), head, _INK, font, anchor="md", align="center")
    for index, row in enumerate(pictures):
        y = top + index * step_y
        if sides:
            draw.multiline_text((_GAP, y + row_height / 2), sides[index], _INK, font, anchor="lm")
        for column, picture in enumerate(row):
            x = left + column * step_x
            if picture is not None:
                sheet.paste(picture, (x + (cell - picture.width) // 2, y + (row_height - picture.height) // 2))
            if feet:
                place, text = (x + cell / 2, y + row_height + 2), feet[index][column]
                draw.multiline_text(place, text, _INK, small, anchor="ma", align="center")
    return sheet


def fit_image(image: torch.Tensor | PIL.Image.Image, cell: int) -> PIL.Image.Image:
    """Return an RGB picture of at most `cell` pixels, enlarged by an integer factor (nearest) or reduced (Lanczos)."""
    picture = image.convert("RGB") if isinstance(image, PIL.Image.Image) else to_pil(image)
    longest = max(picture.size)
    if longest <= cell:
        factor = cell // longest
        return picture.resize((picture.width * factor, picture.height * factor), PIL.Image.Resampling.NEAREST)
    size = [max(1, round(side * cell / longest)) for side in picture.size]
    return picture.resize(size, PIL.Image.Resampling.LANCZOS)


def _wrap(text: str, font: PIL.ImageFont.FreeTypeFont, width: int) -> str:
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(lines)


def _text_height(texts: Sequence[str], font: PIL.ImageFont.FreeTypeFont) -> int:
    if not any(texts):
        return 0
    draw = PIL.ImageDraw.Draw(PIL.Image.new("L", (1, 1)))
    return int(max(draw.multiline_textbbox((0, 0), text, font)[3] for text in texts)) + 4
