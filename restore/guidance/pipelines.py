"""Guidance inside an unmodified diffusers pipeline.

A pipeline calls its network, a U-Net or a transformer, once a step and does the rest itself: prompts, ControlNet
residuals, masks, classifier-free guidance. So it is enough that this one call returns the guided prediction.
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
from operators.naming import suggest
from restore.backbones.attention_layers import find_attention_layers
from restore.backbones.base import Prediction
from restore.backbones.forwards import replace_forward
from restore.backbones.schedule import Schedule
from restore.guidance.base import Estimate, Guidance, Term, as_guidance
from restore.guidance.cfg import CFG

PARTS = ("auto", "all", "second", "first")
# The rows with the prompt where a pipeline puts the same latents twice into the batch, if not the second half. FLUX's
# never does: it calls its network twice (true_cfg_scale), with the prompt first.
WITH_PROMPT = {"FluxTransformer2DModel": "all", "DiTTransformer2DModel": "first"}


@contextmanager
def guided(pipe: Any, guidance: Term | Guidance | None, *, conditional: str = "auto") -> Iterator[Any]:
    """Within the block `pipe` (a diffusers pipeline, or only its U-Net or transformer) predicts with `guidance`.

        with guided(pipe, PAG(scale=3.0, layers="m1")):
            image = pipe("a cat", guidance_scale=7.5).images[0]

    With classifier-free guidance a pipeline computes u + g (c - u) from the batch [without prompt u, with prompt c].
    The weak pass runs only on the half with the prompt and s (c - c_weak) is added to both halves, which makes it

        c + w (c - u) + s (c - c_weak),   w = g - 1                      (PAG, Ahn et al. 2024, eq. 14).

    conditional: which part of the batch has the prompt: "all", the "second" half (diffusers), the "first" half
        (threestudio, DiT), or "auto": as the pipeline lays out its classifier-free guidance, "all" without it and for
        a network given without its pipeline.
    Gradients of the output, if enabled, are those of the unguided prediction. Threads that call the pipeline within
    the block are guided independently of each other.
    Raises RestoreError for a pipeline without a known network, unknown layers, CFG terms (use the pipeline's
    guidance_scale), combinations that need noise levels, and batches whose layout "auto" does not recognise.
    """
    if conditional not in PARTS:
        raise RestoreError(f"unknown conditional={conditional!r}; {suggest(conditional, PARTS)}")
    network = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if network is None or not any(hasattr(network, name) for name in ("down_blocks", "transformer_blocks")):
        raise RestoreError(f"pipe must be a diffusers pipeline with U-Net or transformer, got {type(pipe).__name__}")
    guidance = as_guidance(guidance)
    if guidance is not None and any(isinstance(term, CFG) for term in guidance.terms):
        raise RestoreError("cfg is done by the pipeline itself; call it with guidance_scale = w + 1")
    if guidance is not None and hasattr(guidance.combine, "bind"):
        raise RestoreError(f"combination must be sum or rescale inside a pipeline, got {guidance.combine}")
    adapter = PipelineNetwork(network, pipe)
    Estimate(adapter, guidance)  # raises errors here rather than within the pipeline's call
    local = threading.local()

    def guide(network, inner):
        def forward(*args, **kwargs):
            if not hasattr(local, "estimate"):
                local.estimate, local.last = Estimate(adapter, guidance), None
            estimate, x, t = local.estimate, find_latent(args, kwargs), find_timestep(network, args, kwargs)
            if local.last is not None and local.last[0] is x and local.last[1] == t and is_flux(network):
                # FLUX's pass without the prompt gets the shift of the one with it, so that their difference does not.
                with replace_forward([network], lambda *_: inner):
                    return _shift(network(*args, **kwargs), local.last[2])
            call = NetworkCall(args, kwargs, conditional_rows(pipe, network, x, conditional), estimate.tapes)
            before, local.last = estimate.evaluations, None
            # Within the network's own passes its forward is the original one, so that they are not guided in turn.
            with replace_forward([network], lambda *_: inner):
                strong, eps = estimate(x[call.rows], t, call)
            if estimate.evaluations == before + 1:
                return call.output
            # The same shift in both halves, so that the pipeline's u + g (c - u) is shifted by it once.
            shift = eps - strong.eps.detach()
            local.last = (x, t, shift)
            return _shift(call.output, torch.cat([shift] * (len(x) // len(shift))))

        return forward

    with replace_forward([network], guide, everywhere=True):
        yield pipe


@dataclass
class NetworkCall:
    """One call of the network by the pipeline: its arguments, the rows with the prompt, the strong pass's output."""

    args: tuple
    kwargs: dict
    rows: slice
    tapes: list
    output: Any = None


class PipelineNetwork:
    """A pipeline's network as the Backbone that guidance needs; `condition` is a NetworkCall.

    x_t and predictions are those of the rows with the prompt; the strong pass computes the whole batch.
    """

    null_condition = None

    def __init__(self, network: nn.Module, pipe: Any = None) -> None:
        self.network, self.pipe = network, pipe
        self.attention = find_attention_layers(getattr(network, "_orig_mod", network))

    @property
    def schedule(self) -> Schedule | None:
        """The pipeline's noise levels; None for a network without its pipeline."""
        scheduler = getattr(self.pipe, "scheduler", None)
        if scheduler is None:
            return None
        return Schedule.from_config({"_class_name": type(scheduler).__name__, **scheduler.config})

    def predict(self, x_t: torch.Tensor, t: float, condition: NetworkCall) -> Prediction:
        """The first prediction of a call is the strong one; later ones are weak and made only on its rows."""
        call = condition
        x = find_latent(call.args, call.kwargs)

        def part(value):
            batched = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == len(x)
            return value[call.rows] if batched else value

        if call.output is None:
            call.output = self.network(*call.args, **call.kwargs)
            if len(x) > len(x_t):
                for tape in call.tapes:
                    tape.map(part)
            return Prediction(_sample(call.output)[call.rows])
        args, kwargs = tree_map(part, call.args), tree_map(part, call.kwargs)
        if args:
            args = (x_t, *args[1:])
        else:
            kwargs["sample" if "sample" in kwargs else "hidden_states"] = x_t
        return Prediction(_sample(self.network(*args, **kwargs)))


def is_flux(network: nn.Module) -> bool:
    return type(getattr(network, "_orig_mod", network)).__name__ == "FluxTransformer2DModel"


def find_latent(args: tuple, kwargs: dict) -> torch.Tensor:
    """Return x of a call: the first argument, called sample by U-Nets and hidden_states by transformers."""
    return args[0] if args else kwargs["sample"] if "sample" in kwargs else kwargs["hidden_states"]


def conditional_rows(pipe: Any, network: nn.Module, x: torch.Tensor, conditional: str) -> slice:
    """Return the rows of the batch x that have the prompt. Raises RestoreError if "auto" cannot tell."""
    half = len(x) // 2
    if conditional == "auto":
        if isinstance(pipe, nn.Module):
            return slice(None)
        # Not all pipelines have this attribute; all of them put the same latents twice into the batch.
        does_cfg = getattr(pipe, "do_classifier_free_guidance", None)
        doubled = len(x) % 2 == 0 and torch.equal(x[:half], x[half:])
        if does_cfg and not doubled:
            hint = "try conditional='second', 'first' or 'all', the part with the prompt"
            raise RestoreError(f"batch of classifier-free guidance must be [without, with prompt]; {hint}")
        usual = WITH_PROMPT.get(type(getattr(network, "_orig_mod", network)).__name__, "second")
        conditional = usual if doubled and does_cfg is not False else "all"
    if conditional == "all":
        return slice(None)
    if len(x) % 2:
        raise RestoreError(f"conditional={conditional!r} needs a batch of two halves, got {len(x)} images")
    return slice(half, None) if conditional == "second" else slice(0, half)


def find_timestep(network: nn.Module, args: tuple, kwargs: dict) -> float:
    """Return the timestep of a call, a number or a tensor with one value for the whole batch."""
    t = kwargs["timestep"] if "timestep" in kwargs else args[1]
    t = float(t.flatten()[0]) if isinstance(t, torch.Tensor) else float(t)
    return 1000 * t if is_flux(network) else t  # FLUX counts from 0 to 1, its scheduler to 1000


def _sample(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output.sample


def _shift(output: Any, shift: torch.Tensor) -> Any:
    """Add `shift` to the prediction in the network's output, a tuple or an object."""
    moved = _sample(output) + shift
    return (moved, *output[1:]) if isinstance(output, tuple) else type(output)(sample=moved)
