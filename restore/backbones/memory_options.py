"""Options that save memory, applied to a backbone after it is loaded."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from operators import RestoreError
from restore.backbones.base import Backbone
from restore.backbones.diffusers_parts import Attention, Downsample2D, ResnetBlock2D, UNet2DModel, Upsample2D
from restore.backbones.forwards import find_own_forward, set_own_forward

UNITS = (ResnetBlock2D, Attention, Downsample2D, Upsample2D)


def enable_block_checkpointing(backbone: Backbone) -> None:
    """Keep only the inputs of the blocks of network and autoencoder for the backward pass and recompute the rest there:
    about half the memory for a third more time."""
    if isinstance(backbone.network, UNet2DModel):
        checkpoint_units(backbone.network)
    else:
        backbone.network.enable_gradient_checkpointing()
    if hasattr(backbone, "vae"):
        # diffusers recomputes a whole level of the autoencoder at once; per unit the peak is a sixth lower.
        checkpoint_units(backbone.vae)


def enable_vae_slicing(backbone: Backbone) -> None:
    """Decode one image of a batch at a time. Raises RestoreError if the autoencoder cannot."""
    _find_vae(backbone, "vae_slicing").enable_slicing()


def enable_vae_tiling(backbone: Backbone) -> None:
    """Decode large images in tiles. Raises RestoreError if the autoencoder cannot."""
    vae = _find_vae(backbone, "vae_tiling")
    if type(vae).__name__ == "AutoencoderTiny":
        raise RestoreError("vae_tiling must be False for a tiny autoencoder, which diffusers' tiling breaks")
    vae.enable_tiling()


def _find_vae(backbone: Backbone, option: str) -> nn.Module:
    vae = getattr(backbone, "vae", None)
    if vae is None:
        raise RestoreError(f"{option} must be False for a model of pixels: it has no autoencoder to slice or tile")
    if type(vae).__name__ == "VQModel":
        raise RestoreError(f"{option} must be False for a VQModel: diffusers decodes it in one piece")
    return vae


def checkpoint_units(network: nn.Module, on: bool = True) -> None:
    """Switch gradient checkpointing of every residual block, attention layer and resampler on or off.

    diffusers' own `enable_gradient_checkpointing` leaves out the residual down- and upsamplers and the attention of
    UNet2DModel, which hold a good part of the activations (on the FFHQ network its peak is 0.64 of the plain one,
    guided-diffusion's 0.45). A unit inside another is not checkpointed twice.
    """
    inside: set[nn.Module] = set()
    for module in network.modules():
        if module in inside or not isinstance(module, UNITS):
            continue
        inside.update(child for child in module.modules() if child is not module)
        own, plain = find_own_forward(module), type(module).forward.__get__(module)
        if on and not _is_wrapped(own):
            set_own_forward(module, partial(_checkpointed_forward, plain if own is None else own))
        elif not on and _is_wrapped(own):
            set_own_forward(module, None if own.args[0] == plain else own.args[0])


def _is_wrapped(forward: Any) -> bool:
    return isinstance(forward, partial) and forward.func is _checkpointed_forward


def _checkpointed_forward(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # In eval mode there is no dropout, so no random state to preserve.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def is_checkpointed(network: nn.Module) -> bool:
    """Return whether blocks of a network are computed again in the backward pass."""
    if getattr(network, "is_gradient_checkpointing", False):
        return True
    return any(_is_wrapped(find_own_forward(module)) for module in network.modules() if isinstance(module, UNITS))


def free_memory(device: torch.device) -> None:
    """Give back what nothing uses any more: networks are parts of cycles, and CUDA's allocator keeps what it had."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
