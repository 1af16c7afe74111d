"""How much memory is free on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on a device, within the limits of this process's control groups;
    None if they are unknown."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min((n for n in (_machine_memory(), *_group_memory()) if n is not None), default=None)


def _machine_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        pass
    try:  # not Linux: all of its memory, free or not
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _group_memory(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Yield the bytes left in each of this process's control groups (versions 1 and 2) and of their parents."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for number, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1):
        if number == "0":
            base, limit, used, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                most, now = int((folder / limit).read_text()), int((folder / used).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield most - now + int(stat.get(cache, 0))  # the kernel gives up cached files
            except (OSError, ValueError):  # no limit ("max"), or not visible from inside a container
                pass
            if folder == base:
                break
