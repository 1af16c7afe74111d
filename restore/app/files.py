"""Which files to read, where their results go, and whose files those are.

A file counts as this program's when the side-car beside it names it; any other file is never replaced unasked.
"""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from operators import RestoreError
from restore import disk
from restore.images import io

_WRITABLE = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".ppm", ".pgm")
IMAGE_SUFFIXES = (*_WRITABLE, ".gif", ".heic", ".heif", ".avif")
# Names that mean a picture and not a folder, though nothing of the kind is written.
_FOREIGN = (".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".pdf", ".psd", ".dng")
# Side-cars and pictures written beside a result are named after it with these endings.
SIDECAR, DEGRADED, TRAJECTORY, MEAN, SPREAD = ".json", "-degraded", "-trajectory", "-mean", "-spread"
SIGNALS = "-guidance"


@dataclass(frozen=True)
class Photo:
    """One input file and the file its result goes to. The image id, and so its noise, is the input's stem."""

    source: Path
    target: Path

    @property
    def image_id(self) -> str:
        return self.source.stem

    @property
    def sidecar(self) -> Path:
        return self.target.with_suffix(SIDECAR)

    def companion(self, ending: str, suffix: str | None = None) -> Path:
        return self.target.with_name(f"{self.target.stem}{ending}{suffix or self.target.suffix}")

    def outputs(self, samples: int = 1, degrade: bool = False, trajectory: bool = False) -> list[Path]:
        """Every file that restoring it may write: the result, its companions and the side-car."""
        paths = [self.target, self.sidecar]
        paths += [self.companion(DEGRADED)] * degrade
        paths += [self.companion(TRAJECTORY, ".png"), self.companion(SIGNALS, ".png")] * trajectory
        if samples > 1:
            paths += [self.companion(f"-sample{k}") for k in range(1, samples)]
            paths += [self.companion(MEAN), self.companion(SPREAD, ".png")]
        return paths

    @contextmanager
    def remove_on_failure(self, *arguments: Any) -> Iterator[None]:
        """On any exception in the block, a full disk or Ctrl-C, the files of `outputs(*arguments)` that were not there
        before are removed; the side-car stays where others are there, so that they are made again. What a killed
        process was writing is removed first."""
        for path in self.outputs(*arguments):
            for half in path.parent.glob(f".{glob.escape(path.name[:100])}.*-????????.tmp"):
                half.unlink(missing_ok=True)
        there = [path for path in self.outputs(*arguments) if path.exists()]
        try:
            yield
        except BaseException:
            for path in self.outputs(*arguments):
                if path not in there and (path != self.sidecar or not there):
                    path.unlink(missing_ok=True)
            raise


def find_photos(
    inputs: Sequence[str | Path], out: str | Path, png: bool = False, recursive: bool = False
) -> list[Photo]:
    """Photos for files, folders and globs. recursive: a folder's sub-folders too, each with its own of that name in
    `out`. Raises RestoreError before anything runs: no match, two inputs with the
    same output, an output folder that cannot be written, transparency into a format without."""
    if not inputs:
        raise RestoreError("no input image given")
    groups = [(inputs, Path(out))]
    if recursive:
        groups = [([group], Path(out) / below) for path in inputs for group, below in _folders(Path(path), Path(out))]
    photos = []
    for group, target in groups:
        sources = expand_inputs(group)
        photos += [Photo(*pair) for pair in zip(sources, choose_targets(sources, target, png=png), strict=True)]
    if len(photos) == 1:  # in a folder the formats are kept, and so is what they hold
        io.check_alpha(photos[0].source, photos[0].target)
    return photos


@contextmanager
def bind_standard_streams(inputs: Sequence[str], out: Path) -> Iterator[tuple[list[str], Path]]:
    """Within the block "-" among the inputs is a file with what came by the standard input, and an `out` of "-" a
    folder, whose one result goes to the standard output at the end. Its noise is that of an image named stdin.

    Raises RestoreError where nothing comes, and where several results would go to one output."""
    with TemporaryDirectory(prefix="restore-") as folder:
        names, results = list(inputs), Path(folder) / "out"
        if "-" in names:
            source = Path(folder) / "stdin"
            source.write_bytes(sys.stdin.buffer.read())
            names[names.index("-")] = str(source.rename(source.with_suffix(f".{io.detect_format(source).lower()}")))
        if str(out) == "-" and len(names) > 1:
            raise RestoreError(f"the results of {len(names)} inputs cannot go to one standard output: name a folder")
        yield names, results if str(out) == "-" else out
        for result in results.glob("*.json") if results.is_dir() else ():
            sidecar = read_sidecar(result)
            sys.stdout.buffer.write((results / sidecar["files"][0]).read_bytes())
            sys.stdout.buffer.flush()


def check_outputs(photos: Sequence[Photo], written: Iterable[Sequence[Path]], overwrite: bool = False) -> None:
    """Raises RestoreError where a run would lose a file: two photos write the same name (a.png's mean and a-mean.png),
    a name is an input's, or, without `overwrite`, it is taken by a file that no side-car of this program names.

    written: what each photo writes, see Photo.outputs.
    """
    sources = {photo.source.resolve(): photo.source for photo in photos}
    writers: dict[str, Photo] = {}
    for photo, paths in zip(photos, written, strict=True):
        ours = set((read_sidecar(photo.sidecar) or {}).get("files", ()))
        for path in paths:
            other = writers.setdefault(str(path.resolve()).casefold(), photo)  # some file systems ignore case
            if other is not photo:
                raise RestoreError(
                    f"{other.source} and {photo.source} would both write {path}: rename one or run them into different "
                    "folders."
                )
            if path.resolve() in sources:
                raise RestoreError(f"{photo.source} would overwrite the input {path}: choose another output folder.")
            if path.exists() and not overwrite and (path.name not in ours or photo.target.name not in ours):
                raise RestoreError(
                    f"{path} is there already and {photo.sidecar.name} does not name it as a result of this program: "
                    "give overwrite=True to replace it, or choose another output folder."
                )


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """The content of a side-car that this program wrote; None where there is none, or another file."""
    content = disk.read_json(path)
    return content if isinstance(content, dict) and isinstance(content.get("files"), list) else None


def is_finished(photo: Photo, expected: Mapping[str, Any]) -> bool:
    """Whether the result is there: complete, of the same input and settings, and readable.

    expected: what its side-car must say, e.g. {"sha256": ..., "settings": {...}}. False where there is nothing, or what
    an interruption left. Raises RestoreError, saying what differs, where there is another result.
    """
    sidecar = read_sidecar(photo.sidecar)
    if sidecar is None or not sidecar.get("finished"):
        return False
    differing = differences(json.loads(json.dumps(expected)), sidecar)
    if not differing:
        try:
            io.read_image(photo.target)
        except RestoreError:
            differing = ["it is not readable"]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise RestoreError(
            f"{photo.target} is another result ({'; '.join(differing[:3])}{more}): give overwrite=True to redo it, or "
            "choose another output folder."
        )
    return True


def differences(expected: Any, found: Any, name: str = "") -> list[str]:
    """ "steps: 4, now 8" for everything in `expected` that `found` has otherwise; mappings are compared by key."""
    if isinstance(expected, Mapping):
        found = found if isinstance(found, Mapping) else {}
        return [text for key in expected for text in differences(expected[key], found.get(key), str(key))]
    if expected == found:
        return []
    return ["of another photo" if name == "sha256" else f"{name}: {_short(found)}, now {_short(expected)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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


def choose_targets(inputs: Iterable[str | Path], out: str | Path, png: bool = False, tag: str = "") -> list[Path]:
    """Where the result of every input goes, in order; the output folder is created and tried.

    out: a folder; or, for a single input, a file name ending in an image suffix. In a folder, a result
    is named after its input plus `tag` and keeps its format (GIF becomes PNG; png=True makes all PNG).
    Raises RestoreError for two inputs with the same stem (their results and side-cars would overwrite
    each other), for a result that would overwrite an input, a folder that cannot be written to, an
    unknown image suffix, and a file name with several inputs.
    """
    inputs, out = [Path(path) for path in inputs], Path(out)
    suffix = out.suffix.lower()
    if suffix in _WRITABLE + _FOREIGN and not out.is_dir():
        if len(inputs) > 1:
            raise RestoreError(f"{len(inputs)} inputs cannot all go to the file {out}: name a folder instead.")
        if suffix not in _WRITABLE:
            raise RestoreError(f"Cannot write {out}: the name must end in one of {' '.join(_WRITABLE)}.")
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
    make_writable_folder(targets[0].parent if targets else out)
    return targets


def _folders(path: Path, out: Path) -> list[tuple[Path, Path]]:
    """The folders with images from `path` down, and where below it they lie; `out`, which may be one, is left out.
    A file, a pattern and a folder without any image is given back as it is."""
    below = sorted(folder for folder in path.rglob("*") if folder.is_dir()) if path.is_dir() else []
    below = [folder for folder in below if not any(p.startswith(".") for p in folder.relative_to(path).parts)]
    own = [folder for folder in below if out.resolve() not in (folder.resolve(), *folder.resolve().parents)]
    found = [folder for folder in (path, *own) if folder.is_dir() and _images(folder.iterdir())]
    return [(folder, folder.relative_to(path)) for folder in found] or [(path, Path())]


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _result_suffix(path: Path, png: bool) -> str:
    return path.suffix if not png and path.suffix.lower() in _WRITABLE else ".png"


def make_writable_folder(folder: Path) -> None:
    """Create `folder` and write to it once, so that hours of work do not end at a closed door.

    Raises RestoreError with the reason when that fails."""
    trial = disk.make_folder(folder) / ".restore-write-test"
    disk.write_bytes(trial, b"")
    trial.unlink(missing_ok=True)
