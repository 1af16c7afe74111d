"""Gradient checkpointing of a U-Net per residual block and attention layer."""

from __future__ import annotations

from functools import partial

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.utils.checkpoint import checkpoint

UNITS = (ResnetBlock2D, Attention, Downsample2D, Upsample2D)


def set_checkpointing(network: nn.Module, on: bool) -> None:
    """Switch checkpointing of every unit of `network` on or off.

    diffusers' own `enable_gradient_checkpointing` leaves out the residual down- and upsamplers and the
    attention of UNet2DModel, which hold a good part of the activations (measured on the FFHQ network: 0.64
    of the plain peak against guided-diffusion's 0.45). Units inside a unit are not wrapped twice.
    """
    inside: set[nn.Module] = set()
    for module in network.modules():
        if module in inside or not isinstance(module, UNITS):
            continue
        inside.update(child for child in module.modules() if child is not module)
        forward = module.__dict__.get("forward")
        wrapped = isinstance(forward, partial) and forward.func is _checkpointed
        if on and not wrapped:
            module.forward = partial(_checkpointed, module.forward)
        elif not on and wrapped:
            del module.forward


def _checkpointed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # eval mode: no dropout, so no random state to keep
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
