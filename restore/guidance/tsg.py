"""Time-step guidance (TSG, Sadat et al. 2025): the weak pass is given a perturbed time.

e  ->  e + s u^alpha std(e) n,      n ~ N(0, I), u = t / T                               (Sec. 5 and Fig. 12)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from operators import RestoreError
from operators.ranges import NonNegative, Seed
from restore.backbones.base import Backbone, Prediction
from restore.backbones.diffusers_parts import TimestepEmbedding, Timesteps
from restore.backbones.forwards import replace_forward
from restore.backbones.transfer import send
from restore.guidance.base import Term, WeakPass
from restore.guidance.targets import SeededDraw

# diffusers' names for the embedding of t; embeddings of guidance scales and sizes have the same class.
EMBEDDINGS, PROJECTIONS = ("time_embedding", "timestep_embedder"), ("time_proj",)


@dataclass(frozen=True)
class TSG(Term):
    """Time-step guidance. See Term for scale, interval and schedule.

    e is the embedding of t, std(e) taken over its channels, T the noisiest time. What the network predicts at the
    perturbed time is still turned into eps with the noise levels of t.

    s: 1 to 3 in the paper (Table 11). alpha: 0 for noise of the same size at every t.
    shift: added to the time itself, in the units of t (the paper's Fig. 10); with s = 0 only the shift acts.
    noise: a seed: n depends only on it and t, and is shared by the images of a batch.
    """

    s: NonNegative = 2.0
    alpha: NonNegative = 1.0
    shift: float = 0.0
    noise: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        if not (self.s or self.shift):
            raise RestoreError(f"tsg needs s > 0 or a shift, got s={self.s} and shift={self.shift}")

    def bind(self, backbone: Backbone) -> WeakPass:
        """Raises RestoreError if the network has no known embedding of t, or if T is unknown."""
        schedule = backbone.schedule
        modules = [(name.rpartition(".")[2], module) for name, module in backbone.network.named_modules()]
        embeddings = [m for name, m in modules if name in EMBEDDINGS and isinstance(m, TimestepEmbedding)]
        projections = [m for name, m in modules if name in PROJECTIONS and isinstance(m, Timesteps)]
        # FLUX-dev projects its guidance scale with the same module: there the time is shifted one module further out.
        outer = {m.time_proj: m for _, m in modules if hasattr(m, "guidance_embedder") and hasattr(m, "time_proj")}
        projections = [outer.get(m, m) for m in projections]
        if (self.s and not embeddings) or (self.shift and not projections):
            raise RestoreError(f"tsg finds no embedding of the time in a {type(backbone.network).__name__}")
        if schedule is None and (self.alpha or self.shift):
            raise RestoreError("tsg needs alpha=0 and shift=0 where noise levels are unknown")
        embeddings, projections = embeddings * bool(self.s), projections * bool(self.shift)

        def eps(x_t: torch.Tensor, t: float, condition: Any, strong: Prediction) -> torch.Tensor:
            size = self.s * (float(t) / float(schedule.ts[-1])) ** self.alpha if self.alpha else self.s

            def perturb(module, forward):
                def run(*args, **kwargs):
                    e = forward(*args, **kwargs)
                    n = send(SeededDraw(self.noise, t)("normal", (1, e.shape[-1])), e.device, e.dtype)
                    return e + size * e.std(-1, keepdim=True) * n

                return run

            def shift(module, forward):
                unit = getattr(
                    module, "scale", 1
                )  # of the times that the module multiplies: QwenImage's run from 0 to 1
                low, high = float(schedule.ts[0]) / unit, float(schedule.ts[-1]) / unit
                return lambda times, *others: forward((times + self.shift / unit).clamp(low, high), *others)

            with replace_forward(embeddings, perturb), replace_forward(projections, shift):
                return backbone.predict(x_t, t, condition).eps

        return WeakPass(eps, embeddings + projections)
