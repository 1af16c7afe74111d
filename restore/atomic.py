"""Files that are either complete or not there: written beside their target, then renamed over it."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from operators import RestoreError


@contextmanager
def writing(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file handle whose content replaces `path` when the block ends without an exception.

    On any exception, Ctrl-C included, the temporary file (hidden, in the same folder) is removed and
    whatever `path` held before is untouched. The data is flushed to the disk before the rename, so a
    killed machine leaves the old file or the new one, never half of one.

    Raises RestoreError when the folder cannot be written to or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        # os.open instead of tempfile: the finished file gets the permissions of the user's umask, not 0600.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise RestoreError(f"Cannot write {path}: {reason(error)}; choose another output folder.") from error
    try:
        with os.fdopen(descriptor, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RestoreError(f"Cannot write {path}: {reason(error)}; nothing was changed.") from error
    finally:
        with suppress(OSError):
            temporary.unlink()  # already renamed when all went well


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` atomically; RestoreError as in `writing`."""
    with writing(path) as handle:
        handle.write(content)


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file (indented, UTF-8) atomically.

    Paths become strings; one-element tensors and numpy scalars numbers; arrays and tensors lists.
    Raises RestoreError for a NaN or infinite number (JSON has none: store null and say why in another
    field), for a value that has no JSON form, and as in `writing`.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise RestoreError(f"Cannot write {path}: its content has no JSON form ({error}).") from error
    write_bytes(path, (text + "\n").encode("utf-8"))


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; None where there is none, or one that cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def reason(error: OSError) -> str:
    """The operating system's reason in plain words."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return "the disk is full"
    if error.errno == errno.ENOENT:
        return "its folder does not exist"
    return (error.strerror or str(error)).lower()


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # tensors and numpy arrays; a scalar for zero dimensions
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")
