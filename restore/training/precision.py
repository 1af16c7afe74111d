"""Precision of a training step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class FullPrecisionAttention(TorchFunctionMode):
    """Within this context scaled_dot_product_attention is computed in fp32, also under autocast."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = (part.float() for part in args[:3])
        with torch.autocast(q.device.type, enabled=False):
            return func(q, k, v, *args[3:], **kwargs).to(args[0].dtype)
