"""Token perturbation guidance (TPG, Rajabi et al. 2025): the weak pass sees its image tokens in random order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from operators import RestoreError
from operators.ranges import Seed
from restore.backbones.base import AttentionLayer, Backbone, Prediction
from restore.backbones.forwards import replace_forward
from restore.guidance.base import Term, WeakPass
from restore.guidance.layers import choose_layers, require_ran
from restore.guidance.options import freeze
from restore.guidance.targets import SeededDraw


@dataclass(frozen=True)
class TPG(Term):
    """Token perturbation guidance. See Term for scale, interval and schedule.

    The image tokens enter the blocks of the chosen attention layers in random order, which keeps every token's norm
    and their mean. The block of a layer is its transformer block or, if none, the layer with its skip connection.

    layers: as restore.guidance.layers.choose_layers takes them, without heads.
    noise: a seed: the permutation depends only on it, t and the layer, and is shared by the images of a batch.
    """

    layers: str | Sequence[str]
    noise: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "layers", freeze(self.layers))

    def bind(self, backbone: Backbone) -> WeakPass:
        """Raises RestoreError for an unknown layer, and for heads."""
        layers = choose_layers(self.layers, None, backbone.attention)
        if any(heads is not None for _, heads in layers):
            raise RestoreError(f"layers of tpg must name no heads, got {self.layers!r}; tpg reorders whole layers")
        paths = {block_of(backbone.network, layer): layer.path for layer, _ in layers}

        def eps(x_t: torch.Tensor, t: float, condition: Any, strong: Prediction) -> torch.Tensor:
            draw, ran = SeededDraw(self.noise, t), set()
            orders: dict[tuple, torch.Tensor] = {}  # shared by all calls of the network, however the batch is split

            def shuffle(module, forward):
                def run(*args, **kwargs):
                    tokens = args[0] if args else kwargs["hidden_states"]
                    if paths[module].startswith("single_transformer_blocks") and not _has_text(args, kwargs):
                        raise RestoreError(f"layers of tpg must keep image and text apart, got {paths[module]}")
                    count = tokens.shape[-2] if tokens.ndim == 3 else tokens.shape[-2] * tokens.shape[-1]
                    if (module, count) not in orders:
                        orders[module, count] = draw("uniform", (1, count))[0].argsort().to(tokens.device)
                    order = orders[module, count]
                    ran.add(paths[module])
                    flat = tokens.ndim == 3
                    tokens = tokens[:, order] if flat else tokens.flatten(2)[..., order].view(tokens.shape)
                    if args:
                        return forward(tokens, *args[1:], **kwargs)
                    return forward(**kwargs | {"hidden_states": tokens})

                return run

            with replace_forward(paths, shuffle):
                weak = backbone.predict(x_t, t, condition)
            require_ran(paths.values(), ran)
            return weak.eps

        return WeakPass(eps, list(paths))


def _has_text(args: tuple, kwargs: dict) -> bool:
    text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    return isinstance(text, torch.Tensor) and text.ndim == 3


def block_of(network: nn.Module, layer: AttentionLayer) -> nn.Module:
    """Return the transformer block that owns the layer; the layer itself if it is an item of a list."""
    owner, _, name = layer.path.rpartition(".")
    return layer.module if name.isdecimal() else network.get_submodule(owner)
