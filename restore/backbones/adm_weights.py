"""guided-diffusion (ADM) weights as weights of diffusers' `UNet2DModel`.

An ADM network (Dhariwal & Nichol 2021) is exactly a UNet2DModel after renaming its tensors. The
architecture is inferred from names and shapes; what shapes cannot tell (the number of attention
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
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "qkv": "qkv", "proj_out": "to_out.0"}  # convert_weights splits qkv


@dataclass(frozen=True)
class Architecture:
    """The architecture that the names and shapes of an ADM state dict determine.

    base: channels C of the timestep embedding (its width is 4C).
    channels, attention: channels and presence of self-attention per level, finest first.
    depth: residual blocks per level. classes: rows of the label embedding, None if unconditional.
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
        """Distinct channel counts of the attention layers, including the middle block's."""
        levels = [c for c, present in zip(self.channels, self.attention, strict=True) if present]
        return tuple(sorted({*levels, self.channels[-1]}))


def infer_architecture(shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """Infer the architecture from tensor names and shapes. Raises RestoreError if they are not those of an ADM."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            first = next(iter(shapes), "nothing")
            raise RestoreError(
                f"this is not a guided-diffusion U-Net: it has no '{name}' (its first tensor is '{first}'); "
                "it must be the flat state dict of a guided-diffusion UNetModel"
            )
        return tuple(shapes[name])

    base = shape("time_embed.0.weight")[1]
    in_channels, out_channels = shape("input_blocks.0.0.weight")[1], shape("out.2.weight")[0]
    shape("middle_block.1.qkv.weight")
    n_in, n_out = (
        1 + max((int(name.split(".")[1]) for name in shapes if name.startswith(side + ".")), default=-1)
        for side in ("input_blocks", "output_blocks")
    )
    shape("output_blocks.0.0.in_layers.0.weight")

    # On the way up, every level but the outermost ends with an upsampler after its last residual block.
    resnet_ups, conv_ups = (
        sum(f"output_blocks.{n}.{i}.{key}" in shapes for n in range(n_out) for i in (1, 2))
        for key in ("in_layers.0.weight", "conv.weight")
    )
    levels = 1 + resnet_ups + conv_ups
    per_level, remainder = divmod(n_in, levels)
    if remainder or per_level < 2 or n_out != n_in:
        raise RestoreError(
            f"this is not a guided-diffusion U-Net or not complete: it has {n_in} input blocks, {n_out} output blocks "
            f"and {levels - 1} upsamplers"
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


def count_heads(arch: Architecture, heads: int | None = None, head_channels: int | None = None) -> dict[int, int]:
    """Return the number of heads by the channels of an attention layer, which shapes do not tell.

    heads: the same number everywhere (num_heads with num_head_channels = -1). head_channels: channels per head. With
    neither, 64 channels per head, as in all published ADM checkpoints. Raises RestoreError unless the channels divide.
    """
    if heads is not None and head_channels is not None:
        raise RestoreError("heads and head_channels must not be given both")
    width = head_channels or PUBLISHED_HEAD_CHANNELS
    counts = {}
    for channels in arch.attention_channels:
        if heads is not None and (heads < 1 or channels % heads):
            raise RestoreError(f"heads must divide the {channels} channels of an attention layer, got {heads}")
        if heads is None and (width < 1 or channels % width):
            raise RestoreError(
                f"an attention layer of {channels} channels cannot have heads of {width} channels, and the weights do "
                "not tell their width; pass head_channels=... or heads=... as the network was trained with"
            )
        counts[channels] = heads if heads is not None else channels // width
    return counts


def make_config(arch: Architecture, heads: Mapping[int, int], resolution: int) -> dict:
    """Return the constructor arguments of the UNet2DModel with this architecture."""
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
    """Build a UNet2DModel on the meta device, for load_state_dict(assign=True).

    base: channels of the timestep embedding; diffusers ties them to the first level's channels, ADM does
    not (ImageNet-512: 256 against 128). heads: number of heads by a layer's channels; diffusers has
    one width for all layers.
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
                raise RestoreError(f"heads must have an entry for {path} with its {module.query_dim} channels")
            count = heads[module.query_dim]
            module.heads = module.sliceable_head_dim = count
            module.scale = (module.query_dim // count) ** -0.5
    return network.eval()


def map_modules(arch: Architecture) -> dict[str, str]:
    """Return the name in diffusers of each module that such a network of guided-diffusion may have."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }

    def add(source: str, target: str, parts: Mapping[str, str]) -> None:
        table.update({f"{source}.{part}": f"{target}.{name}" for part, name in parts.items()})

    add("middle_block.0", "mid_block.resnets.0", RESNET)
    add("middle_block.1", "mid_block.attentions.0", ATTENTION)
    add("middle_block.2", "mid_block.resnets.1", RESNET)
    levels, depth = len(arch.channels), arch.depth
    for i in range(levels):
        for j in range(depth):
            block = f"input_blocks.{1 + i * (depth + 1) + j}"
            add(f"{block}.0", f"down_blocks.{i}.resnets.{j}", RESNET)
            add(f"{block}.1", f"down_blocks.{i}.attentions.{j}", ATTENTION)
        add(f"input_blocks.{(i + 1) * (depth + 1)}.0", f"down_blocks.{i}.downsamplers.0", {**RESNET, "op": "conv"})
        for j in range(depth + 1):
            block = f"output_blocks.{i * (depth + 1) + j}"
            add(f"{block}.0", f"up_blocks.{i}.resnets.{j}", RESNET)
            add(f"{block}.1", f"up_blocks.{i}.attentions.{j}", ATTENTION)
        upsampler = 2 if arch.attention[levels - 1 - i] else 1
        add(f"{block}.{upsampler}", f"up_blocks.{i}.upsamplers.0", {**RESNET, "conv": "conv"})
    return table


def split_qkv(tensor: torch.Tensor, heads: int, order: str) -> tuple[torch.Tensor, ...]:
    """Split a (3c, ...) qkv tensor into q, k, v of (c, ...). legacy: heads outermost; new: q, k, v outermost."""
    if order == "new":
        return tuple(tensor.chunk(3))
    per_head = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
    return tuple(per_head[:, i].reshape(-1, *tensor.shape[1:]) for i in range(3))


def convert_weights(
    state: Mapping[str, torch.Tensor],
    arch: Architecture,
    heads: Mapping[int, int],
    attention_order: str,
    targets: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return `state` under diffusers' names, fp32, shaped as `targets` (the state dict of build_network).

    Works on meta tensors. Raises RestoreError, with the first missing and unexpected names, unless every tensor is
    used exactly once and every target filled.
    """
    if attention_order not in ("legacy", "new"):
        raise RestoreError(f"attention_order must be 'legacy' or 'new', got '{attention_order}'")
    names = [(f"{a}.{kind}", f"{b}.{kind}") for a, b in map_modules(arch).items() for kind in ("weight", "bias")]
    table = {source: target for source, target in names if target.replace(".qkv.", ".to_q.") in targets}
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
    result = {}
    for source, target in table.items():
        tensor, names = state[source].float(), [target]
        stem, _, kind = target.rpartition(".")
        if stem.endswith((".qkv", ".to_out.0")) and tensor.ndim > 1:
            tensor = tensor.flatten(1)  # 1x1 convolutions there, linear layers here
        parts = (tensor,)
        if stem.endswith(".qkv"):
            if tensor.shape[0] % 3 or tensor.shape[0] // 3 not in heads:
                wanted = " or ".join(map(str, heads))
                raise RestoreError(f"'{source}' must have 3 times {wanted} rows, got {tensor.shape[0]} rows")
            parts = split_qkv(tensor, heads[tensor.shape[0] // 3], attention_order)
            names = [f"{stem[:-3]}{letter}.{kind}" for letter in ("to_q", "to_k", "to_v")]
        for name, part in zip(names, parts, strict=True):
            if part.shape != targets[name].shape:
                raise RestoreError(
                    f"the checkpoint does not fit: {name} must have the shape {tuple(targets[name].shape)}, got "
                    f"{tuple(part.shape)} from '{source}'"
                )
            result[name] = part.contiguous()
    return result
