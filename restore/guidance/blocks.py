"""Blocks around attention layers within a `with` block: what enters them, and networks without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from operators import RestoreError
from restore.backbones.base import AttentionLayer
from restore.backbones.forwards import RanLayers, replace_forward
from restore.guidance.attention import IMAGE_FIRST
from restore.guidance.layers import Attention, choose_layers

Blocks = Mapping[nn.Module, AttentionLayer]


def find_blocks(name: str, layers: str | Sequence[str], network: nn.Module, attention: Attention) -> Blocks:
    """Return the blocks of the chosen layers, each with its last layer. Raises RestoreError, in which the guidance is
    called `name`, for an unknown layer and for heads."""
    chosen = choose_layers(layers, None, attention)
    if any(heads is not None for _, heads in chosen):
        raise RestoreError(f"layers of {name} must name no heads, got {layers!r}; {name} changes whole blocks")
    return {block_of(network, layer): layer for layer, _ in chosen}


def block_of(network: nn.Module, layer: AttentionLayer) -> nn.Module:
    """Return the transformer block that owns the layer; the layer itself if it is an item of a list."""
    owner, _, name = layer.path.rpartition(".")
    return layer.module if name.isdecimal() else network.get_submodule(owner)


@contextmanager
def change_tokens(
    blocks: Blocks, change: Callable[[nn.Module, torch.Tensor], torch.Tensor], name: str
) -> Iterator[set[str]]:
    """Within the block the image tokens h (B, N, C) enter each of `blocks` as change(block, h), of the same shape, and
    the text's as they are; yield the paths of the layers whose block ran.

    Raises RestoreError, in which the guidance is called `name`, where image and text are one sequence.
    """
    ran: set[str] = set()

    def replace(module, forward):
        def run(*args, **kwargs):
            tokens, path = args[0] if args else kwargs["hidden_states"], blocks[module].path
            if path.startswith("single_transformer_blocks") and _find_text(args, kwargs) is None:
                raise RestoreError(f"layers of {name} must keep image and text apart, got {path}")
            ran.add(path)
            if tokens.ndim == 3:
                tokens = change(module, tokens)
            else:
                tokens = change(module, tokens.flatten(2).mT).mT.reshape(tokens.shape)
            if args:
                return forward(tokens, *args[1:], **kwargs)
            return forward(**kwargs | {"hidden_states": tokens})

        return run

    with replace_forward(blocks, replace):
        yield ran


@contextmanager
def skip_blocks(blocks: Blocks) -> Iterator[set[str]]:
    """Within the block each of `blocks` returns what enters it, image and text; yield the paths of the layers whose
    block was called."""
    ran: set[str] = set()
    part = RanLayers(("skip", tuple(sorted(layer.path for layer in blocks.values()))), ran)

    def replace(module, forward):
        def run(*args, **kwargs):
            layer, image = blocks[module], args[0] if args else kwargs["hidden_states"]
            ran.add(layer.path)
            text = _find_text(args, kwargs) if type(layer.module.processor).__name__ in IMAGE_FIRST else None
            return image if text is None else (text, image)  # in this order in all of diffusers' joint blocks

        return run

    with replace_forward(blocks, replace, part=part):
        yield ran


def _find_text(args: tuple, kwargs: dict) -> torch.Tensor | None:
    text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    return text if isinstance(text, torch.Tensor) and text.ndim == 3 else None
