"""What the instruments share: settings from the command line, and the peak memory of a piece of work."""

from __future__ import annotations

import gc
import inspect
import os
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from operators import RestoreError
from restore.config import fill_defaults


def run_command(function: Callable[..., str], arguments: Sequence[str] | None = None) -> None:
    """Print what `function` returns for `key=value` arguments, by default those of the command line.

    Ends the process with one line if an argument is not a parameter of the function or has another type.
    """
    try:
        print(function(**parse_settings(function, sys.argv[1:] if arguments is None else arguments)))
    except RestoreError as error:
        sys.exit(f"error: {error}")


def parse_settings(function: Callable, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the keyword arguments that `key=value` strings give. Raises RestoreError for unknown keys and types."""
    for argument in arguments:
        if "=" not in argument:
            raise RestoreError(f"settings must be key=value, got {argument}")
    types, parameters = typing.get_type_hints(function), inspect.signature(function).parameters.values()
    schema = make_dataclass("Settings", [(p.name, types[p.name], p.default) for p in parameters])
    return fill_defaults(schema, OmegaConf.from_dotlist(list(arguments)))


def run_in_new_process(code: str, name: str) -> float:
    """Return the last number that `code` prints in a new Python. Raises RestoreError, with `name`, if it fails."""
    # With a low threshold every tensor has its own mapping, and the peak is that of the tensors, not of what
    # glibc's arenas keep.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    options = {"capture_output": True, "text": True, "env": environment, "cwd": Path(__file__).parents[1]}
    done = subprocess.run([sys.executable, "-c", code], check=False, **options)
    if done.returncode:
        raise RestoreError(f"measuring {name} failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])


def measure_peak(run: Callable[[], Any], device: torch.device | str) -> float:
    """Return the MiB by which `run` raises the peak memory of this process, or of the device with CUDA.

    Raises RestoreError on a CPU without /proc (other than Linux).
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    run()
    return (_read_status("VmHWM") - before) / 1024


def _read_status(key: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        raise RestoreError("memory on a CPU is measured on Linux only; try memory=false") from None
    return float(next(line for line in lines if line.startswith(key)).split()[1])
