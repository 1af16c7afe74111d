"""Files on the disk: atomic writes (a file beside the target, renamed over it), JSON, hashes, folders."""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from operators import RestoreError

try:
    import fcntl
except ImportError:  # Windows, where nobody can delete a file that another process has open
    fcntl = None

LEFTOVER = ".*.tmp"  # temporary files, of a process that writes or was killed


@contextmanager
def open_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file whose content replaces `path` when the block ends without an exception.

    On any exception, Ctrl-C included, the hidden temporary file in the same folder is removed and `path` is unchanged.
    The data is flushed to the disk before the rename, so a power failure leaves the old file or the new one. The
    temporary file is locked: `remove_leftovers` of another process leaves it alone while this one lives.
    Raises RestoreError if the folder is not writable or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{_cut_name(path.name)}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        while True:
            file = open(temporary, "xb")  # not tempfile: the finished file gets the permissions of the user's umask
            if not _lock(file, wait=True) or temporary.exists():
                break
            file.close()  # deleted before it was locked
    except OSError as error:
        raise RestoreError(f"cannot write {path}: {describe_os_error(error)}; choose another output folder") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError of its own for a full disk, with the system's error as its context.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        is_stolen = isinstance(cause, FileNotFoundError) and path.parent.is_dir()
        reason = "another program deleted its temporary file" if is_stolen else describe_os_error(cause)
        raise RestoreError(f"cannot write {path}: {reason}; nothing was changed") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def find_leftovers(path: str | Path) -> list[Path]:
    """Return the temporary files that `open_atomic` made for `path`."""
    path = Path(path)
    return list(path.parent.glob(f".{glob.escape(_cut_name(path.name))}.*-????????.tmp"))


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Delete the temporary files among `paths` whose process was killed; those that one is writing are kept."""
    for path in paths:
        with suppress(OSError):
            if fcntl is None:
                path.unlink()
                continue
            with open(path, "rb") as file:
                if _lock(file, wait=False):
                    path.unlink()


def _cut_name(name: str, size: int = 100) -> str:
    """The name, cut to this number of bytes: file systems limit bytes, not characters."""
    return name.encode(errors="surrogateescape")[:size].decode(errors="ignore")


def _lock(file: BinaryIO, wait: bool) -> bool:
    """Lock an open file against other processes until it is closed; False if that is impossible or, without `wait`, if
    it is locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except (OSError, AttributeError):  # locked, a file system without locks, Windows
        return False


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` atomically. Raises RestoreError as `open_atomic` does."""
    with open_atomic(path) as file:
        file.write(content)


def write_json(path: str | Path, content: Any) -> None:
    """Write an indented UTF-8 JSON file atomically.

    Paths become strings, zero-dimensional tensors and numpy scalars numbers, arrays and tensors lists.
    Raises RestoreError for NaN and infinity (JSON has neither: store null and the reason in another field), for
    values without a JSON form, and as `open_atomic` does.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=_to_plain)
    except (TypeError, ValueError) as error:
        raise RestoreError(f"cannot write {path}: its content has no JSON form ({error})") from error
    # A lone surrogate, which stands for a byte of a file name that is no UTF-8, becomes JSON's own escape.
    write_bytes(path, (text + "\n").encode("utf-8", "backslashreplace"))


def write_safetensors(path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors atomically. Raises RestoreError as `open_atomic` does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with open_atomic(path) as file:
        try:
            save_file(dict(tensors), file.name, metadata=None if metadata is None else dict(metadata))
            with open(file.name, "rb+") as written:  # it may have replaced the file
                os.fsync(written.fileno())
        except SafetensorError as error:
            if system := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(system[1]), os.strerror(int(system[1]))) from error
            raise


def require_file_names(names: Iterable[Any], what: str) -> None:
    """Raise RestoreError unless names from a configuration can be files of one folder: no way out of it, no two alike.

    what: the names' place, for the message ("methods").
    """
    seen: dict[str, Any] = {}
    for name in names:
        text = str(name)
        is_component = text and not text.startswith(".") and not re.search(r"[/\\\x00-\x1f]", text)
        if not is_component or len(text.encode()) > 200:
            raise RestoreError(f"a name in {what} must be a file name without folders, 200 bytes at most, got {name!r}")
        other = seen.setdefault(text.casefold(), name)  # some file systems ignore case
        if other is not name:
            raise RestoreError(f"names in {what} must differ in more than case, got {other!r} and {name!r}")


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents, if missing, and return its path. Raises RestoreError if that fails."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RestoreError(f"cannot create the folder {path}: {describe_os_error(error)}; try another") from error
    return Path(path)


def read_json(path: str | Path, required: bool = False) -> Any:
    """Return the content of a JSON file, or None if it is missing or invalid.

    required: raise RestoreError instead, also if the content is not an object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if required:
            raise RestoreError(f"{path} cannot be read as JSON: {error}") from None
        return None
    if required and not isinstance(content, dict):
        raise RestoreError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def hash_file(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file. Raises RestoreError if it cannot be read."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError as error:
        raise RestoreError(f"there is no file {path}") from error
    except OSError as error:
        raise RestoreError(f"cannot read {path}: {describe_os_error(error)}") from error
    return digest.hexdigest()


def has_hash(path: str | Path, digest: str) -> bool:
    """Return whether a file exists and has this SHA-256, which is computed once while the file does not change."""
    try:
        return hash_file_once(path) == digest
    except (OSError, RestoreError):
        return False


def hash_file_once(path: str | Path) -> str:
    """Return `hash_file`, computed once in this process while the file does not change."""
    status = os.stat(path)
    return _hash_version(str(path), status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=1 << 16)
def _hash_version(path: str, size: int, modified: int, inode: int) -> str:
    return hash_file(path)


def hash_files(paths: Iterable[str | Path]) -> str:
    """Return the hexadecimal SHA-256 of the files' SHA-256 digests, in order."""
    return hashlib.sha256(b"".join(bytes.fromhex(hash_file(path)) for path in paths)).hexdigest()


def describe_os_error(error: OSError) -> str:
    """Return the operating system's reason in plain words."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return "the disk is full"
    if error.errno == errno.ENOENT:
        return "its folder does not exist"
    return (error.strerror or str(error)).lower()


def _to_plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")
