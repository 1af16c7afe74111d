"""Tensors on their way from the host to the device of a prior."""

from __future__ import annotations

import torch

UNPINNED = ("cpu", "mps", "meta")  # without pinned memory, or without need of it


def send(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a tensor of the host on `device`, in this dtype. An accelerator copies it in its turn: from pinned memory
    the host does not wait."""
    tensor = tensor if dtype is None else tensor.to(dtype)
    if device.type in UNPINNED or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
