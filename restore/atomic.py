"""Files that are either complete or not there: written beside their target, then renamed over it."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
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
        handle = open(temporary, "xb")  # not tempfile: the finished file gets the permissions of the user's umask
    except OSError as error:
        raise RestoreError(f"Cannot write {path}: {reason(error)}; choose another output folder.") from error
    try:
        with handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save answers a full disk with a RuntimeError of its own on top of the system's.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise RestoreError(f"Cannot write {path}: {reason(cause)}; nothing was changed.") from error
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


def write_safetensors(path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors atomically; RestoreError as in `writing`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with writing(path) as handle:
        try:
            save_file(dict(tensors), handle.name, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:
            if system := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(system[1]), os.strerror(int(system[1]))) from error
            raise


def make_folder(path: str | Path) -> Path:
    """`path`, a folder, with its parents. Raises RestoreError with the reason where it cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RestoreError(f"the folder {path} cannot be made: {reason(error)}; choose another one") from error
    return Path(path)


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
