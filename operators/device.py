"""Where tensors are, for code that must not make an accelerator wait."""

from __future__ import annotations

import torch


def is_on_host(x: torch.Tensor) -> bool:
    """Return whether to ask for values of x (`if x.any()`, `x.item()`) costs no more than to compute them.

    An accelerator computes in turn what it was told, while the host plans ahead. A question makes the host wait until
    all of that is done, and the accelerator idle until the host has planned again: ask it rarely, where the answer
    saves more than that, and let results not depend on when it is asked.
    """
    return x.device.type == "cpu"
