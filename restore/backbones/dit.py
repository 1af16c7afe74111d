"""DiT (Peebles & Xie 2023), a class-conditional transformer on latents: diffusers' `DiTTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from operators import RestoreError
from operators.naming import check_known
from restore.backbones.adm import check_labels
from restore.backbones.attention_layers import find_attention_layers
from restore.backbones.autoencoder import Latents
from restore.backbones.base import PREDICTION_TYPES, Prediction, expand_times, require_shape
from restore.backbones.pipeline_files import read_folder
from restore.backbones.schedule import Schedule
from restore.backbones.stable_diffusion import run_in_dtype


class DiT(Latents):
    """DiT (Peebles & Xie 2023): class-conditional, eps and a learned variance range, on Stable Diffusion's latents.

    network: DiTTransformer2DModel. vae: AutoencoderKL or AutoencoderTiny. scheduler: the configuration of a scheduler
        with betas. A condition is class labels, as ADM's; null_condition is the class after the last (1000 of
        ImageNet's 0..999). x is a scaled latent (B, C, h, w).

    diffusers arranges the tokens in a square, so x must have the trained size: `multiple` is the resolution, and
    smaller images are padded to it.
    """

    network_class, tiny_vae, encode_prompt = "DiTTransformer2DModel", "taesd", None

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
        self.null_condition = torch.tensor([self.classes - 1])
        self.attention = find_attention_layers(network)
        self.use_vae(vae)

    @classmethod
    def read(cls, source: str | Path, dtype: torch.dtype, vae: nn.Module | None = None) -> tuple:
        """Read a folder as diffusers' DiTPipeline writes it; see Latents.load."""
        network, vae, scheduler = read_folder(Path(source).expanduser(), "dit", dtype, vae)
        return network, vae, {"scheduler": scheduler}

    def predict(self, x_t: torch.Tensor, t: float, condition: torch.Tensor | int | None = None) -> Prediction:
        """Return the prediction for a latent x_t (B, C, resolution, resolution), in the dtype of x_t.

        t: 0..T−1, also between; a (B,) tensor gives every latent its own. condition: class labels, one or one per
        image; None is no class. Raises RestoreError for other sizes, labels and times.
        """
        require_shape(x_t, self.channels, self.multiple)
        if x_t.shape[-1] != x_t.shape[-2]:
            raise RestoreError(f"x_t must be square for DiT, got shape {tuple(x_t.shape)}")
        alpha, sigma = self.schedule.levels(t, x_t)
        times = expand_times(t, x_t)
        labels = check_labels(self.null_condition if condition is None else condition, len(x_t), self.classes)
        labels = labels.to(x_t.device)
        out = run_in_dtype(
            lambda x: self.network(x, timestep=times, class_labels=labels).sample, x_t, self.network.dtype
        )
        return Prediction.of(PREDICTION_TYPES[self.prediction_type], out, x_t, alpha, sigma)
