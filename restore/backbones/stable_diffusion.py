"""Stable Diffusion 1.x / 2.x (Rombach et al. 2022) as a noise-prediction network on latents.

The network is diffusers' `UNet2DConditionModel`, the autoencoder its `AutoencoderKL`. `StableDiffusion.load` reads a
diffusers folder, a hub id or a single checkpoint file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from operators import RestoreError
from operators.naming import check_known
from restore.backbones.ambient import no_autocast
from restore.backbones.attention_layers import find_attention_layers
from restore.backbones.autoencoder import Latents
from restore.backbones.base import PREDICTION_TYPES, Prediction, expand_times
from restore.backbones.pipeline_files import embed_prompt, make_prompt_encoder, read_stable_diffusion
from restore.backbones.precision import keep_gradient
from restore.backbones.schedule import Schedule


class StableDiffusion(Latents):
    """A latent diffusion model with its autoencoder and the embedding of the empty prompt.

    unet: UNet2DConditionModel. vae: AutoencoderKL or AutoencoderTiny. schedule: the noise levels.
    null_condition: embedding (1, tokens, width) of the empty prompt.
    prediction_type: "epsilon", "v_prediction" (Salimans & Ho 2022) or "sample".
    encode_prompt: text -> (1, tokens, width); None without a text encoder.

    x is a scaled latent (B, 4, h, w); `resolution`, `multiple` are in latent cells, of `downscale` pixels.
    Raises RestoreError when the parts do not belong together.
    """

    tiny_vae = "taesd"

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        schedule: Schedule,
        null_condition: torch.Tensor,
        *,
        prediction_type: str = "epsilon",
        encode_prompt: Callable[[str], torch.Tensor] | None = None,
    ) -> None:
        config, width = unet.config, null_condition.shape[-1]
        if config.in_channels != config.out_channels:
            raise RestoreError(
                f"the U-Net must be a text-to-image model's, got {config.in_channels} input and {config.out_channels} "
                "output channels (an inpainting or upscaling model)"
            )
        if config.addition_embed_type is not None or config.class_embed_type is not None:
            raise RestoreError(
                "the U-Net must need no conditions beyond a prompt, as SDXL's does; try Stable Diffusion 1.x or 2.x"
            )
        if width != (wanted := _first(config.cross_attention_dim)):
            raise RestoreError(f"embeddings must be {wanted} wide, got {width}; try encoder and U-Net of one model")
        check_known([prediction_type], PREDICTION_TYPES, "unknown prediction type")
        self.network = unet.eval().requires_grad_(False)
        self.schedule = schedule
        self.null_condition = null_condition.detach().to(self.device)
        self.prediction_type = prediction_type
        self.encode_prompt = encode_prompt
        self.attention = find_attention_layers(unet)
        self.channels, self.resolution = config.in_channels, _first(config.sample_size)
        # The U-Net halves its input at every level but the last.
        self.multiple = 2 ** (len(config.block_out_channels) - 1)
        self.use_vae(vae)

    @classmethod
    def read(
        cls,
        source: str | Path,
        dtype: torch.dtype,
        vae: nn.Module | None = None,
        *,
        prediction_type: str | None = None,
        **where,
    ) -> tuple:
        """Read U-Net, autoencoder and keywords of the constructor; see Latents.load.

        prediction_type: in place of the scheduler's, which for a single file is that of diffusers' configuration for
            this architecture (Stable Diffusion 2: v_prediction, also for the 512-pixel models, which predict the
            noise). `restore.load` asks for it.
        source, where: source, config, revision and offline of `pipeline_files.read_stable_diffusion`.
        The text encoder is released after encoding the empty prompt; `encode_prompt` reads it again and keeps it, on
        the CPU.
        """
        parts = read_stable_diffusion(source, **where)
        with torch.no_grad():
            null_condition = embed_prompt("", parts)
        options = {
            "schedule": Schedule.from_config(parts["scheduler"]),
            "null_condition": null_condition,
            "prediction_type": prediction_type or parts["scheduler"].get("prediction_type", "epsilon"),
            "encode_prompt": make_prompt_encoder(
                partial(read_stable_diffusion, source, text_only=True, **where), embed_prompt
            ),
        }
        return parts["unet"], parts["vae"] if vae is None else vae, options

    def predict(self, x_t: torch.Tensor, t: float, condition: torch.Tensor | None = None) -> Prediction:
        """Return the prediction for a latent x_t (B, 4, h, w), in the dtype of x_t.

        t: 0..T−1, also between; a (B,) tensor gives every latent its own. condition: prompt embedding (1 or B,
        tokens, width); None is the empty prompt. Raises RestoreError for other conditions and times out of range.
        """
        dtype = self.network.dtype
        text = self.null_condition if condition is None else condition
        if not isinstance(text, torch.Tensor) or text.ndim != 3 or len(text) not in (1, len(x_t)):
            raise RestoreError(
                f"condition must be a prompt's embedding (1 or {len(x_t)}, tokens, width), got "
                f"{getattr(text, 'shape', text)!s}; try encode_prompt"
            )
        alpha, sigma = self.schedule.levels(self.schedule.come_back(t), x_t)
        times = expand_times(t, x_t)
        text = text.to(x_t.device, dtype).expand(len(x_t), -1, -1)
        out = run_in_dtype(
            lambda x: self.network(x, times, encoder_hidden_states=text, return_dict=False)[0], x_t, dtype
        )
        return Prediction.of(PREDICTION_TYPES[self.prediction_type], out, x_t, alpha, sigma)


def run_in_dtype(network, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return network(x) computed in `dtype`, in the dtype of x; see keep_gradient."""
    with no_autocast(x.device):
        return keep_gradient(lambda x: network(x.to(dtype)).to(x.dtype), x, dtype)


def _first(value):
    return value[0] if isinstance(value, (list, tuple)) else value
