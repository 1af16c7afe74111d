"""Atomic writes, JSON and hashes."""

from __future__ import annotations

import hashlib
import json
import resource
import signal

import numpy as np
import pytest
import torch

from operators import RestoreError
from restore import disk


def test_full_disk_and_interruption_leave_the_old_file(tmp_path):
    target = tmp_path / "a.bin"
    disk.write_bytes(target, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the kernel refuses the write, as on a full disk
    try:
        with pytest.raises(RestoreError, match="a.bin.*nothing was changed"):
            disk.write_bytes(target, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    try:
        with pytest.raises(KeyboardInterrupt), disk.open_atomic(target) as handle:
            handle.write(b"half")
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(RestoreError, match="folder does not exist"):
        disk.write_bytes(tmp_path / "no" / "a.bin", b"")
    assert "disk is full" in disk.describe_os_error(OSError(28, "No space left on device"))


def test_json_side_cars(tmp_path):
    disk.write_json(tmp_path / "a.json", {"seed": 0, "loss": torch.tensor(0.5), "path": tmp_path, "list": np.arange(2)})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "seed": 0,
        "loss": 0.5,
        "path": str(tmp_path),
        "list": [0, 1],
    }
    for bad in (float("nan"), torch.tensor(float("inf")), object()):
        with pytest.raises(RestoreError, match="a.json"):
            disk.write_json(tmp_path / "a.json", {"value": bad})
    assert json.loads((tmp_path / "a.json").read_text())["seed"] == 0
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "cut.json").write_text("{")
    assert disk.read_json(tmp_path / "a.json")["list"] == [0, 1] and disk.read_json(tmp_path / "list.json") == []
    for name, fact in (("list.json", "got a list"), ("cut.json", "JSON"), ("none.json", "JSON")):
        with pytest.raises(RestoreError, match=f"{name} .*{fact}"):
            disk.read_json(tmp_path / name, required=True)
    assert disk.read_json(tmp_path / "cut.json") is None and disk.read_json(tmp_path / "none.json") is None


def test_hashes(tmp_path):
    contents = [b"", b"a" * 3_000_000]
    digests = [hashlib.sha256(content) for content in contents]
    for name, content in zip("ab", contents, strict=True):
        (tmp_path / name).write_bytes(content)
    assert disk.hash_file(tmp_path / "b") == digests[1].hexdigest()
    together = hashlib.sha256(digests[0].digest() + digests[1].digest()).hexdigest()
    assert disk.hash_files([tmp_path / "a", tmp_path / "b"]) == together
    with pytest.raises(RestoreError, match="no file .*none"):
        disk.hash_file(tmp_path / "none")
