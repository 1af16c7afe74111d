"""Guidance inside an unmodified diffusers pipeline.

A pipeline calls its U-Net once a step and does the rest itself: prompts, ControlNet residuals, masks,
classifier-free guidance. So it is enough that this one call returns the guided prediction.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from operators import RestoreError
from operators.naming import nearest
from restore.backbones.base import Prediction
from restore.backbones.replaced import replaced
from restore.backbones.schedule import Schedule
from restore.guidance.base import Estimate, Guidance
from restore.guidance.branches import NullCondition

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
    Gradients of the output, where enabled, are those of the unperturbed prediction. Threads that call the
    pipeline within the block are guided independently of each other.
    Raises RestoreError for a pipeline without a U-Net, unknown layers, CFG terms (use the pipeline's
    guidance_scale), combinations that need noise levels, and batches whose layout "auto" does not recognise.
    """
    if conditional not in PARTS:
        raise RestoreError(f"conditional={conditional!r} is not known; {nearest(conditional, PARTS)}")
    unet = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "unet", None)
    if unet is None or not hasattr(unet, "down_blocks"):
        raise RestoreError(f"{type(pipe).__name__} has no U-Net to guide; expected a diffusers pipeline with a `unet`")
    if any(isinstance(term.branch, NullCondition) for term in (guidance.terms if guidance is not None else ())):
        raise RestoreError(
            "inside a pipeline classifier-free guidance is the pipeline's: pass it guidance_scale = w + 1"
        )
    if guidance is not None and hasattr(guidance.combine, "bind"):
        raise RestoreError(
            f"the combination {guidance.combine} needs noise levels and a clean estimate, which a U-Net inside a "
            "pipeline does not tell; use sum or rescale"
        )
    adapter = PipelineUnet(unet, pipe)
    Estimate(adapter, guidance)  # what is wrong with it is said here, not within the pipeline's call
    own = threading.local()

    def guide(unet, inner):
        def forward(*args, **kwargs):
            if not hasattr(own, "estimate"):
                own.estimate = Estimate(adapter, guidance)
            estimate, x = own.estimate, args[0] if args else kwargs["sample"]
            call = UnetCall(args, kwargs, conditional_rows(pipe, x, conditional), estimate.tapes)
            before = estimate.evaluations
            # The U-Net is itself again, so that its passes are not guided in turn.
            with replaced([unet], lambda *_: inner):
                strong, eps = estimate(x[call.rows], timestep_of(args, kwargs), call)
            output = call.output
            if estimate.evaluations == before + 1:
                return output
            # The same shift in both halves, so that the pipeline's u + g (c - u) is shifted by it once.
            shift = eps - strong.eps.detach()
            guided = _sample(output) + torch.cat([shift] * (len(x) // len(shift)))
            return (guided, *output[1:]) if isinstance(output, tuple) else type(output)(sample=guided)

        return forward

    with replaced([unet], guide, everywhere=True):
        yield pipe


@dataclass
class UnetCall:
    """One call of the U-Net by the pipeline: its arguments, the rows with the prompt, what the strong pass gave."""

    args: tuple
    kwargs: dict
    rows: slice
    tapes: list
    output: Any = None


class PipelineUnet:
    """The U-Net of a pipeline with the part of the Backbone protocol that guidance needs; `condition` is a UnetCall.

    x_t and predictions are those of the rows with the prompt; the strong pass computes the whole batch.
    """

    null_condition = None

    def __init__(self, unet: nn.Module, pipe: Any = None) -> None:
        self.network, self.pipe = unet, pipe
        self.attention = attention_layers(unet)

    @property
    def schedule(self) -> Schedule | None:
        """The pipeline's noise levels; None for a U-Net alone."""
        scheduler = getattr(self.pipe, "scheduler", None)
        return None if scheduler is None else Schedule.from_config(scheduler.config)

    def predict(self, x_t: torch.Tensor, t: float, condition: UnetCall) -> Prediction:
        """The first prediction of a call is the strong one; later ones are weak and made on its rows alone."""
        call = condition
        x = call.args[0] if call.args else call.kwargs["sample"]

        def part(value):
            batched = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == len(x)
            return value[call.rows] if batched else value

        if call.output is None:
            call.output = self.network(*call.args, **call.kwargs)
            if len(x) > len(x_t):
                for tape in (tape for tape in call.tapes if tape is not None):
                    tape.map(part)
            return Prediction(_sample(call.output)[call.rows])
        args, kwargs = tree_map(part, call.args), tree_map(part, call.kwargs)
        if args:
            args = (x_t, *args[1:])
        else:
            kwargs["sample"] = x_t
        return Prediction(_sample(self.network(*args, **kwargs)))


def attention_layers(unet: nn.Module) -> dict:
    """Self-attention layers of a diffusers U-Net under the names of its backbone."""
    from diffusers import UNet2DModel

    if isinstance(getattr(unet, "_orig_mod", unet), UNet2DModel):
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
