"""Torch's state around a call, which must not change a result: autocast, inference mode, the default device.

The default dtype belongs to the whole process, so it is not changed here: every tensor states its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def no_autocast(device: torch.device | str) -> Iterator[None]:
    """Within the block, compute on this device and on the CPU in the precision of the tensors."""
    with ExitStack() as stack:
        for kind in {"cpu", torch.device(device).type}:
            if kind != "meta" and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def neutral_state(device: torch.device | str) -> Iterator[None]:
    """Within the block, neither the caller's autocast nor inference mode nor default device act."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(no_autocast(device))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
