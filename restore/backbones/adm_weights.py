"""guided-diffusion (ADM) weights as weights of diffusers' `UNet2DModel`.

An ADM network (Dhariwal & Nichol 2021) is exactly a UNet2DModel after renaming its tensors. The
architecture is read from the names and shapes alone; what shapes cannot tell (the number of attention
heads, the order of q, k, v) are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps

from operators import RestoreError

PUBLISHED_HEAD_CHANNELS = 64
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}


@dataclass(frozen=True)
class Architecture:
    """Everything the names and shapes of an ADM state dict say.

    base: channels C of the timestep embedding (its width is 4C).
    channels, attention: channels and presence of self-attention per level, finest first.
    depth: residual blocks per level. classes: rows of the label embedding, None when unconditional.
    resample_resnet: resblock_updown (True) or plain convolutions (False). scale_shift: use_scale_shift_norm.
    """

    base: int
    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    depth: int
    in_channels: int
    out_channels: int
    classes: int | None
    resample_resnet: bool
    scale_shift: bool

    @property
    def attention_channels(self) -> tuple[int, ...]:
        """Distinct channel counts of the attention layers, the middle block's included."""
        levels = [c for c, present in zip(self.channels, self.attention, strict=True) if present]
        return tuple(sorted({*levels, self.channels[-1]}))


def infer_architecture(shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """Architecture from tensor names and shapes. Raises RestoreError when they are no ADM's."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            first = next(iter(shapes), "nothing")
            raise RestoreError(
                f"this is not a guided-diffusion U-Net: it lacks '{name}' (its first tensor is '{first}'); "
                "expected the flat state dict of a guided-diffusion UNetModel"
            )
        return tuple(shapes[name])

    base = shape("time_embed.0.weight")[1]
    in_channels, out_channels = shape("input_blocks.0.0.weight")[1], shape("out.2.weight")[0]
    shape("middle_block.1.qkv.weight")
    blocks = {}
    for side in ("input_blocks", "output_blocks"):
        numbers = {int(name.split(".")[1]) for name in shapes if name.startswith(side + ".")}
        blocks[side] = max(numbers, default=-1) + 1
    shape("output_blocks.0.0.in_layers.0.weight")

    # Every level but the outermost ends, on the way up, with an upsampler behind its last residual block.
    resnet_ups, conv_ups = (
        sum(f"output_blocks.{n}.{i}.{key}" in shapes for n in range(blocks["output_blocks"]) for i in (1, 2))
        for key in ("in_layers.0.weight", "conv.weight")
    )
    levels = 1 + resnet_ups + conv_ups
    per_level, remainder = divmod(blocks["input_blocks"], levels)
    if remainder or per_level < 2 or blocks["output_blocks"] != blocks["input_blocks"]:
        raise RestoreError(
            f"{blocks['input_blocks']} input blocks, {blocks['output_blocks']} output blocks and {levels - 1} "
            "upsamplers do not make a guided-diffusion U-Net; is the checkpoint complete?"
        )
    first = [1 + level * per_level for level in range(levels)]
    channels = tuple(shape(f"input_blocks.{n}.0.out_layers.3.weight")[0] for n in first)
    return Architecture(
        base=base,
        channels=channels,
        attention=tuple(f"input_blocks.{n}.1.qkv.weight" in shapes for n in first),
        depth=per_level - 1,
        in_channels=in_channels,
        out_channels=out_channels,
        classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        resample_resnet=resnet_ups > 0,
        scale_shift=shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * channels[0],
    )


def head_counts(arch: Architecture, heads: int | None = None, head_channels: int | None = None) -> dict[int, int]:
    """Number of heads by the channels of an attention layer.

    The shapes do not tell it. `heads`: the same number everywhere (num_heads with num_head_channels = -1);
    `head_channels`: channels per head; neither: 64 channels per head, as all published ADM checkpoints have.
    Raises RestoreError when the channels do not divide.
    """
    if heads is not None and head_channels is not None:
        raise RestoreError("give either heads or head_channels, not both")
    counts = {}
    for channels in arch.attention_channels:
        width = head_channels or PUBLISHED_HEAD_CHANNELS
        if heads is not None and (heads < 1 or channels % heads):
            raise RestoreError(f"an attention layer of {channels} channels cannot have {heads} heads")
        if heads is None and (width < 1 or channels % width):
            raise RestoreError(
                f"an attention layer of {channels} channels cannot have heads of {width} channels, and the weights do "
                "not tell their width; pass head_channels=... or heads=... as the network was trained with"
            )
        counts[channels] = heads if heads is not None else channels // width
    return counts


def network_config(arch: Architecture, heads: Mapping[int, int], resolution: int) -> dict:
    """Constructor arguments of the UNet2DModel with this architecture."""
    down = "ResnetDownsampleBlock2D" if arch.resample_resnet else "DownBlock2D"
    up = "ResnetUpsampleBlock2D" if arch.resample_resnet else "UpBlock2D"
    return {
        "sample_size": resolution,
        "in_channels": arch.in_channels,
        "out_channels": arch.out_channels,
        "block_out_channels": list(arch.channels),
        "layers_per_block": arch.depth,
        "time_embedding_dim": 4 * arch.base,
        "down_block_types": ["AttnDownBlock2D" if present else down for present in arch.attention],
        "up_block_types": ["AttnUpBlock2D" if present else up for present in reversed(arch.attention)],
        "resnet_time_scale_shift": "scale_shift" if arch.scale_shift else "default",
        "downsample_type": "resnet" if arch.resample_resnet else "conv",
        "upsample_type": "resnet" if arch.resample_resnet else "conv",
        # a width that divides every layer's channels; build_network then sets each layer's own count
        "attention_head_dim": math.gcd(*(channels // count for channels, count in heads.items())),
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "num_class_embeds": arch.classes,
    }


def build_network(config: Mapping, base: int | None = None, heads: Mapping[int, int] | None = None) -> UNet2DModel:
    """An empty UNet2DModel on the meta device, its weights to be assigned by load_state_dict(assign=True).

    base: channels of the timestep embedding; diffusers ties them to the first level's channels, ADM does
    not (ImageNet-512: 256 against 128). heads: number of heads by a layer's channels; diffusers knows
    only one width for all layers.
    """
    with torch.device("meta"):
        network = UNet2DModel.from_config(dict(config))
        if base is not None and base != network.config.block_out_channels[0]:
            width = network.config.time_embedding_dim
            network.time_proj = Timesteps(base, network.config.flip_sin_to_cos, network.config.freq_shift)
            network.time_embedding = TimestepEmbedding(base, width)
    for path, module in network.named_modules():
        if heads and hasattr(module, "to_q"):
            if module.query_dim not in heads:
                raise RestoreError(f"no number of heads is given for {path} with its {module.query_dim} channels")
            count = heads[module.query_dim]
            module.heads = module.sliceable_head_dim = count
            module.scale = (module.query_dim // count) ** -0.5
    return network.eval()


def rename_table(arch: Architecture) -> dict[str, str]:
    """Module names, guided-diffusion -> diffusers. The names say nothing of weight/bias."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    levels, depth = len(arch.channels), arch.depth

    def resnet(source: str, target: str, changes_channels: bool) -> None:
        table.update({f"{source}.{a}": f"{target}.{b}" for a, b in RESNET.items()})
        if changes_channels:
            table[f"{source}.skip_connection"] = f"{target}.conv_shortcut"

    def attention(source: str, target: str) -> None:
        table.update({f"{source}.norm": f"{target}.group_norm", f"{source}.proj_out": f"{target}.to_out.0"})
        table[f"{source}.qkv"] = f"{target}.qkv"  # split by convert()

    number, skips = 1, [arch.channels[0]]
    current = arch.channels[0]
    for level, channels in enumerate(arch.channels):
        for j in range(depth):
            resnet(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{j}", current != channels)
            if arch.attention[level]:
                attention(f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{j}")
            current = channels
            skips.append(channels)
            number += 1
        if level < levels - 1:
            source, target = f"input_blocks.{number}.0", f"down_blocks.{level}.downsamplers.0"
            if arch.resample_resnet:
                resnet(source, target, False)
            else:
                table[f"{source}.op"] = f"{target}.conv"
            skips.append(channels)
            number += 1

    resnet("middle_block.0", "mid_block.resnets.0", False)
    attention("middle_block.1", "mid_block.attentions.0")
    resnet("middle_block.2", "mid_block.resnets.1", False)

    number = 0
    for u, level in enumerate(reversed(range(levels))):
        for j in range(depth + 1):
            block, unit = f"output_blocks.{number}", f"up_blocks.{u}"
            resnet(f"{block}.0", f"{unit}.resnets.{j}", current + skips.pop() != arch.channels[level])
            current = arch.channels[level]
            if arch.attention[level]:
                attention(f"{block}.1", f"{unit}.attentions.{j}")
            if j == depth and level > 0:
                source = f"{block}.{2 if arch.attention[level] else 1}"
                if arch.resample_resnet:
                    resnet(source, f"{unit}.upsamplers.0", False)
                else:
                    table[f"{source}.conv"] = f"{unit}.upsamplers.0.conv"
            number += 1
    return table


def split_qkv(tensor: torch.Tensor, heads: int, order: str) -> tuple[torch.Tensor, ...]:
    """A (3c, ...) qkv tensor as q, k, v of (c, ...). legacy: heads outermost; new: q, k, v outermost."""
    if order == "new":
        return tuple(tensor.chunk(3))
    per_head = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
    return tuple(per_head[:, i].reshape(-1, *tensor.shape[1:]) for i in range(3))


def convert(
    state: Mapping[str, torch.Tensor],
    arch: Architecture,
    heads: Mapping[int, int],
    attention_order: str,
    targets: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """`state` under diffusers' names, fp32, shaped as `targets` (the state dict of build_network).

    Every source tensor is used exactly once and every target filled; otherwise RestoreError with the first
    missing and unexpected names. Works on meta tensors.
    """
    if attention_order not in ("legacy", "new"):
        raise RestoreError(f"attention_order must be 'legacy' or 'new', not '{attention_order}'")
    table = {f"{a}.{kind}": f"{b}.{kind}" for a, b in rename_table(arch).items() for kind in ("weight", "bias")}
    if arch.classes is not None:
        table["label_emb.weight"] = "class_embedding.weight"
    missing = [name for name in table if name not in state]
    unexpected = [name for name in state if name not in table]
    if missing or unexpected:
        raise RestoreError(
            "the checkpoint does not fit a guided-diffusion U-Net: "
            f"{len(missing)} tensors missing (first: {missing[0] if missing else 'none'}), "
            f"{len(unexpected)} unexpected (first: {unexpected[0] if unexpected else 'none'})"
        )
    result, sources = {}, {}
    for source, target in table.items():
        tensor = state[source].to(torch.float32)
        stem, _, kind = target.rpartition(".")
        if stem.endswith(".qkv"):
            if tensor.shape[0] % 3 or tensor.shape[0] // 3 not in heads:
                raise RestoreError(
                    f"'{source}' has {tensor.shape[0]} rows, expected 3 times {' or '.join(map(str, heads))}"
                )
            if tensor.ndim > 1:
                tensor = tensor.reshape(tensor.shape[0], -1)
            parts = split_qkv(tensor, heads[tensor.shape[0] // 3], attention_order)
            names = [f"{stem[:-3]}{letter}.{kind}" for letter in ("to_q", "to_k", "to_v")]
        else:
            if stem.endswith("to_out.0") and tensor.ndim > 2:
                tensor = tensor.reshape(tensor.shape[0], -1)
            parts, names = (tensor,), (target,)
        for name, part in zip(names, parts, strict=True):
            result[name], sources[name] = part.contiguous(), source
    for name, tensor in result.items():
        if name not in targets or tensor.shape != targets[name].shape:
            wanted = tuple(targets[name].shape) if name in targets else "no such tensor"
            raise RestoreError(
                f"the checkpoint does not fit: '{sources[name]}' gives {name} the shape {tuple(tensor.shape)}, "
                f"expected {wanted}"
            )
    unfilled = [name for name in targets if name not in result]
    if unfilled:
        raise RestoreError(f"the checkpoint fills no '{unfilled[0]}'; it is not a complete guided-diffusion U-Net")
    return result
