"""Download of a weight file: resumed after a cut connection, verified before it gets its name."""

from __future__ import annotations

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
Verify = Callable[[Path], str]  # returns the SHA-256 of a file, or raises RestoreError

_BLOCK = 1 << 15  # bytes; a broken connection loses the unfinished block
_TIMEOUT = (10, 60)  # seconds to connect, seconds without a byte


class _Unusable(Exception):
    """This address cannot deliver the file; another might."""


class _Cut(Exception):
    """The connection ended early; the downloaded part is good."""


def fetch_file(
    urls: tuple[str, ...],
    target: Path,
    size: int | None = None,
    verify: Verify | None = None,
    advice: str = "",
    progress: Progress | None = None,
    patience: float = 1.0,
    attempts: int = 4,
) -> str:
    """Download `target` from the first address that delivers it, and return its SHA-256.

    The bytes go to `target`.part, which survives a cut connection and a killed process; the next attempt, also in a
    later call, requests the rest (HTTP Range with If-Range, RFC 9110 sec. 13.1.5 and 14) and starts over if the server
    refuses or its file has changed. The complete part is renamed to `target` after `verify` (default: `verify_file`).
    size: its bytes, if known. attempts: tries in a row without a new byte, `patience` seconds apart and doubling.
    Raises RestoreError, ending with `advice`, if no address delivers the right file, and for a full disk.
    """
    verify = verify or (lambda path: verify_file(path, size, None, target.name))
    problems = []
    for url in urls:
        try:
            return _fetch_from(url, target, size, verify, progress, patience, attempts)
        except (_Unusable, requests.RequestException) as problem:
            problems.append(f"{url}: {problem}")
        except OSError as error:
            raise RestoreError(
                f"cannot write {target}: {disk.describe_os_error(error)}; the downloaded part is kept, run it again"
            ) from error
    why = f" ({'; '.join(problems)})" if problems else ", no address offers the file itself"
    raise RestoreError(f"{target.name} could not be downloaded{why}. {advice}".strip())


def query_size(urls: tuple[str, ...]) -> int | None:
    """Return the bytes of a file as the first address that answers states them; None if none does."""
    for url in urls:
        try:
            with requests.head(
                url, headers={"Accept-Encoding": "identity"}, allow_redirects=True, timeout=_TIMEOUT
            ) as r:
                if (
                    r.ok
                    and r.headers.get("Content-Length", "").isdigit()
                    and "text/html" not in r.headers.get("Content-Type", "")
                ):
                    return int(r.headers["Content-Length"])
        except requests.RequestException:
            continue
    return None


def verify_file(path: Path, size: int | None, sha256: str | None, name: str | None = None) -> str:
    """Return the SHA-256 of a file. sha256: all of its digits, or the first ones.

    Raises RestoreError for another size or checksum and for a damaged file.
    """
    name = name or path.name
    actual = path.stat().st_size
    if size is not None and actual != size:
        raise RestoreError(f"{name} has {actual} bytes instead of {size}: it is incomplete or another file")
    if problem := find_damage(path):
        raise RestoreError(f"{name} {problem}: fetch it again")
    digest = disk.hash_file(path)
    if sha256 is not None and not digest.startswith(sha256):
        raise RestoreError(f"{name} is broken or another file: expected SHA-256 {sha256}, got {digest}; fetch it again")
    return digest


def find_damage(path: Path) -> str:
    """Return what is wrong with a weight file by its own structure, without a checksum; "" for nothing."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "is empty"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not weights (the site asked for a confirmation or a login)"
    if head[:4] == b"PK\x03\x04" and not zipfile.is_zipfile(path):  # torch.save: the directory is at the end
        return "is cut off: the end of its archive is missing"
    if path.suffix == ".safetensors" and 8 + int.from_bytes(head[:8], "little") > size:
        return "is cut off or no safetensors file"
    return ""


def _fetch_from(
    url: str, target: Path, size: int | None, verify: Verify, progress: Progress | None, patience: float, attempts: int
) -> str:
    part, label = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
    failures, resumed = 0, part.exists() and part.stat().st_size > 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _transfer(url, part, label, size, progress)
        except (_Cut, requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            failures = 0 if part.exists() and part.stat().st_size > before else failures + 1
            resumed = True
            if failures >= attempts:
                raise _Unusable(f"the connection broke {attempts} times in a row ({error})") from error
            time.sleep(patience * 2 ** max(0, failures - 1))
            continue
        try:
            digest = verify(part)
        except RestoreError as problem:
            part.unlink()
            label.unlink(missing_ok=True)
            if not resumed:
                raise _Unusable(str(problem)) from problem
            resumed = False  # the old part may have been bad: download once more from the first byte
            continue
        part.replace(target)
        label.unlink(missing_ok=True)
        return digest


def _transfer(url: str, part: Path, label: Path, size: int | None, progress: Progress | None) -> None:
    """Request once what is missing and append it to `part`."""
    known, offset, validator = disk.read_json(label), 0, None
    if part.exists() and isinstance(known, dict) and known.get("url") == url:  # else its origin is unknown
        offset, validator = part.stat().st_size, known.get("validator")
    headers = {"Accept-Encoding": "identity"}  # offsets have no meaning in a compressed transfer
    if offset:
        headers |= {"Range": f"bytes={offset}-"} | ({"If-Range": validator} if validator else {})
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        status, total = response.status_code, _read_total(response, offset)
        if status == 416 and offset and total == offset:
            return  # everything had arrived already
        if status == 416:
            part.unlink(missing_ok=True)
            raise _Cut("the downloaded part was longer than the file")
        if status >= 500 or status == 429:
            raise _Cut(f"HTTP status {status}")
        if status not in (200, 206):
            raise _Unusable(f"HTTP status {status}")
        if "text/html" in response.headers.get("Content-Type", ""):
            raise _Unusable("the site answered with a web page instead of the file")
        if size is not None and total is not None and total != size:
            raise _Unusable(f"the file there has {total} bytes instead of {size}")
        if status == 200:
            offset = 0  # the server ignored the range, or its file has changed
        needed = (total or offset) - offset
        if needed > shutil.disk_usage(part.parent).free:
            raise RestoreError(f"the disk of {part.parent} must have {needed / 1e6:.0f} MB free for the file's rest")
        etag = response.headers.get("ETag", "")  # If-Range takes a strong ETag, else the date
        validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
        disk.write_json(label, {"url": url, "validator": validator})
        with part.open("ab" if offset else "wb") as file:
            done = offset
            for block in response.iter_content(_BLOCK):
                file.write(block)
                file.flush()
                done += len(block)
                if progress:
                    progress(done, total)
    if total is not None and done < total:
        raise _Cut(f"{done} of {total} bytes arrived")


def _read_total(response: requests.Response, offset: int) -> int | None:
    """Return the size of the whole file as the response states it."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
    if response.status_code == 206 and (not match or int(match[1] or -1) != offset):
        raise _Unusable(f"the server sent another range than requested ({response.headers.get('Content-Range')})")
    if match:
        return int(match[2])
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() and response.status_code == 200 else None
