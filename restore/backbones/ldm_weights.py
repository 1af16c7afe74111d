"""CompVis latent-diffusion checkpoints (Rombach et al. 2022) as diffusers' networks: their tensors renamed.

Such a file holds `model.diffusion_model.` (a guided-diffusion U-Net, see adm_weights), perhaps its average in
`model_ema.` with the dots left out, `first_stage_model.` (the autoencoder) and the noise schedule's buffers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DModel, VQModel
from torch import nn

from operators import RestoreError
from restore.backbones.adm_weights import convert_state
from restore.backbones.weights import build_without_weights, load_state, read_weights, unwrap_state

UNET, FIRST, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema.diffusion_model"
# Of the published models without conditioning, for files without `betas`.
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
# Patterns and their replacements, of which only the first that matches a name is applied.
RULES = [
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
]
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def read_checkpoint(
    path: Path,
    *,
    heads: int | None = None,
    head_channels: int | None = None,
    order: str = "legacy",
    scale_factor: float | None = None,
    ema: bool = True,
    key: str | None = None,
) -> tuple[UNet2DModel, nn.Module, dict]:
    """Read U-Net, autoencoder and keywords of LatentDiffusion from a file. key: see weights.unwrap_state.

    Raises RestoreError.
    """
    state = unwrap_state(read_weights(path), UNET + "input_blocks.0.0.weight", path, key) or {}
    first = {name[len(FIRST) :]: tensor for name, tensor in state.items() if name.startswith(FIRST)}
    unet = {name[len(UNET) :]: tensor for name, tensor in state.items() if name.startswith(UNET)}
    if not unet or not first:
        raise RestoreError(f"{path} must be a latent-diffusion checkpoint, with weights under '{UNET}' and '{FIRST}'")
    if any(name.startswith("cond_stage_model.") for name in state):
        raise RestoreError(f"{path} must be a model without conditioning, got a conditional model")
    averaged = {name: EMA + name.replace(".", "") for name in unet}
    present = [name for name in averaged.values() if name in state]
    if ema and present:
        if len(present) < len(averaged):
            lacking = next(name for name in averaged.values() if name not in state)
            raise RestoreError(f"{path} must hold all averaged weights, but has no '{lacking}'; try ema=False")
        unet = {name: state[source] for name, source in averaged.items()}
    if heads is None and head_channels is None:
        head_channels = 32  # of the published models
    network = convert_state(unet, path, heads, head_channels, order)
    stored = float(state["scale_factor"]) if "scale_factor" in state else 1.0
    scale = stored if scale_factor is None else float(scale_factor)
    betas = {"trained_betas": state["betas"].tolist()} if "betas" in state else {}
    return network, convert_autoencoder(first, path, scale), {"schedule": {**SCHEDULE, **betas}}


def convert_autoencoder(state: Mapping[str, torch.Tensor], path: Path, scaling_factor: float) -> nn.Module:
    """Build the VQModel or AutoencoderKL of a first stage's tensors, leaving out its training loss (`loss.`).

    Raises RestoreError unless the tensors are exactly the autoencoder's.
    """
    state = {name: tensor for name, tensor in state.items() if not name.startswith("loss.")}
    cls, config = infer_autoencoder(state, path)
    with build_without_weights():
        vae = cls(**config, scaling_factor=scaling_factor)
    targets, result = vae.state_dict(), {}
    for source, tensor in state.items():
        name = rename_tensor(source, len(config["block_out_channels"]))
        if name in targets and tensor.ndim == 4 and targets[name].ndim == 2:
            tensor = tensor[:, :, 0, 0]  # 1x1 convolutions there, linear layers here
        if name in result:
            raise RestoreError(f"{path} must hold every weight once, but '{FIRST}{source}' is {name} again")
        result[name] = tensor.float().contiguous()
    load_state(vae, result, f"the weights of the autoencoder in {path}")
    return vae.eval()


def infer_autoencoder(state: Mapping[str, torch.Tensor], path: Path) -> tuple[type, dict]:
    """Return class and constructor arguments of the autoencoder with these tensors. Raises RestoreError."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise RestoreError(f"{path} must hold an autoencoder of latent-diffusion, but has no '{FIRST}{name}'")
        return tuple(state[name].shape)

    def count(pattern: str) -> int:
        return 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)

    levels = count(r"encoder\.down\.(\d+)\.")
    attended = [count(rf"encoder\.down\.{i}\.attn\.(\d+)\.") > 0 for i in range(levels)]
    config = {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "block_out_channels": [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)],
        "layers_per_block": count(r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["AttnDownEncoderBlock2D" if on else "DownEncoderBlock2D" for on in attended],
        "up_block_types": ["AttnUpDecoderBlock2D" if on else "UpDecoderBlock2D" for on in reversed(attended)],
        "latent_channels": shape("decoder.conv_in.weight")[1],
    }
    if "quantize.embedding.weight" not in state:
        return AutoencoderKL, config
    entries, width = shape("quantize.embedding.weight")
    return VQModel, {**config, "num_vq_embeddings": entries, "vq_embed_dim": width}


def rename_tensor(name: str, levels: int) -> str:
    """Return the name in diffusers of a tensor of LDM's autoencoder."""
    for pattern, replacement in RULES:
        name, replaced = re.subn(pattern, replacement, name)
        if replaced:
            break
    # LDM counts the decoder's levels from the finest.
    name = re.sub(r"\.up_blocks\.(\d+)", lambda level: f".up_blocks.{levels - 1 - int(level[1])}", name)
    name = name.replace(".nin_shortcut.", ".conv_shortcut.")
    match = re.match(r"(.*\.attentions\.\d+)\.(\w+)\.(weight|bias)$", name)
    return f"{match[1]}.{ATTENTION.get(match[2], match[2])}.{match[3]}" if match else name
