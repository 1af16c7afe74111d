"""One file from the network to the disk: resumed after a cut, checked before it counts as there."""

from __future__ import annotations

import json
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import requests

from operators import RestoreError
from restore import disk

Progress = Callable[[int, "int | None"], None]  # bytes so far, bytes in all if known
Accept = Callable[[Path], None]

_BLOCK = 1 << 15  # bytes; what a broken connection loses of the block in flight is not on the disk
_TIMEOUT = (10, 60)  # seconds to connect, seconds without a byte


class _Unusable(Exception):
    """This address cannot deliver the file; another might."""


class _Cut(Exception):
    """The connection ended early; the part on the disk is good."""


def fetch_file(
    urls: tuple[str, ...],
    target: Path,
    size: int | None = None,
    sha256: str | None = None,
    by_hand: str = "",
    progress: Progress | None = None,
    patience: float = 1.0,
    attempts: int = 4,
    accept: Accept = lambda path: None,
) -> str:
    """Download the first working of `urls` to `target` and return its SHA-256.

    The bytes go to `target` + ".part", which survives a cut connection and a killed process; the next
    attempt, here or in a later call, asks the server for the rest (HTTP Range with If-Range, RFC 9110
    sec. 13.1.5 and 14) and starts over when the server will not or its file has changed. `attempts` counts
    tries in a row that brought no new byte, `patience` seconds apart and doubling. The finished part is
    checked against size, sha256, its own file format and `accept` (which raises RestoreError for a file that is
    not wanted) and only then renamed to `target`.
    Raises RestoreError when no address delivers the right file (saying why, adding `by_hand`), on a full disk.
    """
    problems = []
    for url in urls:
        try:
            return _fetch_one(url, target, size, sha256, progress, patience, attempts, accept)
        except _Unusable as problem:
            problems.append(f"{url}: {problem}")
        except OSError as error:
            if isinstance(error, requests.RequestException):
                problems.append(f"{url}: {error}")
                continue
            raise RestoreError(
                f"cannot write {target}: {disk.describe_os_error(error)}; the downloaded part is kept, run it again"
            ) from error
    why = f" ({'; '.join(problems)})" if problems else ", no address offers the file itself"
    raise RestoreError(f"{target.name} could not be downloaded{why}. {by_hand}".strip())


def verify_file(path: Path, size: int | None, sha256: str | None, name: str | None = None) -> str:
    """The SHA-256 of `path` after checking size, checksum and completeness; RestoreError otherwise."""
    name = name or path.name
    actual = path.stat().st_size
    if size is not None and actual != size:
        raise RestoreError(f"{name} has {actual} bytes instead of {size}: it is incomplete or another file.")
    problem = find_damage(path)
    if problem:
        raise RestoreError(f"{name} {problem}: fetch it again.")
    digest = disk.hash_file(path)
    if sha256 is not None and digest != sha256:
        raise RestoreError(
            f"{name} is corrupted or another file: expected SHA-256 {sha256}, got {digest}; fetch it again."
        )
    return digest


def find_damage(path: Path) -> str:
    """What a look at a weight file's own structure finds wrong with it ("" for nothing); no checksum needed."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        head = handle.read(512)
    if not head:
        return "is empty"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not weights (the site asked for a confirmation or a login)"
    if head[:4] == b"PK\x03\x04" and not zipfile.is_zipfile(path):  # torch.save: the directory is at the end
        return "is cut off: the end of its archive is missing"
    if path.suffix == ".safetensors":
        header = int.from_bytes(head[:8], "little")
        if 8 + header > size:
            return "is cut off or no safetensors file"
    return ""


def _fetch_one(
    url: str,
    target: Path,
    size: int | None,
    sha256: str | None,
    progress: Progress | None,
    patience: float,
    attempts: int,
    accept: Accept,
) -> str:
    part, label = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
    failures, resumed = 0, part.exists() and part.stat().st_size > 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _transfer(url, part, label, size, progress)
        except (_Cut, requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            grown = part.exists() and part.stat().st_size > before
            failures = 0 if grown else failures + 1
            resumed = True
            if failures >= attempts:
                raise _Unusable(f"the connection broke {attempts} times in a row ({error})") from error
            time.sleep(patience * 2 ** max(0, failures - 1))
            continue
        try:
            digest = verify_file(part, size, sha256, target.name)
            accept(part)
        except RestoreError as problem:
            part.unlink()
            label.unlink(missing_ok=True)
            if not resumed:
                raise _Unusable(str(problem)) from problem
            resumed = False  # the old part may have been bad: once more from the first byte
            continue
        part.replace(target)
        label.unlink(missing_ok=True)
        return digest


def _transfer(url: str, part: Path, label: Path, size: int | None, progress: Progress | None) -> None:
    """One request: append to `part` what is missing."""
    offset, validator = _resume_point(part, label, url)
    headers = {"Accept-Encoding": "identity"}  # a compressed transfer has no meaningful offsets
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if validator:
            headers["If-Range"] = validator
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        total = _total(response, offset)
        if response.status_code == 416 and offset and total == offset:
            return  # everything had arrived already
        if response.status_code == 416:
            part.unlink(missing_ok=True)
            raise _Cut("the part on the disk was longer than the file")
        if response.status_code not in (200, 206):
            if response.status_code >= 500 or response.status_code == 429:
                raise _Cut(f"HTTP status {response.status_code}")
            raise _Unusable(f"HTTP status {response.status_code}")
        if "text/html" in response.headers.get("Content-Type", ""):
            raise _Unusable("the site answered with a web page instead of the file")
        if size is not None and total is not None and total != size:
            raise _Unusable(f"the file there has {total} bytes instead of {size}")
        if response.status_code == 200:
            offset = 0  # the server ignored the range, or its file has changed
        needed = (total or offset) - offset
        if needed > shutil.disk_usage(part.parent).free:
            raise RestoreError(f"The disk of {part.parent} has no room for the {needed / 1e6:.0f} MB still to come.")
        disk.write_json(label, {"url": url, "validator": _validator(response)})
        with part.open("ab" if offset else "wb") as handle:
            done = offset
            for block in response.iter_content(_BLOCK):
                handle.write(block)
                handle.flush()
                done += len(block)
                if progress:
                    progress(done, total)
    if total is not None and done < total:
        raise _Cut(f"{done} of {total} bytes arrived")


def _resume_point(part: Path, label: Path, url: str) -> tuple[int, str | None]:
    """How many bytes to keep and the validator their server gave; (0, None) when they are of unknown origin."""
    if not part.exists():
        return 0, None
    try:
        known = json.loads(label.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0, None
    return (part.stat().st_size, known.get("validator")) if known.get("url") == url else (0, None)


def _validator(response: requests.Response) -> str | None:
    """What If-Range takes: a strong ETag, else the date."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _total(response: requests.Response, offset: int) -> int | None:
    """Size of the whole file as this response states it."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
    if response.status_code == 206:
        if not match or int(match[1] or -1) != offset:
            raise _Unusable(f"the server sent another range than asked for ({response.headers.get('Content-Range')})")
        return int(match[2])
    if match:
        return int(match[2])
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() and response.status_code == 200 else None
