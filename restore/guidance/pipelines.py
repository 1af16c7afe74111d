"""Guidance inside an unmodified diffusers pipeline.

A pipeline calls its U-Net once a step and does the rest itself: prompts, ControlNet residuals, masks,
classifier-free guidance. So it is enough that this one call returns the guided prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from operators import RestoreError
from restore.backbones.base import Prediction
from restore.guidance.base import CFG, Guidance, estimator

PARTS = ("auto", "all", "second", "first")


@contextmanager
def guided(pipe: Any, guidance: Guidance | None, *, conditional: str = "auto") -> Iterator[Any]:
    """Within the block `pipe` (a diffusers pipeline, or a U-Net alone) predicts with `guidance`.

        with guided(pipe, PAG(scale=3.0, layers="m1")):
            image = pipe("a cat", guidance_scale=7.5).images[0]

    Where the pipeline does classifier-free guidance, its batch is [without prompt u, with prompt c] and it
    computes u + g (c - u). The weak pass then runs on the half with the prompt alone and s (c - c_weak) is
    added to both halves, which makes the pipeline's own formula

        c + w (c - u) + s (c - c_weak),   w = g - 1                      (PAG, Ahn et al. 2024, eq. 14).

    Combining predictions with weights that add up to 1 is the same for eps, v and x0, so any prediction type
    and scheduler will do.

    conditional: which images of the U-Net's batch have the prompt: "all", the "second" half (diffusers), the
        "first" half (threestudio), or "auto": the second half where the pipeline does classifier-free
        guidance, else all. For a U-Net alone "auto" is "all".
    Gradients of the output, where enabled, are those of the unperturbed prediction.
    Raises RestoreError for a pipeline without a U-Net, unknown layers, CFG terms (use the pipeline's
    guidance_scale) and batches whose layout "auto" does not recognise.
    """
    if conditional not in PARTS:
        raise RestoreError(f"conditional={conditional!r} is not known; expected one of {', '.join(PARTS)}")
    unet = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "unet", None)
    if unet is None or not hasattr(unet, "down_blocks"):
        raise RestoreError(f"{type(pipe).__name__} has no U-Net to guide; expected a diffusers pipeline with a `unet`")
    if any(isinstance(term, CFG) for term in (guidance.terms if guidance is not None else ())):
        raise RestoreError(
            "inside a pipeline classifier-free guidance is the pipeline's: pass it guidance_scale = w + 1"
        )

    adapter = PipelineUnet(unet)
    own, inner = unet.__dict__.get("forward"), unet.forward
    with estimator(adapter, guidance) as estimate:
        adapter.tapes = estimate.tapes

        def forward(*args, **kwargs):
            if adapter.running:
                return inner(*args, **kwargs)
            x = args[0] if args else kwargs["sample"]
            call = Call(args, kwargs, conditional_rows(pipe, x, conditional))
            with adapter.reentered():
                strong, eps = estimate(x, timestep_of(args, kwargs), call)
            if strong.eps.requires_grad:
                eps = strong.eps + (eps - strong.eps).detach()
            return (eps, *call.output[1:]) if isinstance(call.output, tuple) else type(call.output)(sample=eps)

        unet.forward = forward
        try:
            yield pipe
        finally:
            if own is None:
                del unet.forward
            else:
                unet.forward = own


@dataclass
class Call:
    """One call of the U-Net by the pipeline: its arguments, the rows with the prompt, what the strong pass gave."""

    args: tuple
    kwargs: dict
    rows: slice
    output: Any = None


class PipelineUnet:
    """The U-Net of a pipeline with the part of the Backbone protocol that guidance needs; `condition` is a Call."""

    null_condition = None

    def __init__(self, unet: nn.Module) -> None:
        self.network = unet
        self.attention = attention_layers(unet)
        self.tapes: list = []
        self.running = False

    @contextmanager
    def reentered(self) -> Iterator[None]:
        """Within the block the U-Net is itself again, so that its passes are not guided in turn."""
        self.running = True
        try:
            yield
        finally:
            self.running = False

    def predict(self, x_t: torch.Tensor, t: float, condition: Call) -> Prediction:
        """The first prediction of a call is the strong one; later ones are weak and made on its rows alone."""
        call = condition
        if call.output is None:
            call.output = self.network(*call.args, **call.kwargs)
            return Prediction(_sample(call.output))
        strong = _sample(call.output).detach()
        batch, given = len(strong), strong[call.rows]
        if len(given) == batch:
            return Prediction(_sample(self.network(*call.args, **call.kwargs)))

        def part(value):
            batched = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == batch
            return value[call.rows] if batched else value

        for tape in (tape for tape in self.tapes if tape is not None):
            tape.map(part)
        weak = _sample(self.network(*tree_map(part, call.args), **tree_map(part, call.kwargs)))
        # Written so that strong - weak is c - c_weak in both halves.
        return Prediction(strong - torch.cat([given - weak] * (batch // len(given))))


def attention_layers(unet: nn.Module) -> dict:
    """Self-attention layers of a diffusers U-Net under the names of its backbone."""
    from diffusers import UNet2DModel

    if isinstance(unet, UNet2DModel):
        from restore.backbones.adm import attention_layers as layers
    else:
        from restore.backbones.stable_diffusion import attention_layers as layers
    return layers(unet)


def conditional_rows(pipe: Any, x: torch.Tensor, conditional: str) -> slice:
    """The images of the batch x that have the prompt. Raises RestoreError when "auto" cannot tell."""
    half = len(x) // 2
    if conditional == "auto":
        if isinstance(pipe, nn.Module):
            return slice(None)
        # Some pipelines do not say; all of them put the same latents twice into the batch.
        says = getattr(pipe, "do_classifier_free_guidance", None)
        doubled = len(x) % 2 == 0 and torch.equal(x[:half], x[half:])
        if says and not doubled:
            raise RestoreError(
                "the pipeline does classifier-free guidance, but its batch is not [without, with prompt]; name the "
                "part with the prompt: guided(..., conditional='second'), 'first' or 'all'"
            )
        conditional = "second" if doubled and says is not False else "all"
    if conditional == "all":
        return slice(None)
    if len(x) % 2:
        raise RestoreError(f"conditional={conditional!r} needs a batch of two halves, not of {len(x)} images")
    return slice(half, None) if conditional == "second" else slice(0, half)


def timestep_of(args: tuple, kwargs: dict) -> float:
    """The timestep of a U-Net call; the pipeline's may be a number or a tensor, alike for the whole batch."""
    t = args[1] if len(args) > 1 else kwargs["timestep"]
    return float(t.flatten()[0]) if isinstance(t, torch.Tensor) else float(t)


def _sample(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output.sample
