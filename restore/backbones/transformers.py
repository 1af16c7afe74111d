"""Transformers on latents: Stable Diffusion 3 and 3.5 and FLUX.1 (flow matching), DiT (class-conditional ImageNet).

The networks are diffusers' `SD3Transformer2DModel`, `FluxTransformer2DModel` and `DiTTransformer2DModel`, the
autoencoder its `AutoencoderKL` or `AutoencoderTiny`; prompts are embedded by its pipelines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import nn

from operators import RestoreError
from operators.naming import check_known
from restore.backbones import pipeline_files as files
from restore.backbones.adm import check_labels
from restore.backbones.attention_layers import find_attention_layers
from restore.backbones.autoencoder import Latents
from restore.backbones.base import PREDICTION_TYPES, Prediction, expand_times, require_shape
from restore.backbones.quantise import QUANTISE, quantise_weights
from restore.backbones.schedule import Schedule
from restore.backbones.stable_diffusion import run_in_dtype


class FlowTransformer(Latents):
    """Base of SD3 and FLUX: x_t = (1 − sigma) x_0 + sigma n, the network predicts v = n − x_0.

    network: the diffusers transformer. vae: AutoencoderKL or AutoencoderTiny. scheduler: the configuration of a
        FlowMatchEulerDiscreteScheduler.
    null_condition: the empty prompt's condition; None without a text encoder. encode_prompt: text -> condition; None
        without text encoders.
    resolution: the trained side in latent cells; None: the network's own.

    A condition is one tensor (1 or B, 1 + tokens, width): the pooled embedding of the prompt as the first row, then
    the embeddings of its tokens (see `make_condition`). x is a scaled latent (B, C, h, w). A subclass names its
    kind and defines `_velocity(x, times, text, pooled)` and `_embed_prompt(pipeline, text)`; `packed` cells of x are
    one input vector. Raises RestoreError for parts that do not belong together.
    """

    tiny_vae, kind, packed = "", "", 1

    def __init__(
        self,
        network: nn.Module,
        vae: nn.Module,
        scheduler: Mapping[str, Any],
        null_condition: torch.Tensor | None = None,
        *,
        encode_prompt: Callable[[str], torch.Tensor] | None = None,
        resolution: int | None = None,
    ) -> None:
        network_class = files.KINDS[self.kind][2]
        if type(network).__name__ != network_class:
            raise RestoreError(f"network must be a {network_class}, got a {type(network).__name__}")
        if "FlowMatch" not in str(scheduler.get("_class_name", "FlowMatch")):
            raise RestoreError(f"scheduler must be one of flow matching, got a {scheduler['_class_name']}")
        self.network = network.eval().requires_grad_(False)
        self.scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler}
        self.times = int(self.scheduler.get("num_train_timesteps", 1000))
        self.null_condition = None if null_condition is None else null_condition.detach().to(self.device)
        self.encode_prompt = encode_prompt
        self.attention = find_attention_layers(network)
        self.multiple = 2 if self.packed > 1 else network.config.patch_size
        self.channels = network.config.in_channels // self.packed
        self.resolution = resolution or network.config.get("sample_size") or 128
        self.schedule = self.sized_schedule(self.resolution, self.resolution)
        self.use_vae(vae)

    @classmethod
    def read(
        cls,
        source: str | Path,
        dtype: torch.dtype,
        vae: nn.Module | None = None,
        *,
        text_tokens: int | None = None,
        quantise: str | None = None,
        **options,
    ) -> tuple[nn.Module, nn.Module, dict]:
        """Read transformer, autoencoder and keywords of the constructor; see Latents.load.

        source: a diffusers folder with transformer, vae and scheduler, and optionally text encoders and tokenizers
            (without T5, SD3 uses zeros for its tokens, as diffusers does).
        text_tokens: length to which T5's prompts are padded and cut; default: the pipeline's.
        quantise: "int8" or "fp8", the transformer's weights in 8 bits, see restore.backbones.quantise.
        The text encoders run on the CPU, in bfloat16 unless `dtype` is float32. They are released after encoding the
        empty prompt; `encode_prompt` reads them again and keeps them.
        """
        folder = Path(source).expanduser()
        check_known([] if quantise is None else [quantise], QUANTISE, "quantise has no choice")
        network, vae, scheduler = files.read_folder(folder, cls.kind, dtype, vae)
        if quantise is not None:
            quantise_weights(network, quantise)
        if not files.has_text_encoders(folder, cls.kind):
            return network, vae, {"scheduler": scheduler} | options

        def read_pipeline():
            # In float16 T5's activations overflow.
            parts = files.read_text_encoders(folder, cls.kind, dtype if dtype == torch.float32 else torch.bfloat16)
            return getattr(diffusers, files.KINDS[cls.kind][0])(transformer=network, vae=None, scheduler=None, **parts)

        limit = {} if text_tokens is None else {"max_sequence_length": text_tokens}
        encode = files.make_prompt_encoder(read_pipeline, lambda text, pipe: cls._embed_prompt(pipe, text, **limit))
        parts = {"scheduler": scheduler, "null_condition": encode("", keep=False), "encode_prompt": encode}
        return network, vae, parts | options

    def sized_schedule(self, height: int, width: int) -> Schedule:
        """Return the noise levels for latents of height x width cells: with dynamic shifting they depend on the number
        of tokens that the network sees at once."""
        sides = (min(side, self.resolution) // self.multiple for side in (height, width))
        return Schedule.from_config(self.scheduler, tokens=math.prod(sides))

    def predict(self, x_t: torch.Tensor, t: float, condition: torch.Tensor | None = None) -> Prediction:
        """Return the prediction for a latent x_t (B, C, h, w), in the dtype of x_t.

        t: 1000 sigma, from 0 to 1000 for any shift of the schedule; a (B,) tensor gives every latent its own.
        condition: see the class; None is the empty prompt. Raises RestoreError for sides not divisible by the patch,
        other conditions and times out of range.
        """
        require_shape(x_t, self.channels, self.multiple)
        times = expand_times(t, x_t)
        batched = isinstance(t, torch.Tensor) and t.numel() > 1
        sigma = (t.to(x_t).view(-1, 1, 1, 1) if batched else float(t)) / self.times
        low, high = (float(times.min()), float(times.max())) if batched else (float(t), float(t))
        if not 0 <= low <= high <= self.times:
            raise RestoreError(f"t must lie in 0 to {self.times}, got {t}")
        text, pooled = self._split_condition(condition, x_t)
        out = run_in_dtype(lambda x: self._velocity(x, times, text, pooled), x_t, self.network.dtype)
        return Prediction.of("velocity", out, x_t, 1 - sigma, sigma)

    def _split_condition(self, condition: torch.Tensor | None, x_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        condition = self.null_condition if condition is None else condition
        tokens, pooled = self.network.config.joint_attention_dim, self.network.config.pooled_projection_dim
        if condition is None:
            raise RestoreError("condition must be given to a model without text encoders, got None; try make_condition")
        valid = isinstance(condition, torch.Tensor) and condition.ndim == 3 and len(condition) in (1, len(x_t))
        if not valid or condition.shape[1] < 2 or condition.shape[2] != max(tokens, pooled):
            raise RestoreError(
                f"condition must be a prompt's embedding (1 or {len(x_t)}, 1 + tokens, {max(tokens, pooled)}), got "
                f"{getattr(condition, 'shape', condition)!s}; try encode_prompt or make_condition"
            )
        condition = condition.to(x_t.device, self.network.dtype).expand(len(x_t), -1, -1)
        return condition[:, 1:, :tokens], condition[:, 0, :pooled]


class SD3(FlowTransformer):
    """Stable Diffusion 3 and 3.5 (Esser et al. 2024); see FlowTransformer."""

    tiny_vae, kind = "taesd3", "sd3"

    @staticmethod
    def _embed_prompt(pipe, text, **limit):
        options = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False, **limit}
        embeds, _, pooled, _ = pipe.encode_prompt(text, **options, device=torch.device("cpu"))
        return make_condition(embeds.float(), pooled.float())

    def _velocity(self, x, times, text, pooled):
        return self.network(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=times).sample


class Flux(FlowTransformer):
    """FLUX.1 (Black Forest Labs 2024); see FlowTransformer.

    distilled_guidance: the guidance scale that FLUX.1-dev takes as an input (3.5 is diffusers' default); schnell has
        no such input.
    """

    tiny_vae, kind, packed = "taef1", "flux", 4  # 2 x 2 cells are one token

    def __init__(self, network: nn.Module, *parts, distilled_guidance: float = 3.5, **options) -> None:
        super().__init__(network, *parts, **options)
        self.distilled_guidance, self.positions = float(distilled_guidance), (None, None)

    @staticmethod
    def _embed_prompt(pipe, text, **limit):
        embeds, pooled, _ = pipe.encode_prompt(text, prompt_2=None, **limit, device=torch.device("cpu"))
        return make_condition(embeds.float(), pooled.float())

    def _place_tokens(self, h: int, w: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The positions (h w, 3) of the tokens of an image, made once for a size."""
        key, known = (h, w, dtype, device), self.positions  # another thread may replace them
        if known[0] != key:
            with torch.inference_mode(False):  # or they could not be used in a later backward pass
                rows, columns = torch.meshgrid(*(torch.arange(n, device=device) for n in (h, w)), indexing="ij")
                ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
                self.positions = known = key, ids.to(dtype)
        return known[1]

    def _velocity(self, x, times, text, pooled):
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        ids = self._place_tokens(h, w, x.dtype, x.device)
        scale = times.new_full(times.shape, self.distilled_guidance) if self.network.config.guidance_embeds else None
        out = self.network(
            hidden_states=F.pixel_unshuffle(x, 2).flatten(2).mT,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=times.to(x.dtype) / 1000,  # rounded like the pipeline's
            img_ids=ids,
            txt_ids=ids.new_zeros(text.shape[1], 3),
            guidance=scale,
        ).sample
        return F.pixel_shuffle(out.mT.unflatten(-1, (h, w)), 2)


class DiT(Latents):
    """DiT (Peebles & Xie 2023): class-conditional, eps and a learned variance range, on Stable Diffusion's latents.

    network: DiTTransformer2DModel. vae: AutoencoderKL or AutoencoderTiny. scheduler: the configuration of a scheduler
        with betas. A condition is class labels, as ADM's; null_condition is the class after the last (1000 of
        ImageNet's 0..999). x is a scaled latent (B, C, h, w).

    diffusers arranges the tokens in a square, so x must have the trained size: `multiple` is the resolution, and
    smaller images are padded to it.
    """

    tiny_vae, encode_prompt = "taesd", None

    def __init__(self, network: nn.Module, vae: nn.Module, scheduler: Mapping[str, Any]) -> None:
        config = network.config
        self.network = network.eval().requires_grad_(False)
        self.schedule = Schedule.from_config(scheduler)
        self.prediction_type = scheduler.get("prediction_type", "epsilon")
        check_known([self.prediction_type], PREDICTION_TYPES, "unknown prediction type")
        self.channels, self.resolution = config.in_channels, config.sample_size
        self.multiple = self.resolution
        self.learned_variance = network.out_channels == 2 * config.in_channels
        self.classes = config.num_embeds_ada_norm + 1
        self.null_condition = torch.tensor([self.classes - 1], device=self.device)
        self.attention = find_attention_layers(network)
        self.use_vae(vae)

    @classmethod
    def read(cls, source: str | Path, dtype: torch.dtype, vae: nn.Module | None = None) -> tuple:
        """Read a folder as diffusers' DiTPipeline writes it; see Latents.load."""
        network, vae, scheduler = files.read_folder(Path(source).expanduser(), "dit", dtype, vae)
        return network, vae, {"scheduler": scheduler}

    def predict(self, x_t: torch.Tensor, t: float, condition: torch.Tensor | int | None = None) -> Prediction:
        """Return the prediction for a latent x_t (B, C, resolution, resolution), in the dtype of x_t.

        t: 0..T−1, also between; a (B,) tensor gives every latent its own. condition: class labels, one or one per
        image; None is no class. Raises RestoreError for other sizes, labels and times.
        """
        require_shape(x_t, self.channels, self.multiple)
        if x_t.shape[-1] != x_t.shape[-2]:
            raise RestoreError(f"x_t must be square for DiT, got shape {tuple(x_t.shape)}")
        alpha, sigma = self.schedule.levels(self.schedule.come_back(t), x_t)
        times = expand_times(t, x_t)
        labels = check_labels(self.null_condition if condition is None else condition, len(x_t), self.classes)
        labels = labels.to(x_t.device)
        out = run_in_dtype(
            lambda x: self.network(x, timestep=times, class_labels=labels).sample, x_t, self.network.dtype
        )
        return Prediction.of(PREDICTION_TYPES[self.prediction_type], out, x_t, alpha, sigma)


def make_condition(prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor) -> torch.Tensor:
    """Return the condition (B, 1 + tokens, width) of SD3 and FLUX for the outputs of diffusers' encode_prompt.

    prompt_embeds: (B, tokens, w). pooled_prompt_embeds: (B, p), which become the first row. Both are padded with zeros
    to the larger width.
    """
    width = max(prompt_embeds.shape[-1], pooled_prompt_embeds.shape[-1])
    rows = [pooled_prompt_embeds[:, None], prompt_embeds]
    return torch.cat([F.pad(row, (0, width - row.shape[-1])) for row in rows], dim=1)
