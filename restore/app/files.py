"""Which files to read and where their results go."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from operators import RestoreError
from restore import atomic

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm", ".pgm")
_WRITABLE = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix != ".gif")  # 256 colours hold no restored photo


def expand_inputs(paths: Iterable[str | Path]) -> list[Path]:
    """The image files meant by files, folders (their images, not their sub-folders') and glob patterns.

    In the order given, each folder and pattern sorted by name, every file once; hidden files are left
    out. Raises RestoreError for a file that is missing and a folder or pattern without images.
    """
    found: dict[Path, None] = {}
    for path in (Path(path) for path in paths):
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = _images(path.iterdir())
            if not matches:
                raise RestoreError(f"The folder {path} holds no image ({' '.join(IMAGE_SUFFIXES)}).")
        elif glob.has_magic(str(path)):
            matches = _images(Path(name) for name in glob.glob(str(path), recursive=True))
            if not matches:
                raise RestoreError(f"No image matches {path}.")
        else:
            raise RestoreError(f"There is no file or folder {path}.")
        found.update(dict.fromkeys(matches))
    if not found:
        raise RestoreError("No input image was named: give files, folders or patterns.")
    return list(found)


def output_paths(inputs: Iterable[str | Path], out: str | Path, png: bool = False, tag: str = "") -> list[Path]:
    """Where the result of every input goes, in order; the output folder is created and tried.

    out: a folder; or, for a single input, a file name ending in an image suffix. In a folder, a result
    is named after its input plus `tag` and keeps its format (GIF becomes PNG; png=True makes all PNG).
    Raises RestoreError for two inputs with the same stem (their results and side-cars would overwrite
    each other), for a result that would overwrite an input, a folder that cannot be written to, an
    unknown image suffix, and a file name with several inputs.
    """
    inputs, out = [Path(path) for path in inputs], Path(out)
    suffix = out.suffix.lower()
    if suffix in IMAGE_SUFFIXES and not out.is_dir():
        if len(inputs) > 1:
            raise RestoreError(f"{len(inputs)} inputs cannot all go to the file {out}: name a folder instead.")
        if suffix not in _WRITABLE:
            raise RestoreError(f"Cannot write {out}: a GIF holds 256 colours only; use .png.")
        targets = [out]
    else:
        targets = [out / f"{path.stem}{tag}{_result_suffix(path, png)}" for path in inputs]
        first: dict[str, Path] = {}
        for path in inputs:
            other = first.setdefault(path.stem.casefold(), path)  # some file systems ignore case
            if other != path:
                raise RestoreError(
                    f"{other} and {path} have the same name, so their results would overwrite each other in {out}: "
                    "rename one or run them into different folders."
                )
    sources = {path.resolve() for path in inputs}
    for target in targets:
        if target.resolve() in sources:
            raise RestoreError(f"The result would overwrite the input {target}: choose another output folder.")
    writable_folder(targets[0].parent if targets else out)
    return targets


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _result_suffix(path: Path, png: bool) -> str:
    return path.suffix if not png and path.suffix.lower() in _WRITABLE else ".png"


def writable_folder(folder: Path) -> None:
    """Create `folder` and write to it once, so that hours of work do not end at a closed door.

    Raises RestoreError with the reason when that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RestoreError(f"Cannot create the output folder {folder}: {atomic.reason(error)}.") from error
    trial = folder / ".restore-write-test"
    atomic.write_bytes(trial, b"")
    trial.unlink(missing_ok=True)
