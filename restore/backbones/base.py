"""What a sampler may ask of a network. Everything else about a backbone is its own business."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn


@dataclass(frozen=True)
class Prediction:
    """The output of one network evaluation.

    eps: predicted noise, (B, C, H, W).
    variance: the raw learned-range channel v of the same shape, in about [-1, 1], interpolating the
        two log-variances of Nichol & Dhariwal 2021, eq. 15; None when the variance is not learned.
    """

    eps: torch.Tensor
    variance: torch.Tensor | None = None


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention module of a backbone.

    path: name in the diffusers network (`down_blocks.4.attentions.0`).
    paper: the paper's name (`input_blocks.9.1`, `middle_block.1`); "" where the paper has none.
    short: abbreviation (`i9`, `m1`, `o2`): the block's letter and its input/output block number.
    downsampling: the layer sees an input of this many times fewer pixels per side.
    """

    path: str
    paper: str
    short: str
    module: nn.Module
    heads: int
    channels: int
    downsampling: int


@runtime_checkable
class Backbone(Protocol):
    """A frozen noise-prediction network with its diffusion schedule.

    network: the diffusers module, in eval mode, parameters without gradients.
    alphas_cumprod: alpha_bar of the training schedule, float64 (T,), on the CPU.
    attention: self-attention layers by diffusers path, in order of execution.
    channels, resolution, multiple: channels of x, the side it was trained at, and the number its
        sides must be divisible by (all in the units of x: pixels, or latent cells).
    null_condition: the condition that means "nothing" to the network (CFG's weak branch), or None.
    """

    network: nn.Module
    alphas_cumprod: torch.Tensor
    attention: Mapping[str, AttentionLayer]
    channels: int
    resolution: int
    multiple: int
    null_condition: Any

    def predict(self, x_t: torch.Tensor, t: int, condition: Any = None) -> Prediction:
        """x_t (B, C, H, W), t an index into alphas_cumprod shared by the batch."""
        ...


@runtime_checkable
class LatentBackbone(Backbone, Protocol):
    """A backbone whose x is a latent; images are (B, 3, H, W) in [-1, 1]."""

    downscale: int

    def encode(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled latent of `image`: the posterior mean, or mean + std * noise when noise is given."""
        ...

    def decode(self, z: torch.Tensor) -> torch.Tensor: ...
