"""guided-diffusion (ADM) weights as weights of diffusers' `UNet2DModel`.

An ADM network (Dhariwal & Nichol 2021) is exactly a UNet2DModel after renaming its tensors. The architecture is
inferred from names and shapes; what these do not tell (the number of heads, the order of q, k, v) are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from operators import RestoreError
from operators.validate import require_choice
from restore.backbones.diffusers_parts import TimestepEmbedding, Timesteps, UNet2DModel
from restore.backbones.weights import build_without_weights

State = Mapping[str, torch.Tensor]  # weights by name
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "qkv": "qkv", "proj_out": "to_out.0"}  # convert_weights splits qkv


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """Return the constructor arguments of the UNet2DModel for the tensor names and shapes of an ADM state dict.

    All but `attention_head_dim`, which they do not tell. time_embedding_dim is four times the channels of the timestep
    embedding. Raises RestoreError if they are not those of an ADM.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            first = next(iter(shapes), "nothing")
            raise RestoreError(f"not a guided-diffusion U-Net: it has no '{name}' (its first tensor is '{first}')")
        return tuple(shapes[name])

    width, in_channels = 4 * shape("time_embed.0.weight")[1], shape("input_blocks.0.0.weight")[1]
    out_channels = shape("out.2.weight")[0]
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
            f"not a complete guided-diffusion U-Net: {n_in} input and {n_out} output blocks, {levels - 1} upsamplers"
        )
    first = [1 + level * per_level for level in range(levels)]
    channels = [shape(f"input_blocks.{n}.0.out_layers.3.weight")[0] for n in first]
    attention = [f"input_blocks.{n}.1.qkv.weight" in shapes for n in first]
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resnet_ups else ("DownBlock2D", "UpBlock2D")
    scale_shift = shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * channels[0]
    return {
        "sample_size": 8 * 2 ** (levels - 1),
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": channels,
        "layers_per_block": per_level - 1,
        "time_embedding_dim": width,
        "down_block_types": ["AttnDownBlock2D" if present else down for present in attention],
        "up_block_types": ["AttnUpBlock2D" if present else up for present in reversed(attention)],
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "downsample_type": "resnet" if resnet_ups else "conv",
        "upsample_type": "resnet" if resnet_ups else "conv",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "num_class_embeds": shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
    }


def count_heads(config: Mapping, heads: int | None = None, head_channels: int | None = None) -> dict[int, int]:
    """Return the number of heads by the channels of an attention layer, which shapes do not tell.

    heads: the same number everywhere (num_heads with num_head_channels = -1). head_channels: channels per head. With
    neither, 64 channels per head, as in all published ADM checkpoints. Raises RestoreError unless the channels divide.
    """
    if heads is not None and head_channels is not None:
        raise RestoreError("heads and head_channels must not be given both")
    width = head_channels or 64
    counts = {}
    levels = zip(config["block_out_channels"], config["down_block_types"], strict=True)
    for channels in sorted({config["block_out_channels"][-1], *(c for c, block in levels if "Attn" in block)}):
        if heads is not None and (heads < 1 or channels % heads):
            raise RestoreError(f"heads must divide the {channels} channels of an attention layer, got {heads}")
        if heads is None and (width < 1 or channels % width):
            raise RestoreError(
                f"heads of {width} channels do not fit {channels} channels; pass head_channels or heads as in training"
            )
        counts[channels] = heads if heads is not None else channels // width
    return counts


def convert_state(
    state: State, path: Path, heads: int | None = None, head_channels: int | None = None, order: str = "legacy"
) -> UNet2DModel:
    """Build the network of a guided-diffusion state dict, all of whose tensors are used, in fp32.

    path: for errors. Works on meta tensors. Raises RestoreError if it is not such a network.
    """
    try:
        config = infer_config({name: tuple(tensor.shape) for name, tensor in state.items()})
    except RestoreError as error:
        raise RestoreError(f"{path} is {error}") from None
    counts = count_heads(config, heads, head_channels)
    # A width that divides every layer's channels; build_network then sets each layer's own count.
    config["attention_head_dim"] = math.gcd(*(channels // count for channels, count in counts.items()))
    network = build_network(config, config["time_embedding_dim"] // 4, counts)
    weights = convert_weights(state, config, counts, order, network.state_dict())
    network.load_state_dict(weights, strict=True, assign=True)
    return network


def build_network(config: Mapping, base: int | None = None, heads: Mapping[int, int] | None = None) -> UNet2DModel:
    """Build a UNet2DModel on the meta device, for load_state_dict(assign=True).

    base: channels of the timestep embedding; diffusers ties them to the first level's channels, ADM does not
    (ImageNet-512: 256 against 128). heads: number of heads by a layer's channels; diffusers has one width for all.
    """
    with build_without_weights():
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


def map_modules(config: Mapping) -> dict[str, str]:
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
    levels, depth = len(config["block_out_channels"]), config["layers_per_block"]
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
        upsampler = 2 if "Attn" in config["up_block_types"][i] else 1
        add(f"{block}.{upsampler}", f"up_blocks.{i}.upsamplers.0", {**RESNET, "conv": "conv"})
    return table


def convert_weights(
    state: State, config: Mapping, heads: Mapping[int, int], order: str, targets: State
) -> dict[str, torch.Tensor]:
    """Return `state` under diffusers' names, fp32, shaped as `targets` (the state dict of build_network).

    order: "legacy" if the rows of a qkv tensor are ordered by head first, "new" if by q, k, v. Works on meta
    tensors. Raises RestoreError, with the first missing and unexpected names, unless every tensor fills one target.
    """
    require_choice(order, "attention_order", ("legacy", "new"))
    names = [(f"{a}.{kind}", f"{b}.{kind}") for a, b in map_modules(config).items() for kind in ("weight", "bias")]
    table = {source: target for source, target in names if target.replace(".qkv.", ".to_q.") in targets}
    if config["num_class_embeds"] is not None:
        table["label_emb.weight"] = "class_embedding.weight"
    missing = [name for name in table if name not in state]
    unexpected = [name for name in state if name not in table]
    if missing or unexpected:
        raise RestoreError(
            f"the checkpoint must hold the weights of a guided-diffusion U-Net, got {len(missing)} missing, first "
            f"{missing[:1]}, and {len(unexpected)} unexpected, first {unexpected[:1]}"
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
            parts = tensor.chunk(3)
            if order == "legacy":
                per_head = tensor.reshape(heads[len(parts[0])], 3, -1, *tensor.shape[1:])
                parts = [per_head[:, i].reshape(parts[0].shape) for i in range(3)]
            names = [f"{stem[:-3]}{letter}.{kind}" for letter in ("to_q", "to_k", "to_v")]
        for name, part in zip(names, parts, strict=True):
            if part.shape != targets[name].shape:
                raise RestoreError(f"'{source}' must be {tuple(targets[name].shape)}, got {tuple(part.shape)}")
            result[name] = part.contiguous()
    return result
