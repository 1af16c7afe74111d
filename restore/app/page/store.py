"""Where the page keeps uploads and results: one folder of this process, readable by its owner alone, gone with it."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

try:
    import fcntl
except ImportError:  # Windows: left-overs of killed pages stay until the system empties its temporary folder
    fcntl = None  # type: ignore[assignment]

PREFIX = "restore-page-"
_locks: list[int] = []  # kept open: the system gives up a lock when its process ends, however it ends


@cache
def open_store() -> Path:
    """Return the folder of this process's pages, made and locked in the first call; gradio keeps its files in it.

    Left-overs of killed pages are removed first. It lies in the system's temporary folder ($TMPDIR).
    """
    place = Path(tempfile.gettempdir())
    remove_leftovers(place)
    made = Path(tempfile.mkdtemp(prefix=f"new-{PREFIX}", dir=place))
    _lock(made)
    folder = made.rename(made.with_name(made.name.removeprefix("new-")))  # locked before it has the name of a left-over
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")  # it serves what lies there and copies results to it
    atexit.register(clear_store)
    return folder


def make_work_folder() -> TemporaryDirectory:
    """Return a context manager whose value is a folder for one restoration."""
    return TemporaryDirectory(prefix="work-", dir=open_store())


def clear_store() -> None:
    """Remove the folder of this process, if it has one, with everything in it."""
    if open_store.cache_info().currsize:
        shutil.rmtree(open_store(), ignore_errors=True)


def remove_leftovers(place: Path) -> None:
    """Remove the folders of this user's pages in `place` that no living process holds."""
    if fcntl is None:
        return
    for folder in place.glob(f"{PREFIX}*"):
        try:
            own = not folder.is_symlink() and folder.is_dir() and folder.stat().st_uid == os.getuid()
            lock = _lock(folder) if own else None
        except OSError:  # held, or gone in the meantime
            continue
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _locks.remove(lock)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Hold a folder until this process ends. Raises OSError if another process does."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    _locks.append(handle)
    return handle
