"""Input files, the files their results go to, and which of them this program wrote.

A file counts as a result of this program if the side-car beside it names it; other files are only replaced on request.
"""

from __future__ import annotations

import glob
import json
import os
import secrets
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from operators import RestoreError
from restore import disk
from restore.bench.protocol import find_differences, format_differences
from restore.images import io
from restore.images.folder import SIDECAR_SUFFIXES, check_owned, filter_images, is_image, read_sidecar
from restore.images.formats import PICTURE_SUFFIXES, WRITABLE_SUFFIXES, choose_suffix

# The endings of the names of companion files, after the name of the result.
SIDECAR, DEGRADED, TRAJECTORY, MEAN, SPREAD = ".json", "-degraded", "-trajectory", "-mean", "-spread"
SIGNALS = "-guidance"
LONGEST_NAME = 255  # bytes, of nearly every file system


@dataclass(frozen=True)
class Photo:
    """An input file and the file its result goes to. The image id, which seeds its noise, is the input's stem."""

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
        """Return every file that restoring it may write: the result, its companions and the side-car."""
        paths = [self.target, self.sidecar]
        paths += [self.companion(DEGRADED)] * degrade
        paths += [self.companion(TRAJECTORY, ".png"), self.companion(SIGNALS, ".png")] * trajectory
        if samples > 1:
            paths += [self.companion(f"-sample{k}") for k in range(1, samples)]
            paths += [self.companion(MEAN), self.companion(SPREAD, ".png")]
        return paths

    @contextmanager
    def remove_on_failure(self, *arguments: Any) -> Iterator[None]:
        """Remove the new files among `outputs(*arguments)` if the block raises, also for a full disk or Ctrl-C.

        The side-car is kept if other files existed before, so that these are made again. Temporary files of a killed
        process are removed first."""
        paths = self.outputs(*arguments)
        for path in paths:
            disk.remove_leftovers(disk.find_leftovers(path))
        existing = [path for path in paths if path.exists()]
        try:
            yield
        except BaseException:
            for path in paths:
                if path not in existing and (path != self.sidecar or not existing):
                    path.unlink(missing_ok=True)
            raise


def find_photos(inputs: Sequence[str | Path], out: str | Path, png=False, recursive=False) -> list[Photo]:
    """Return the photos of files, folders and glob patterns, see `expand_inputs` and `choose_targets`.

    recursive: include the sub-folders of folders, each with an output folder of its name in `out`.
    Raises RestoreError also if a single photo cannot be read, or has transparency and its output format has not.
    """
    photos = []
    for group, target in _group_inputs(inputs, Path(out), recursive):
        photos += choose_targets(group, target, png=png)
    if len(photos) == 1:  # in a folder every photo keeps its format
        io.check_source(photos[0].source, photos[0].target)
    return photos


@contextmanager
def bind_standard_streams(inputs: Sequence[str], out: Path, recursive=False) -> Iterator[tuple[list[str], Path]]:
    """Replace "-" among the inputs by a file with the standard input's content, named stdin, and an `out` of "-" by a
    temporary folder, whose only result is written to the standard output at the end. recursive: see `find_photos`.

    Raises RestoreError if the input is not an image or several results would go to the standard output."""
    with TemporaryDirectory(prefix="restore-") as folder:
        names, results = list(inputs), Path(folder) / "out"
        if "-" in names:
            source = Path(folder) / "stdin"
            source.write_bytes(sys.stdin.buffer.read())
            names[names.index("-")] = str(source.rename(source.with_suffix(f".{io.detect_format(source).lower()}")))
        if str(out) == "-":
            count = sum(len(group) for group, _ in _group_inputs(names, results, recursive))
            if count > 1:
                raise RestoreError(f"the results of {count} inputs cannot go to one standard output; name a folder")
        yield names, results if str(out) == "-" else out
        written = [path for path in results.rglob("*") if path.is_file()]
        mains = [path.with_name(read_sidecar(path)["files"][0]) for path in written if path.suffix == SIDECAR]
        for path in mains or written:  # what is only degraded has no side-car
            sys.stdout.buffer.write(path.read_bytes())
            sys.stdout.buffer.flush()


def check_outputs(photos: Sequence[Photo], outputs: Iterable[Sequence[Path]], overwrite: bool = False) -> None:
    """Raise RestoreError if a run would lose a file.

    outputs: the files of each photo, see `Photo.outputs`. A file would be lost if two photos write the same name
    (a.png's mean and a-mean.png), if it is an input, or, without `overwrite`, if no side-car of this program names it.
    Photos whose outputs have too long names, see `check_names`, write nothing; it is an error if there is no other.
    """
    sources = {_fold(photo.source) for photo in photos}
    writers: dict[str, Photo] = {}
    unnamed: list[RestoreError] = []
    for photo, paths in zip(photos, outputs, strict=True):
        try:
            check_names(photo, paths)
        except RestoreError as error:
            unnamed.append(error)
            continue
        for path in paths:
            other = writers.setdefault(_fold(path), photo)
            if other is not photo:
                raise RestoreError(f"{other.source} and {photo.source} would both write {path}; rename one")
            if _fold(path) in sources:
                raise RestoreError(f"{photo.source} would overwrite the input {path}; choose another output folder")
        check_owned(paths, photo.sidecar, photo.target, overwrite)
    if unnamed and len(unnamed) == len(photos):
        raise unnamed[0]


def _fold(path: Path) -> str:
    """What two names of one file share: some file systems ignore case."""
    return str(path.resolve()).casefold()


def check_names(photo: Photo, paths: Iterable[Path]) -> None:
    """Raise RestoreError if the name of a file to be written, such as NAME-sample1.png, is too long."""
    longest = max(paths, key=lambda path: len(os.fsencode(path.name)))
    if (length := len(os.fsencode(longest.name))) > LONGEST_NAME:
        given = f"{length} for {longest.name}; rename {photo.source.name}"
        raise RestoreError(f"a file name must have at most {LONGEST_NAME} bytes, got {given}")


def is_finished(
    photo: Photo, expected: Mapping[str, Any], free: Collection[str] = (), known: Mapping[str, Any] | None = None
) -> bool:
    """Return whether the result exists, complete and readable, with the same input and settings.

    expected: entries of its side-car, {"sha256": ..., "settings": {...}}, say. free: dotted keys that may differ.
    known: entries of its protocol that must be the same where it has them; earlier versions had fewer. False if there
    is no result, one of its files is missing, or there is only what an interrupted run left. Raises RestoreError, with
    the differences, if there is another result or a picture was changed since.
    """
    sidecar = read_sidecar(photo.sidecar)
    if sidecar is None or not sidecar.get("finished"):
        return False
    expected = json.loads(json.dumps(expected))  # tuples become lists, as in the file
    changed = find_differences({key: sidecar.get(key) for key in expected}, expected, circumstances=True)
    changed = {key: values for key, values in changed.items() if key not in free}
    recorded = {key: value for key, value in (sidecar.get("protocol") or {}).items() if key in (known or {})}
    differing = find_differences(recorded, json.loads(json.dumps({key: known[key] for key in recorded})))
    changed |= {key: values for key, values in differing.items() if values[0] is not None}
    reason = "of another photo" if changed.pop("sha256", None) else format_differences(changed, limit=3)
    if not reason:
        written = sidecar.get("written") or {photo.target.name: None}  # earlier versions did not record hashes
        hashes = {photo.target.with_name(name): digest for name, digest in written.items()}
        changed = [path.name for path, digest in hashes.items() if path.exists() and not _is_as_written(path, digest)]
        if not changed:
            return all(path.exists() for path in hashes)
        reason = f"{changed[0]} is not readable or was changed"
    raise RestoreError(f"{photo.target} is another result ({reason}); try overwrite=True or another output folder")


@contextmanager
def remove_replaced(sidecar: Path, sources: Collection[Path]) -> Iterator[None]:
    """Remove, if the block has replaced a result, the pictures of the former one that the new one lacks, such as its
    other samples. Those that were changed since, and `sources`, the inputs of the run, are kept."""
    before = (read_sidecar(sidecar) or {}).get("written") or {}
    yield
    after = (read_sidecar(sidecar) or {}).get("written") or {}
    for name in before.keys() - after.keys():
        path = sidecar.with_name(Path(name).name)
        if path.resolve() not in sources and disk.has_hash(path, before[name]):
            path.unlink()


def _is_as_written(path: Path, digest: str | None) -> bool:
    if digest is not None:
        return disk.has_hash(path, digest)
    try:
        return bool(io.read_image(path))
    except RestoreError:
        return False


def expand_inputs(paths: Iterable[str | Path]) -> list[Path]:
    """Return the image files of files, folders (without their sub-folders) and glob patterns.

    In the order given, folders and patterns sorted by name, every file once, without hidden files and results of other
    files among them. Raises RestoreError if a file is missing or a folder or pattern has no image.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        matches = [path] if os.path.isfile(path) else _drop_results(filter_images(_list_files(path)))
        if not matches:
            raise RestoreError(f"an input must be an image, or a folder or pattern with images, got {path}")
        for match in matches:
            found.setdefault(_locate(match), match)
    if not found:
        raise RestoreError("no input image given; name files, folders or patterns")
    return list(found.values())


def _locate(path: Path) -> Path:
    """A file's place, by whichever links to its folder it was found; a link of another name is another photo."""
    return path.parent.resolve() / path.name


def _drop_results(paths: list[Path]) -> list[Path]:
    """Drop the files that a side-car beside them names as results of another one of `paths`: the output folder of an
    earlier run was the folder of its inputs."""
    results, sources = set(), set(paths)
    for folder in dict.fromkeys(path.parent for path in paths):
        for sidecar in folder.glob("*.json"):
            content = read_sidecar(sidecar) or {}
            source, names = str(content.get("input")), [str(name) for name in content.get("files", ())]
            if source not in names and folder / source in sources:  # or the input was a file of another folder
                results |= {folder / name for name in names}
    return [path for path in paths if path not in results]


def explain_passed_over(inputs: Iterable[str | Path], out: str | Path | None, recursive: bool = False) -> str | None:
    """Return one line on the files and sub-folders of the inputs that `find_photos` leaves out; None if there are none.

    Hidden files, side-cars and other text files, and the folder `out` are not mentioned.
    """
    out, files, folders, closed = Path(os.devnull if out is None else out).resolve(), [], [], []
    for path in map(Path, inputs):
        folder = os.path.isdir(path)
        groups = [below for below, _ in _list_folders(path, out)] if recursive and folder else [path]
        if recursive and folder:
            closed += [item.name for item in path.rglob("*") if os.path.isdir(item) and not os.access(item, os.R_OK)]
        for item in (item for group in groups for item in _list_files(group)):
            if item.name[0] == "." or item.suffix.lower() in SIDECAR_SUFFIXES:
                continue
            if os.path.isfile(item) and not is_image(item):
                files.append(item.name)
            elif folder and not recursive and os.path.isdir(item) and item.resolve() != out:
                folders += [item.name] * (any(filter_images(_list_folder(item))) and not _holds_results(item))
    kinds = {"no picture that can be read": files, "sub-folders: give recursive=True": folders}
    kinds["sub-folders that cannot be read"] = closed
    parts = [f"{', '.join(n[:5])}{', ...' * (len(n) > 5)} ({len(n)}; {why})" for why, n in kinds.items() if n]
    return f"passed over: {'; '.join(parts)}" if parts else None


def choose_targets(inputs: Iterable[str | Path], out: str | Path, png: bool = False) -> list[Photo]:
    """Return every input with its result file, in order; the output folder is created.

    out: a folder, in which results keep the name and format of their inputs (formats that cannot be written become PNG;
    png=True: all), or, for a single input, a file name with an image suffix. Raises RestoreError if two inputs have the
    same stem (their side-cars would collide), a result would overwrite an input, the folder is not writable, the image
    suffix is unknown, or several inputs share a file name.
    """
    inputs, out = [Path(path) for path in inputs], Path(out)
    suffix = out.suffix.lower()
    if suffix in PICTURE_SUFFIXES and not os.path.isdir(out):
        if len(inputs) > 1:
            raise RestoreError(f"the results of {len(inputs)} inputs cannot go to the file {out}; name a folder")
        if suffix not in WRITABLE_SUFFIXES:
            raise RestoreError(f"cannot write {out}: the name must end in one of {' '.join(WRITABLE_SUFFIXES)}")
        targets = [out]
    else:
        targets = [out / f"{path.stem}{'.png' if png else choose_suffix(path)}" for path in inputs]
    photos = [Photo(*pair) for pair in zip(inputs, targets, strict=True)]
    check_outputs(photos, [photo.outputs() for photo in photos], overwrite=True)
    make_writable_folder(targets[0].parent if targets else out)
    return photos


def make_writable_folder(folder: Path) -> None:
    """Create a folder and write to it once, so that hours of work do not end in an error. Raises RestoreError."""
    trial = disk.make_folder(folder) / f".restore-{secrets.token_hex(4)}.tmp"
    disk.write_bytes(trial, b"")
    trial.unlink(missing_ok=True)


def _group_inputs(inputs: Sequence[str | Path], out: Path, recursive: bool) -> list[tuple[list[Path], Path]]:
    """The image files of inputs, each once, with the folder, `out` or one below it, that their results go to."""
    if not (recursive and inputs):
        return [(expand_inputs(inputs), out)]
    groups, seen = [], set()
    for folder, below in (pair for path in inputs for pair in _list_folders(Path(path), out)):
        group = [path for path in expand_inputs([folder]) if _locate(path) not in seen]
        seen |= set(map(_locate, group))
        groups += [(group, out / below)] if group else []
    return groups


def _list_files(path: Path) -> list[Path]:
    """What a folder or a pattern names, sorted. Raises RestoreError for a folder that cannot be read."""
    if os.path.isdir(path):
        return _list_folder(path, named=True)
    return sorted(map(Path, glob.glob(str(path), recursive=True)))


def _list_folder(folder: Path, named: bool = False) -> list[Path]:
    """What a folder holds, sorted. One that cannot be read, as lost+found, holds nothing, or, if it is the one that the
    user named, raises RestoreError."""
    try:
        return sorted(folder / name for name in os.listdir(folder))
    except OSError as error:
        if not named:
            return []
        raise RestoreError(f"cannot read the folder {folder}: {disk.describe_os_error(error)}") from error


def _list_folders(path: Path, out: Path) -> list[tuple[Path, Path]]:
    """The folders with images from `path` down, without `out`, and their paths relative to it; `path` if none has."""
    below = sorted(folder for folder in path.rglob("*") if os.path.isdir(folder)) if os.path.isdir(path) else []
    below = [folder for folder in below if not any(p.startswith(".") for p in folder.relative_to(path).parts)]
    if path.resolve() in out.resolve().parents:  # results inside of the inputs are not restored again
        below = [folder for folder in below if out.resolve() not in (folder.resolve(), *folder.resolve().parents)]
    below = [folder for folder in below if not _holds_results(folder)]
    found = [folder for folder in (path, *below) if os.path.isdir(folder) and filter_images(_list_folder(folder))]
    return [(folder, folder.relative_to(path)) for folder in found] or [(path, Path())]


def _holds_results(folder: Path) -> bool:
    """Whether the images of a folder are all results of this program, of an earlier output folder."""
    results = {name for path in folder.glob("*.json") for name in (read_sidecar(path) or {}).get("files", ())}
    images = filter_images(_list_folder(folder))
    return bool(images) and all(path.name in results for path in images)
