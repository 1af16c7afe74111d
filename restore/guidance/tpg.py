"""Token perturbation guidance (TPG, Rajabi et al. 2025): the weak pass has its image tokens in disorder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from operators import RestoreError
from restore.backbones.base import AttentionLayer, Backbone, Prediction
from restore.backbones.forwards import replace_forward
from restore.guidance.base import Guidance, Term
from restore.guidance.layers import choose, require_ran
from restore.guidance.options import frozen
from restore.guidance.targets import seeded_draw


@dataclass(frozen=True)
class ShuffledTokens:
    """In the weak pass the image tokens enter the blocks of the chosen attention layers in random order (TPG).

    A permutation keeps every token's norm and their mean. The block is the transformer block of the layer, or, in
    U-Nets of pixels that have none, the attention layer with its skip connection; what lies around it stays.

    layers: as restore.guidance.layers.choose takes them, without heads.
    noise: a seed: the permutation depends on it, t and the layer alone, and is shared by the images of a batch.
    """

    layers: str | Sequence[str]
    noise: int = 0

    def __post_init__(self):
        object.__setattr__(self, "layers", frozen(self.layers))

    def bind(self, backbone: Backbone) -> ShuffledPass:
        """Raises RestoreError for an unknown layer, and for heads."""
        chosen = choose(self.layers, None, backbone.attention)
        if any(heads is not None for _, heads in chosen):
            raise RestoreError(f"tpg reorders the tokens of whole layers: name no heads, as {self.layers!r} does")
        return ShuffledPass(backbone, [layer for layer, _ in chosen], self.noise)


def TPG(
    scale: float,
    layers: str | Sequence[str],
    noise: int = 0,
    interval: tuple[float, float] | None = None,
    schedule: Any = "constant",
) -> Guidance:
    """Token perturbation guidance: see ShuffledTokens for how, Term for scale, interval and schedule."""
    return Guidance((Term(ShuffledTokens(layers, noise), scale, interval, schedule),))


class ShuffledPass:
    """TPG's weak pass."""

    def __init__(self, backbone: Backbone, layers: Sequence[AttentionLayer], seed: int):
        self.backbone, self.seed = backbone, seed
        self.blocks = {block_of(backbone.network, layer): layer.path for layer in layers}
        self.modules = list(self.blocks)

    def eps(self, x_t: torch.Tensor, t: float, condition: Any, strong: Prediction) -> torch.Tensor:
        with self._shuffling(t) as ran:
            eps = self.backbone.predict(x_t, t, condition).eps
        require_ran(self.blocks.values(), ran)
        return eps

    @contextmanager
    def _shuffling(self, t: float):
        draw, ran = seeded_draw(self.seed, t), set()
        orders: dict[tuple, torch.Tensor] = {}  # one for all calls of the network, whatever they are divided into

        def make(module, forward):
            def run(*args, **kwargs):
                tokens = args[0] if args else kwargs["hidden_states"]
                count = tokens.shape[-2] if tokens.ndim == 3 else tokens.shape[-2] * tokens.shape[-1]
                if (module, count) not in orders:
                    orders[module, count] = draw("uniform", (1, count))[0].argsort().to(tokens.device)
                order = orders[module, count]
                ran.add(self.blocks[module])
                if tokens.ndim == 3:
                    tokens = tokens[:, order]
                else:
                    tokens = tokens.flatten(2)[..., order].view(tokens.shape)
                return forward(tokens, *args[1:], **kwargs) if args else forward(**kwargs | {"hidden_states": tokens})

            return run

        with replace_forward(self.modules, make):
            yield ran


def block_of(network: nn.Module, layer: AttentionLayer) -> nn.Module:
    """The transformer block that owns the layer; the layer itself where it is one of a list."""
    owner, _, name = layer.path.rpartition(".")
    return layer.module if name.isdecimal() else network.get_submodule(owner)
