"""Self-attention guidance (SAG, Hong et al. 2023): the weak pass sees what the network attends to, blurred.

x̄ = alpha (M · blur(x0_hat) + (1 − M) · x0_hat) + sigma eps,      eps_weak = eps(x̄, t)          (Alg. 1)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F

from operators import RestoreError
from operators.ranges import NonNegative, Positive, Range
from restore.backbones.base import AttentionLayer, Backbone, Prediction
from restore.guidance.attention import observe_attention
from restore.guidance.base import Term, WeakPass, require_prior
from restore.guidance.layers import choose_layers, require_ran
from restore.guidance.targets import AttentionRecord, index_tokens


@dataclass(frozen=True)
class SAG(Term):
    """Self-attention guidance. See Term for scale, interval and schedule.

    x0_hat and eps are those of the strong pass; x0_hat is clamped if the prior's images are bounded.

    layers: the one self-attention layer that is observed in the strong pass; "i5:0,3" for the mean of two heads.
    threshold: M = 1 where a key token gets more attention than this, in units of a uniform map's.
    sigma, taps: standard deviation and size of the Gaussian blur, in cells of x; None: 9 and 31 in pixels (the
        code of PAG's comparison), 1 and 9 in latents (diffusers).
    """

    layers: str = "m1"
    threshold: NonNegative = 1.0
    sigma: Positive | None = None
    taps: Annotated[int, Range(1, odd=True)] | None = None

    def bind(self, backbone: Backbone) -> WeakPass:
        """Raises RestoreError for an unknown layer, several layers, and inside a diffusers pipeline."""
        from kornia.filters import gaussian_blur2d  # half a second, which only this guidance takes

        require_prior(backbone, "sag")
        layers = choose_layers(self.layers, None, backbone.attention)
        if len(layers) != 1:
            raise RestoreError(f"layers of sag must be one attention layer, got {len(layers)} ({self.layers})")
        ((layer, heads),) = layers
        pixels = backbone.downscale == 1
        blur_sigma = (9.0 if pixels else 1.0) if self.sigma is None else self.sigma
        taps = (31 if pixels else 9) if self.taps is None else self.taps
        received: list[torch.Tensor] = []  # by the key tokens in each call of the network, (B, 1, h, w)

        def record(layer: AttentionLayer, a: AttentionRecord) -> None:
            if a.grid is None:
                raise RestoreError(f"sag needs the grid of image tokens, which is unknown in {layer.path}")
            place = index_tokens(heads, a.image)
            with torch.autocast(a.q.device.type, enabled=False):
                maps = replace(a, q=a.q[place], k=a.k[place]).map()
                received.append(maps.mean(1).sum(1).unflatten(-1, a.grid).unsqueeze(1))

        def observe():
            received.clear()
            return observe_attention([layer], record, backbone.network)

        def eps(x_t: torch.Tensor, t: float, condition: Any, strong: Prediction) -> torch.Tensor:
            require_ran([layer.path], [layer.path] * bool(received))
            assemble = getattr(backbone, "blend_maps", lambda maps, x: F.interpolate(maps[0], x.shape[-2:]))
            mask = (assemble(received, x_t) > self.threshold).to(x_t.dtype)
            received.clear()
            x0 = strong.x0.detach().clamp(-1, 1) if backbone.bounded else strong.x0.detach()
            size = tuple(min(taps, 2 * side - 1) for side in x0.shape[-2:])
            blurred = gaussian_blur2d(x0, size, (blur_sigma, blur_sigma), "reflect")
            # The PSLD code gives the network a time beyond the table.
            alpha, sigma = backbone.schedule.levels(min(t, backbone.schedule.ts[-1]), x_t)
            degraded = alpha * (mask * blurred + (1 - mask) * x0) + sigma * strong.eps.detach()
            return backbone.predict(degraded, t, condition).eps

        return WeakPass(eps, observe=observe)
