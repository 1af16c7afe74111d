"""Guidance inside an unmodified diffusers pipeline.

A pipeline calls its network, a U-Net or a transformer, once a step and does the rest itself: prompts, ControlNet
residuals, masks, classifier-free guidance. So it is enough that this one call returns the guided prediction.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from operators import RestoreError
from operators.naming import suggest
from restore.backbones.attention_layers import STACKS, find_attention_layers
from restore.backbones.base import Prediction
from restore.backbones.forwards import replace_forward
from restore.backbones.schedule import Schedule
from restore.guidance.attention import IMAGE_FIRST, IMAGE_ONLY, LINEAR
from restore.guidance.base import Estimate, Guidance, Term, as_guidance
from restore.guidance.cfg import CFG
from restore.guidance.layouts import PARTS, NetworkCall, is_packed, sample_of, time_scale, unwrap


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
        a network given without its pipeline. An unknown layout is not guessed.
    Gradients of the output, if enabled, are those of the unguided prediction. Threads that call the pipeline within
    the block are guided independently of each other. Times (a term's interval) are those of the pipeline's scheduler.
    Raises RestoreError for a pipeline without a known network, unknown layers, CFG terms (use the pipeline's
    guidance_scale), combinations that need noise levels; in the pipeline's call, for a batch of several images whose
    layout "auto" does not know (a pipeline of your own without do_classifier_free_guidance, edits, three parts), for a
    network that caches between steps and for a pipeline that perturbs attention itself.
    """
    if conditional not in PARTS:
        raise RestoreError(f"unknown conditional={conditional!r}; {suggest(conditional, PARTS)}")
    network = find_network(pipe)
    adapter = PipelineNetwork(network, pipe)
    guidance, changes = split_guidance(guidance, adapter)
    local = threading.local()

    def guide(network, inner):
        def forward(*args, **kwargs):
            if not hasattr(local, "estimate"):
                local.estimate, local.last, local.t = Estimate(adapter, guidance), None, -math.inf
            estimate = local.estimate
            call = NetworkCall(network, args, kwargs, pipe, conditional, estimate.tapes, adapter.time_scale)
            last, local.last = local.last, None
            if last is not None and last.is_of_the_same_step(call, pipe):
                # The pass without the prompt gets the shift of the one with it, so that their difference does not.
                with replace_forward([network], lambda *_: inner):
                    return finish(_shift(network(*args, **kwargs), last.shift), call)
            check_unguided(network, pipe)
            if call.t > local.t:  # another run
                estimate.forget()
            local.t = call.t
            # Within the network's own passes its forward is the original one, so that they are not guided in turn.
            with replace_forward([network], lambda *_: inner):
                strong, eps = estimate(call.x[call.rows], call.t, call)
            if not estimate.is_guided:
                return finish(call.output, call)
            # The same shift in both halves, so that the pipeline's u + g (c - u) is shifted by it once.
            shift = eps - strong.eps.detach()
            local.last = GuidedStep(call, shift, pipe)
            return finish(_shift(call.output, torch.cat([shift] * (len(call.x) // len(shift)))), call)

        def finish(output, call):
            eps = adapter.eps_of(sample_of(output))
            return _shift(output, changes.change(eps, call.x, call.t) - eps) if changes.changes else output

        return forward

    with replace_forward([network], guide, everywhere=True):
        yield pipe


@contextmanager
def schedule_cfg(pipe: Any, term: CFG) -> Iterator[Any]:
    """Within the block the pipeline's own classifier-free guidance, called with the term's scale, follows its interval
    and schedule (PAG, Ahn et al. 2024, Fig. 44). Enter it after `guided`.

    The prediction without the prompt, u, becomes c - r (c - u), r = term.scale_at(t) / term.scale, so that the
    pipeline's u + g (c - u) is c + r w (c - u). Both are computed also where the term is off.
    Raises RestoreError, in the pipeline's call, for one that computes them in two calls, as FLUX's.
    """
    network = find_network(pipe)
    adapter = PipelineNetwork(network, pipe)

    def scale(network, inner):
        def forward(*args, **kwargs):
            call = NetworkCall(network, args, kwargs, pipe, "auto", scale=adapter.time_scale)
            output = inner(*args, **kwargs)
            if is_packed(call.x):
                raise RestoreError(
                    f"cfg must have only a scale with a {type(pipe).__name__}, which makes two calls a step"
                )
            share, half = term.scale_at(call.t, adapter) / term.scale, len(call.x) // 2
            if share == 1 or call.rows == slice(None):
                return output
            sample, other = sample_of(output), slice(0, half) if call.rows.start else slice(half, None)
            shift = torch.zeros_like(sample)
            shift[other] = (1 - share) * (sample[call.rows] - sample[other])
            return _shift(output, shift)

        return forward

    with replace_forward([network], scale, everywhere=True):
        yield pipe


def split_guidance(guidance: Term | Guidance | None, adapter: PipelineNetwork) -> tuple[Guidance | None, Estimate]:
    """Return the terms that have a weak pass, and the estimate of those that have none. The latter are linear maps of
    the prediction, and so change the pipeline's u + g (c - u) as they change both halves.

    Raises RestoreError for CFG terms, combinations that need noise levels, and what does not fit the network.
    """
    guidance = as_guidance(guidance)
    check_terms(guidance)
    terms = guidance.terms if guidance is not None else ()
    changes = Estimate(adapter, Guidance(tuple(term for term in terms if not term.has_weak_pass)))
    if guidance is not None:
        guidance = replace(guidance, terms=tuple(term for term in terms if term.has_weak_pass))
    Estimate(adapter, guidance)  # raises errors here rather than within the pipeline's call
    return guidance, changes


def check_terms(guidance: Guidance | None) -> None:
    """Raise RestoreError for terms and combinations that no pipeline can have."""
    if guidance is None:
        return
    if any(isinstance(term, CFG) for term in guidance.terms):
        raise RestoreError("cfg is done by the pipeline itself; call it with guidance_scale = w + 1")
    if hasattr(guidance.combine, "bind"):
        raise RestoreError(f"combination must need no noise levels inside a pipeline, as sum, got {guidance.combine}")


def find_network(pipe: Any) -> nn.Module:
    """Return the U-Net or transformer of a pipeline, or itself. Raises RestoreError if there is none that is known."""
    network = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if network is None:
        raise RestoreError(f"pipe must be a diffusers pipeline with U-Net or transformer, got {type(pipe).__name__}")
    check_known(unwrap(network))
    return network


class GuidedStep:
    """The last guided call of a pipeline that calls its network twice a step, first with the prompt."""

    def __init__(self, call: NetworkCall, shift: torch.Tensor, pipe: Any) -> None:
        self.x, self.t, self.shift, self.run = call.x, call.t, shift, _run_of(pipe)

    def is_of_the_same_step(self, call: NetworkCall, pipe: Any) -> bool:
        """Whether `call` is the one without the prompt: of the same latents and time, in the same run."""
        if self.run is None or self.run is not _run_of(pipe) or not is_packed(call.x) or self.t != call.t:
            return False
        return self.x is call.x or torch.equal(self.x, call.x)


def _run_of(pipe: Any) -> Any:
    """What a run of the pipeline makes anew: its scheduler's times."""
    return getattr(getattr(pipe, "scheduler", None), "timesteps", None)


def check_known(network: nn.Module) -> None:
    """Raise RestoreError unless it is known where the network's attention sits and what its arguments mean.

    A U-Net has residual blocks, each with its attention. A transformer has its blocks in known lists, with known
    processors, and no attention elsewhere.
    """
    known = (
        "a U-Net or the transformer of SD3, FLUX, Chroma, FLUX.2, QwenImage, AuraFlow, PixArt, Sana, HunyuanDiT or DiT"
    )
    if not (_is_unet(network) or _is_known_transformer(network)):
        raise RestoreError(f"network of the pipeline must be {known}, got a {type(network).__name__}")


def _is_unet(network: nn.Module) -> bool:
    blocks = [*getattr(network, "down_blocks", ()), *getattr(network, "up_blocks", ())]

    def is_usual(block):
        attentions = getattr(block, "attentions", None)
        samplers = hasattr(block, "downsamplers") or hasattr(block, "upsamplers")
        return samplers and hasattr(block, "resnets") and len(attentions or block.resnets) == len(block.resnets)

    parts = all(hasattr(network, name) for name in ("down_blocks", "mid_block", "up_blocks"))
    return parts and all(map(is_usual, blocks))


def _is_known_transformer(network: nn.Module) -> bool:
    config = getattr(network, "config", {})
    processors = {}  # of self-attention, by the list of blocks
    for name, part in network.named_children():
        for module in part.modules() if isinstance(part, nn.ModuleList) else ():
            if hasattr(module, "processor") and not getattr(module, "is_cross_attention", False):
                processors.setdefault(name, set()).add(type(module.processor).__name__)
    names = set().union(*processors.values())
    sprint = LINEAR in names and config.get("guidance_embeds")  # SANA-Sprint's times are those of no scheduler
    known = names <= {*IMAGE_FIRST, *IMAGE_ONLY, LINEAR} and processors.keys() <= set(STACKS)
    return bool(names) and known and isinstance(config.get("patch_size"), int) and not sprint


def check_unguided(network: nn.Module, pipe: Any) -> None:
    """Raise RestoreError for a network or pipeline that a second pass would confuse."""
    network = unwrap(network)
    if getattr(network, "is_cache_enabled", False):
        name = type(network).__name__
        raise RestoreError(
            f"a guided network must not cache between steps, got a {name} that does; try disable_cache()"
        )
    if getattr(pipe, "do_perturbed_attention_guidance", False):
        raise RestoreError(f"pipe must not perturb attention itself, got a {type(pipe).__name__}; try pag_scale=0")


class PipelineNetwork:
    """A pipeline's network as the Backbone that guidance needs; `condition` is a NetworkCall.

    x_t and predictions are those of the rows with the prompt; the strong pass computes the whole batch.
    """

    null_condition = None

    def __init__(self, network: nn.Module, pipe: Any = None) -> None:
        self.network, self.pipe = network, pipe
        self.attention = find_attention_layers(unwrap(network))
        self.time_scale = time_scale(network)

    @property
    def schedule(self) -> Schedule | None:
        """The pipeline's noise levels; None for a network without its pipeline and for times that do not tell them."""
        scheduler = getattr(self.pipe, "scheduler", None)
        if scheduler is None or type(scheduler).__name__.startswith("EDM"):  # whose times are not the noise levels'
            return None
        return Schedule.from_config({"_class_name": type(scheduler).__name__, **scheduler.config})

    def predict(self, x_t: torch.Tensor, t: float, condition: NetworkCall) -> Prediction:
        """The first prediction of a call is the strong one; later ones are weak and made only on its rows."""
        if condition.output is None:
            return Prediction(self.eps_of(condition.run()[condition.rows]))
        return Prediction(self.eps_of(condition.run_weak(x_t)))

    def eps_of(self, output: torch.Tensor) -> torch.Tensor:
        """Return an output without the channels of a learned variance, which guidance must not move."""
        vae = getattr(self.pipe, "vae", None)
        channels = (unwrap(self.network).config.in_channels if vae is None else vae.config.get("latent_channels")) or 0
        return output[:, :channels] if output.ndim == 4 and output.shape[1] == 2 * channels else output


def _shift(output: Any, shift: torch.Tensor) -> Any:
    """Add `shift` to the prediction in the network's output, a tuple or an object."""
    sample = sample_of(output)
    missing = sample.shape[1] - shift.shape[1]  # the channels of a learned variance
    moved = sample + (F.pad(shift, (0, 0, 0, 0, 0, missing)) if missing else shift)
    return (moved, *output[1:]) if isinstance(output, tuple) else type(output)(sample=moved)
