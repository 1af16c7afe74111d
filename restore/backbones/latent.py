"""Unconditional and class-conditional latent diffusion (Rombach et al. 2022): a UNet2DModel on latents.

Read from the folders of diffusers' LDMPipeline, such as CompVis/ldm-celebahq-256, and from the original checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from operators import RestoreError
from restore import disk
from restore.backbones import ldm_weights
from restore.backbones.adm import ADM, AUTOENCODERS, SCHEDULER, SCHEDULES, read_folder, require_schedule
from restore.backbones.ambient import no_autocast
from restore.backbones.autoencoder import Latents, load_vae, vae_precision
from restore.backbones.diffusers_parts import UNet2DModel
from restore.backbones.pipeline_files import INDEX
from restore.backbones.weights import align_memory, save_network


class LatentDiffusion(Latents, ADM):
    """A diffusion model of an autoencoder's latents as a `Backbone` (see restore.backbones.base).

    network, options: as for ADM, but on latents (B, C, h, w): attention layers have the names of the U-Net,
        `resolution` and `multiple` count latent cells.
    vae: AutoencoderKL, AutoencoderTiny or VQModel, see Latents; its arithmetic is in `dtype` too, but in fp32 with
        fp16, which decoders overflow.
    Raises RestoreError for parts that do not belong together.
    """

    one_beyond = True  # the PSLD code evaluates the network at t = T, a step beyond its table

    def __init__(self, network: UNet2DModel, vae: nn.Module, **options) -> None:
        super().__init__(network, **options)
        self.vae_dtype = vae_precision(None, self.dtype)
        self.use_vae(vae.to(self.device))

    def encode(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        with self._autocast(image):
            return super().encode(image, noise)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        with self._autocast(z):
            return super().decode(z)

    def _autocast(self, x: torch.Tensor):
        low = self.vae_dtype != torch.float32
        return torch.autocast(x.device.type, dtype=self.vae_dtype) if low else no_autocast(x.device)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        heads: int | None = None,
        head_channels: int | None = None,
        attention_order: str | None = None,
        scale_factor: float | None = None,
        ema: bool = True,
        weights_key: str | None = None,
        vae: nn.Module | None = None,
        **options,
    ) -> LatentDiffusion:
        """Load a folder of diffusers' LDMPipeline, or a CompVis latent-diffusion checkpoint without conditioning.

        heads, head_channels, attention_order: of the U-Net's attention, which a checkpoint does not tell (default 32
            channels a head, "legacy", as the published models with a vq-f4 autoencoder). scale_factor: of its latents
            (default: the file's, else 1). `restore.load` asks for what it does not know instead of these defaults.
        ema: use the averaged weights, if there are any. weights_key: which network of a file that holds several.
        vae: in place of the model's own autoencoder, of the same latents.
        options: of the constructor; schedule, prediction_type and null_class default to the scheduler's configuration
            or the checkpoint's betas.
        Raises RestoreError for anything else, incomplete weights, and pickles with code, which is never run.
        """
        source = Path(source)
        if source.is_dir():
            told = {"heads": heads, "head_channels": head_channels, "attention_order": attention_order}
            for name, value in {**told, "scale_factor": scale_factor}.items():
                if value is not None:
                    raise RestoreError(f"{name} must be None for {source}, a converted model, got {value!r}")
            network, trained, extra = read_folder(source, autoencoder=True, weights_key=weights_key)
            # The scheduler's file, which other programs read and users edit, goes before restore.json.
            trained = extra | trained
            require_schedule(source, trained | options)
            part = "vqvae" if (source / "vqvae").is_dir() else "vae"
            own_vae = load_vae(source / part, pickles=True) if vae is None else vae
        else:
            attention = {"heads": heads, "head_channels": head_channels, "order": attention_order or "legacy"}
            kept = {"scale_factor": scale_factor, "ema": ema, "key": weights_key}
            network, own_vae, trained = ldm_weights.read_checkpoint(source, **attention, **kept)
        options = trained | {key: value for key, value in options.items() if value is not None}
        return cls(align_memory(network), align_memory(own_vae if vae is None else vae), **options)

    def save(self, folder: str | Path, dtype: torch.dtype | str | None = None) -> None:
        """Write a folder of diffusers' LDMPipeline (fp32, or `dtype`) that `load` reads back."""
        folder = Path(folder)
        super().save(folder / "unet", dtype)
        save_network(self.vae, folder / AUTOENCODERS[0], dtype)
        schedule = self.trained_schedule
        scheduler = {"_class_name": "DDIMScheduler", "clip_sample": False}
        scheduler |= schedule if isinstance(schedule, Mapping) else SCHEDULES[schedule]
        scheduler |= {"prediction_type": self.prediction_type}
        disk.write_json(disk.make_folder(folder / "scheduler") / SCHEDULER, scheduler)
        names = {AUTOENCODERS[0]: type(self.vae).__name__, "unet": "UNet2DModel", "scheduler": scheduler["_class_name"]}
        parts = {part: ["diffusers", name] for part, name in names.items()}
        disk.write_json(folder / INDEX, {"_class_name": "LDMPipeline", **parts})
