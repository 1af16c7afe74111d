"""Time-step guidance (TSG, Sadat et al. 2025): the weak pass is told a wrong time."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps

from operators import RestoreError
from restore.backbones.base import Backbone, Prediction
from restore.backbones.forwards import replace_forward
from restore.guidance.base import Guidance, Term
from restore.guidance.targets import seeded_draw

# What diffusers' networks call the embedding of t; those of guidance scales and sizes are of the same class.
EMBEDDINGS, PROJECTIONS = ("time_embedding", "timestep_embedder"), ("time_proj",)


@dataclass(frozen=True)
class PerturbedTime:
    """The weak pass sees the embedding of t plus noise: e + s u^alpha std(e) n, n ~ N(0, I) (TSG, Sec. 5 and Fig. 12).

    u = t / T, T the noisiest time; std over the embedding's channels. What the network predicts at that time is still
    turned into eps with the noise levels of t.

    s: 1 to 3 in the paper (Table 11). alpha: 0 for noise of the same size at every t.
    shift: the time itself is wrong by this much, in the units of t (the paper's Fig. 10); with s = 0 the shift alone.
    noise: a seed: n depends on it and t alone, and is shared by the images of a batch.
    """

    s: float = 2.0
    alpha: float = 1.0
    shift: float = 0.0
    noise: int = 0

    def __post_init__(self):
        if self.s < 0 or not (self.s or self.shift):
            raise RestoreError(f"tsg needs s > 0 or a shift, not s={self.s} and shift={self.shift}")

    def bind(self, backbone: Backbone) -> PerturbedTimePass:
        """Raises RestoreError where the network has no embedding of t that is known, or T is not known."""
        named = [(name.rpartition(".")[2], module) for name, module in backbone.network.named_modules()]
        embeddings = [m for name, m in named if name in EMBEDDINGS and isinstance(m, TimestepEmbedding)]
        projections = [m for name, m in named if name in PROJECTIONS and isinstance(m, Timesteps)]
        # FLUX-dev projects its guidance scale in the same module: there the time is shifted one module further out.
        both = {m.time_proj: m for _, m in named if hasattr(m, "guidance_embedder") and hasattr(m, "time_proj")}
        projections = [both.get(m, m) for m in projections]
        if (self.s and not embeddings) or (self.shift and not projections):
            raise RestoreError(f"tsg finds no embedding of the time in a {type(backbone.network).__name__}")
        if backbone.schedule is None and (self.alpha or self.shift):
            raise RestoreError("tsg needs noise levels, which are not known here, unless alpha=0 and shift=0")
        return PerturbedTimePass(backbone, self, embeddings * bool(self.s), projections * bool(self.shift))


def TSG(
    scale: float,
    s: float = 2.0,
    alpha: float = 1.0,
    shift: float = 0.0,
    noise: int = 0,
    interval: tuple[float, float] | None = None,
    schedule: Any = "constant",
) -> Guidance:
    """Time-step guidance: see PerturbedTime for how, Term for scale, interval and schedule."""
    return Guidance((Term(PerturbedTime(s, alpha, shift, noise), scale, interval, schedule),))


class PerturbedTimePass:
    """TSG's weak pass."""

    def __init__(self, backbone: Backbone, options: PerturbedTime, embeddings: list, projections: list):
        self.backbone, self.options = backbone, options
        self.embeddings, self.projections, self.modules = embeddings, projections, embeddings + projections

    def eps(self, x_t: torch.Tensor, t: float, condition: Any, strong: Prediction) -> torch.Tensor:
        o, schedule = self.options, self.backbone.schedule
        size = o.s * (float(t) / float(schedule.ts[-1])) ** o.alpha if o.alpha else o.s

        def disturb(module, forward):
            def run(*args, **kwargs):
                e = forward(*args, **kwargs)
                n = seeded_draw(o.noise, t)("normal", (1, e.shape[-1])).to(e)
                return e + size * e.std(-1, keepdim=True) * n

            return run

        def shift(module, forward):
            low, high = float(schedule.ts[0]), float(schedule.ts[-1])
            return lambda times, *others: forward((times + o.shift).clamp(low, high), *others)

        with ExitStack() as stack:
            stack.enter_context(replace_forward(self.embeddings, disturb))
            stack.enter_context(replace_forward(self.projections, shift))
            return self.backbone.predict(x_t, t, condition).eps
