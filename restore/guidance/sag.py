"""Self-attention guidance (SAG, Hong et al. 2023): the weak pass sees what the network attends to, blurred."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from operators import RestoreError
from restore.backbones.base import AttentionLayer, Backbone, Prediction
from restore.guidance.attention import observed
from restore.guidance.base import Guidance, Term, require_prior
from restore.guidance.layers import choose, require_ran
from restore.guidance.targets import AttentionRecord, gaussian_blur


@dataclass(frozen=True)
class SelfAttention:
    """The weak pass sees x̄ = alpha (M · blur(x0_hat) + (1 − M) · x0_hat) + sigma eps (SAG, Alg. 1).

    x0_hat and eps are the strong pass'; x0_hat is clamped where the prior's images are bounded. M = 1 where a key
    token gets more attention from all queries, on the mean of the heads, than `threshold` (an even map gives 1).

    layers: the one self-attention layer that is watched in the strong pass; "i5:0,3" for the mean of two heads.
    sigma, taps: of the Gaussian blur, in cells of x; None: 9 and 31 in pixels (the
        code of PAG's comparison), 1 and 9 in latents (diffusers).
    """

    layers: str = "m1"
    threshold: float = 1.0
    sigma: float | None = None
    taps: int | None = None

    def __post_init__(self):
        if (self.sigma is not None and not self.sigma > 0) or (self.taps is not None and not self.taps % 2 == 1):
            raise RestoreError(f"sag needs a positive sigma and odd taps, not {self.sigma} and {self.taps}")

    def bind(self, backbone: Backbone) -> SelfAttentionPass:
        """Raises RestoreError for an unknown layer, several, and inside a diffusers pipeline."""
        require_prior(backbone, "sag")
        chosen = choose(self.layers, None, backbone.attention)
        if len(chosen) != 1:
            raise RestoreError(f"sag watches one attention layer, not {len(chosen)} ({self.layers})")
        pixels = backbone.downscale == 1
        sigma = (9.0 if pixels else 1.0) if self.sigma is None else self.sigma
        taps = (31 if pixels else 9) if self.taps is None else self.taps
        return SelfAttentionPass(backbone, *chosen[0], self.threshold, sigma, taps)


def SAG(
    scale: float,
    layers: str = "m1",
    threshold: float = 1.0,
    sigma: float | None = None,
    taps: int | None = None,
    interval: tuple[float, float] | None = None,
    schedule: Any = "constant",
) -> Guidance:
    """Self-attention guidance: see SelfAttention for how, Term for scale, interval and schedule."""
    return Guidance((Term(SelfAttention(layers, threshold, sigma, taps), scale, interval, schedule),))


class SelfAttentionPass:
    """SAG's weak pass."""

    modules: tuple = ()

    def __init__(self, backbone, layer: AttentionLayer, heads, threshold: float, sigma: float, taps: int):
        self.backbone, self.layer, self.heads = backbone, layer, heads
        self.threshold, self.sigma, self.taps = threshold, sigma, taps
        self.received: list[torch.Tensor] = []  # by the key tokens of each call of the network, (B, 1, h, w)

    def observing(self):
        self.received.clear()
        return observed([self.layer], self._see, self.backbone.network)

    def _see(self, layer: AttentionLayer, a: AttentionRecord) -> None:
        if a.grid is None:
            raise RestoreError(f"sag needs the grid of image tokens, which is not known in {layer.path}")
        tokens = slice(None) if a.image is None else a.image
        heads = slice(None) if self.heads is None else list(self.heads)
        part = replace(a, q=a.q[:, heads, tokens], k=a.k[:, heads, tokens])
        with torch.autocast(a.q.device.type, enabled=False):
            self.received.append(part.map().mean(1).sum(1).unflatten(-1, a.grid).unsqueeze(1))

    def eps(self, x_t: torch.Tensor, t: float, condition: Any, strong: Prediction) -> torch.Tensor:
        require_ran([self.layer.path], [self.layer.path] * bool(self.received))
        place = getattr(self.backbone, "assembled", lambda maps, x: F.interpolate(maps[0], x.shape[-2:]))
        mask = (place(self.received, x_t) > self.threshold).to(x_t.dtype)
        self.received.clear()
        x0, eps = strong.x0.detach(), strong.eps.detach()
        if self.backbone.bounded:
            x0 = x0.clamp(-1, 1)
        blurred = gaussian_blur(x0, [min(self.taps, 2 * side - 1) for side in x0.shape[-2:]], self.sigma)
        # The PSLD code tells the network a time beyond the table.
        alpha, sigma = self.backbone.schedule.levels(min(t, self.backbone.schedule.ts[-1]), x_t)
        degraded = alpha * (mask * blurred + (1 - mask) * x0) + sigma * eps
        return self.backbone.predict(degraded, t, condition).eps
