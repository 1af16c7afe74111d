"""What a JPEG file says of its own compression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import JpegImagePlugin

from operators.jpeg import SAMPLINGS, SIDE
from restore.images.io import open_image
from restore.images.metadata import ORIENTATION

_SAMPLINGS = dict(enumerate(("4:4:4", "4:2:2", "4:2:0")))  # by Pillow's numbers


def read_compression(path: str | Path) -> dict[str, Any] | None:
    """Return the options `tables`, `subsampling` and `offset` of `operators.JPEG` for a file that `io.read_image` reads
    (upright); None if it is no JPEG, or one whose colour is stored in another way (CMYK, halved in the rows alone).

    Raises RestoreError if the file is missing or no picture.
    """
    with open_image(Path(path)) as image:
        tables = getattr(image, "quantization", None)
        if image.format not in ("JPEG", "MPO") or not tables or image.mode not in ("L", "RGB"):
            return None
        sampling = "4:4:4" if image.mode == "L" else _SAMPLINGS.get(JpegImagePlugin.get_sampling(image))
        orientation, (width, height) = image.getexif().get(ORIENTATION, 1), image.size
        steps = [list(map(int, tables[key])) for key in sorted(tables)][:2]
    if sampling is None:
        return None
    rows, columns = (-side % (SIDE * unit) for side, unit in zip((height, width), SAMPLINGS[sampling], strict=True))
    if orientation in (5, 6, 7, 8):
        if sampling == "4:2:2":
            return None
        rows, columns = columns, rows
        steps = [[table[SIDE * column + row] for row in range(SIDE) for column in range(SIDE)] for table in steps]
    top, left = rows * (orientation in (3, 4, 7, 8)), columns * (orientation in (2, 3, 6, 7))
    return {"tables": steps, "subsampling": sampling, "offset": [top, left]}


def follow_edits(
    compression: dict[str, Any], size: tuple[int, int], turns: int, corner: tuple[int, int]
) -> dict[str, Any] | None:
    """Return the options of `read_compression` for a picture of `size` (H, W) that was turned clockwise by so many
    quarters and cropped then, with its first pixel at `corner` (row, column) of the turned one.

    None if there is no name for them: "4:2:2" turned by one or three quarters.
    """
    units, (height, width), (top, left) = SAMPLINGS[compression["subsampling"]], size, compression["offset"]
    tables = compression["tables"]
    for _ in range(turns % 4):  # rows become columns, the last one first
        top, left = left, -(height + top) % (SIDE * units[0])
        tables = [[table[SIDE * column + row] for row in range(SIDE) for column in range(SIDE)] for table in tables]
        units, height, width = units[::-1], width, height
    sampling = {unit: name for name, unit in SAMPLINGS.items()}.get(units)
    if sampling is None:
        return None
    offset = [(cut + more) % (SIDE * unit) for cut, more, unit in zip((top, left), corner, units, strict=True)]
    return {"tables": tables, "subsampling": sampling, "offset": offset}
