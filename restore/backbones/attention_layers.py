"""The self-attention layers of diffusers' U-Nets and transformers, with their names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn

from restore.backbones.base import AttentionLayer
from restore.backbones.diffusers_parts import Attention

# Names of transformers' lists of blocks, in order of execution (AuraFlow's are joint, HunyuanDiT's have no epithet).
STACKS = ("transformer_blocks", "joint_transformer_blocks", "single_transformer_blocks", "blocks")


def find_attention_layers(network: nn.Module) -> dict[str, AttentionLayer]:
    """Return the self-attention layers of a diffusers network by path, in order of execution.

    U-Nets have the paper's names, those of the original code: `input_blocks.8.1` is the attention of the ninth input
    block, where conv_in is block 0 and every residual block and downsampler counts as one. A block with several
    transformer layers (SDXL) has `.transformer_blocks.n.attn1` appended. Cross-attention is left out, even if a model
    has it in attn1 (the x4 upscaler).

    In transformers the short names are b0, b1, ... in order of the blocks: FLUX's single blocks continue the count of
    the double ones (19 to 56 of FLUX.1). If a block of SD3.5 has a second attention, of the image only, it is b0.2.
    """
    layers = _unet_layers(network) if hasattr(network, "down_blocks") else _transformer_layers(network)
    return {layer.path: layer for layer in layers}


def _unet_layers(unet: nn.Module) -> Iterator[AttentionLayer]:
    number, downsampling = 1, 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            names = f"down_blocks.{i}", f"input_blocks.{number}.1", f"i{number}"
            yield from _block_layers(block, j, *names, downsampling)
            number += 1
        if block.downsamplers is not None:
            number, downsampling = number + 1, downsampling * 2
    for j in range(len(unet.mid_block.attentions) if unet.mid_block is not None else 0):
        names = "mid_block", f"middle_block.{2 * j + 1}", f"m{2 * j + 1}"
        yield from _block_layers(unet.mid_block, j, *names, downsampling)
    number = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            names = f"up_blocks.{i}", f"output_blocks.{number}.1", f"o{number}"
            yield from _block_layers(block, j, *names, downsampling)
            number += 1
        if block.upsamplers is not None:
            downsampling //= 2


def _block_layers(
    block: nn.Module, index: int, path: str, paper: str, short: str, downsampling: int
) -> Iterator[AttentionLayer]:
    """Yield the self-attention layers, if any, after residual block `index` of a U-Net's block."""
    attentions = getattr(block, "attentions", None)
    module, path = None if attentions is None else attentions[index], f"{path}.attentions.{index}"
    if isinstance(module, Attention) and not module.is_cross_attention:
        yield AttentionLayer(path, paper, short, module, module.heads, module.query_dim, downsampling)
    blocks = getattr(module, "transformer_blocks", ())
    for n, attn in enumerate(transformer.attn1 for transformer in blocks):
        if attn is not None and not attn.is_cross_attention:
            inner = f".transformer_blocks.{n}.attn1"
            tail, short_tail = (inner, f".{n}") if len(blocks) > 1 else ("", "")
            names = path + inner, paper + tail, short + short_tail
            yield AttentionLayer(*names, attn, attn.heads, attn.to_q.in_features, downsampling)


def takes_positions(network: nn.Module) -> bool:
    """Whether a transformer is told its tokens' positions, as FLUX, Chroma and FLUX.2 are: it takes 2 x 2 cells of a
    latent as one token, and times from 0 to 1, which it multiplies by 1000."""
    return "img_ids" in inspect.signature(type(network).forward).parameters


def _transformer_layers(network: nn.Module) -> Iterator[AttentionLayer]:
    patch = 2 if takes_positions(network) else network.config.get("patch_size", 2)
    stacks = [(name, getattr(network, name, ())) for name in STACKS]
    blocks = [(f"{name}.{i}", block) for name, stack in stacks for i, block in enumerate(stack)]
    for n, (path, block) in enumerate(blocks):
        for part, short in (("attn1", f"b{n}"), ("attn", f"b{n}"), ("attn2", f"b{n}.2")):
            attn = getattr(block, part, None)
            if attn is not None and not getattr(attn, "is_cross_attention", False):
                yield AttentionLayer(f"{path}.{part}", "", short, attn, attn.heads, attn.query_dim, patch)
