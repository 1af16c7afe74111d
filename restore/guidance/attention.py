"""Spoils the attention of chosen layers for the duration of a `with` block, in any architecture.

The module's own processor runs unchanged; only what `scaled_dot_product_attention` returns inside it is
replaced. Norms, residuals, rotary embeddings and text streams stay the processor's business.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from operators import RestoreError
from restore.backbones.base import AttentionLayer
from restore.guidance.targets import Draw, Target


@dataclass(frozen=True)
class Spoiled:
    """One layer to spoil: which heads (None: all), by what target and how strongly (u of 0..1)."""

    layer: AttentionLayer
    target: Target
    strength: float = 1.0
    heads: tuple[int, ...] | None = None


@contextmanager
def perturbed(spoiled: Sequence[Spoiled], draw: Draw) -> Iterator[None]:
    """Within the block the given layers attend with the map (1 − u) A + u A' on the chosen heads.

    draw(kind, shape) supplies the random targets' noise, in order of execution. The processors found on
    entry are put back on leaving, whatever happened. Enter it around the weak pass alone: checkpointed
    blocks recomputed by a later backward then see the true attention.
    """
    originals = []
    try:
        for item in spoiled:
            module = item.layer.module
            originals.append((module, module.processor))
            module.set_processor(_Processor(module.processor, item, draw))
        yield
    finally:
        for module, processor in reversed(originals):
            module.set_processor(processor)


class _Processor:
    """Calls the base processor with attention intercepted."""

    def __init__(self, base, item: Spoiled, draw: Draw):
        self.base, self.item, self.draw = base, item, draw

        # diffusers reads the signature of `processor.__call__` and drops the keyword arguments it does not name.
        def call(*args, **kwargs):
            return self(*args, **kwargs)

        call.__signature__ = inspect.signature(base.__call__)
        self.__call__ = call

    def __call__(self, *args, **kwargs):
        with _Intercept(self.item, self.draw) as intercept:
            out = self.base(*args, **kwargs)
        if not intercept.calls:
            raise RestoreError(
                f"the processor {type(self.base).__name__} of {self.item.layer.path} does not use "
                "scaled_dot_product_attention, so its attention cannot be perturbed; use diffusers' default processor "
                "(network.set_default_attn_processor(), no attention slicing)"
            )
        return out


class _Intercept(TorchFunctionMode):
    """Replaces the result of scaled_dot_product_attention, in this thread only."""

    def __init__(self, item: Spoiled, draw: Draw):
        super().__init__()
        self.item, self.draw, self.calls = item, draw, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        return _attend(self.item, self.draw, args, kwargs)


def _attend(item: Spoiled, draw: Draw, args: tuple, kwargs: dict) -> torch.Tensor:
    q, k, v, mask, scale = _arguments(*args, **kwargs)
    if k.shape[1] != q.shape[1]:
        raise RestoreError(f"{item.layer.path} shares keys between heads (grouped queries), which is not supported")
    if item.heads is None and item.strength == 1:
        return _spoil(item, q, k, v, mask, scale, draw)
    out = F.scaled_dot_product_attention(*args, **kwargs)
    if item.heads is None:
        return torch.lerp(out, _spoil(item, q, k, v, mask, scale, draw).to(out.dtype), item.strength)
    heads = list(item.heads)
    if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
        mask = mask[:, heads]
    spoilt = _spoil(item, q[:, heads], k[:, heads], v[:, heads], mask, scale, draw).to(out.dtype)
    out = out.clone()
    out[:, heads] = torch.lerp(out[:, heads], spoilt, item.strength)
    return out


def _spoil(item: Spoiled, q, k, v, mask, scale, draw: Draw) -> torch.Tensor:
    with torch.autocast(q.device.type, enabled=False):  # an explicit map is computed in fp32
        return item.target(q, k, v, mask, scale, draw)


def _arguments(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if is_causal:
        size = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()
    return query, key, value, attn_mask, scale
