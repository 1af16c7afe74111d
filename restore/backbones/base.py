"""The contract between samplers and networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from operators import RestoreError
from restore.backbones.schedule import Schedule

# (eps, x0) from the output of a network at x_t = alpha x_0 + sigma n. v = alpha eps − sigma x0 (Salimans & Ho 2022);
# velocity = eps − x0 (flow matching, Lipman et al. 2023, with time running to the noise).
CONVERSIONS = {
    "eps": lambda out, x, a, s: (out, (x - s * out) / a),
    "x0": lambda out, x, a, s: ((x - a * out) / s, out),
    "v": lambda out, x, a, s: ((a * out + s * x) / (a * a + s * s), (a * x - s * out) / (a * a + s * s)),
    "velocity": lambda out, x, a, s: ((x + a * out) / (a + s), (x - s * out) / (a + s)),
}
# Their names in diffusers, as in a scheduler_config.json.
PREDICTION_TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "velocity"}


@dataclass(frozen=True)
class Prediction:
    """The output of one network evaluation at x_t = alpha x_0 + sigma n.

    eps: predicted noise, (B, C, H, W). x0: the clean estimate (x_t − sigma eps) / alpha, not clamped.
    variance: the raw learned-range channel v of the same shape, in about [-1, 1], interpolating the
        two log-variances of Nichol & Dhariwal 2021, eq. 15; None if the variance is not learned.
    """

    eps: torch.Tensor
    variance: torch.Tensor | None = None
    x0: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        kind: str,
        output: torch.Tensor,
        x_t: torch.Tensor,
        alpha: float | torch.Tensor,
        sigma: float | torch.Tensor,
    ) -> Prediction:
        """Convert the output at x_t of a network that predicts `kind`, one of CONVERSIONS.

        With twice the channels of x_t, the second half is the learned variance.
        """
        if kind not in CONVERSIONS:
            raise RestoreError(f"the kind of prediction must be one of {', '.join(CONVERSIONS)}, got '{kind}'")
        output, variance = output.chunk(2, dim=1) if output.shape[1] == 2 * x_t.shape[1] else (output, None)
        eps, x0 = CONVERSIONS[kind](output, x_t, alpha, sigma)
        return cls(eps, variance, x0)


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention module of a backbone.

    path: name in the diffusers network (`down_blocks.4.attentions.0`).
    paper: the paper's name (`input_blocks.9.1`, `middle_block.1`); "" if the paper has none.
    short: abbreviation (`i9`, `m1`, `o2`): the block's letter and its input/output block number.
    downsampling: factor between the sides of x and those of the layer's input.
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
    """A frozen denoising network with its noise levels; images are (B, 3, H, W) in [-1, 1].

    network: the diffusers module, in eval mode, parameters without gradients.
    schedule: the noise levels it was trained on.
    attention: self-attention layers by diffusers path, in order of execution.
    channels, resolution, multiple: channels of x, the side it was trained at, and the number its
        sides must be divisible by (all in the units of x: pixels, or latent cells of `downscale` pixels).
    bounded: x_0 lies in [-1, 1], so that estimates of it may be clamped.
    null_condition: the condition for "no condition" (CFG's weak pass), or None.
    """

    network: nn.Module
    schedule: Schedule
    attention: Mapping[str, AttentionLayer]
    channels: int
    resolution: int
    multiple: int
    downscale: int
    bounded: bool
    null_condition: Any

    def predict(self, x_t: torch.Tensor, t: float, condition: Any = None) -> Prediction:
        """Return the prediction at x_t (B, C, h, w); t is a time of the schedule, also between its table's."""

    def encode(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return x_0 of `image`: the posterior mean, or mean + std · noise with noise; in pixels the image itself."""

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Return the image of x_0; in pixels x_0 itself."""


class Pixels:
    """Base of backbones whose x is the image itself."""

    downscale, bounded = 1, True

    def encode(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        return image

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z


# Divisors of alpha and sigma that give each kind of schedule.
NORMS = {"vp": lambda a, s: (a**2 + s**2) ** 0.5, "ve": lambda a, s: a, "flow": lambda a, s: a + s}


class Renormalised:
    """A backbone with x rescaled to another kind of schedule ("vp", "ve", "flow"), the same eps, x0 and times.

    So samplers written with alpha_bar run on EDM and flow-matching priors too, and those written for flow matching on
    all others.
    """

    def __init__(self, inner: Backbone, kind: str) -> None:
        self.inner = inner
        self.schedule = inner.schedule.normalise(kind)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def predict(self, x_t: torch.Tensor, t: float, condition: Any = None) -> Prediction:
        t = self.inner.schedule.come_back(t)
        scale = NORMS[self.schedule.kind](self.inner.schedule.alpha(t), self.inner.schedule.sigma(t))
        return self.inner.predict(x_t * scale, t, condition)


def normalise(prior: Backbone, kind: str) -> Backbone:
    """Return `prior` with noise levels normalised as "vp", "ve" or "flow": itself, or its change of variables."""
    return prior if prior.schedule.kind == kind else Renormalised(prior, kind)


def count_image_channels(backbone: Backbone) -> int:
    """Return the channels of the images that a backbone knows: of its x or, on latents, of what is decoded."""
    vae = getattr(backbone, "vae", None)
    if vae is not None:
        return getattr(vae.config, "out_channels", 3)
    return backbone.channels if backbone.downscale == 1 else 3


def require_shape(x_t: torch.Tensor, channels: int, multiple: int) -> None:
    """Raise RestoreError unless x_t is (B, channels, h, w) with sides divisible by `multiple`."""
    if x_t.ndim != 4 or x_t.shape[1] != channels or any(side % multiple for side in x_t.shape[2:]):
        raise RestoreError(f"x_t must be (B, {channels}, H, W), sides divisible by {multiple}, got {tuple(x_t.shape)}")


def expand_times(t: float | torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """Return the times of a batch, (B,): floats, because diffusers would truncate a number to an integer."""
    if isinstance(t, torch.Tensor):
        return t.to(x_t.device, torch.float32).reshape(-1).expand(len(x_t))
    return x_t.new_full((1,), float(t), dtype=torch.float32).expand(len(x_t))
