"""Unconditional and class-conditional latent diffusion (Rombach et al. 2022): a UNet2DModel on latents.

Read from the folders of diffusers' LDMPipeline, such as CompVis/ldm-celebahq-256, and from the original checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import nn

from operators import RestoreError
from restore import disk
from restore.backbones import ldm_weights
from restore.backbones.adm import ADM, SCHEDULER, SCHEDULES, WEIGHTS, load_network
from restore.backbones.autoencoder import Latents, load_vae, vae_precision
from restore.backbones.weights import as_dtype, own_memory

PARTS = ("vqvae", "vae")  # where a pipeline's folder has its autoencoder
INDEX = "model_index.json"


class LatentDiffusion(Latents, ADM):
    """A diffusion model of an autoencoder's latents as a `Backbone` (see restore.backbones.base).

    network, schedule, prediction_type, null_class, labels, dtype, channels_last: as for ADM, but on latents
        (B, C, h, w): attention layers have the names of the U-Net, `resolution` and `multiple` count latent cells.
    vae: AutoencoderKL, AutoencoderTiny or VQModel, see Latents; its arithmetic is in `dtype` too, but with fp16 in
        fp32: decoders overflow fp16.
    vae_slicing, vae_tiling: decode one image, one tile at a time. checkpointing: of both networks.
    Raises RestoreError for parts that do not belong together.
    """

    def __init__(
        self,
        network: UNet2DModel,
        vae: nn.Module,
        *,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        checkpointing: bool = False,
        **options,
    ) -> None:
        super().__init__(network, checkpointing=checkpointing, **options)
        self.vae_dtype = vae_precision(None, self.dtype)
        self.use_vae(vae.to(self.device), slicing=vae_slicing, tiling=vae_tiling, checkpointing=checkpointing)

    def encode(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        with self._autocast(image):
            return super().encode(image, noise)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        with self._autocast(z):
            return super().decode(z)

    def _autocast(self, x: torch.Tensor):
        low = self.vae_dtype != torch.float32
        return torch.autocast(x.device.type, dtype=self.vae_dtype) if low else nullcontext()

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        heads: int | None = None,
        head_channels: int | None = None,
        ema: bool = True,
        schedule: str | Mapping | None = None,
        prediction_type: str | None = None,
        null_class: int | None = None,
        vae: nn.Module | None = None,
        **options,
    ) -> LatentDiffusion:
        """From a folder of diffusers' LDMPipeline, or a CompVis latent-diffusion checkpoint without conditioning.

        heads, head_channels: of the U-Net's attention, which a checkpoint does not tell (default 32 channels a head,
            as the published models with a vq-f4 autoencoder); ema: its averaged weights, where it has them.
        schedule, prediction_type, null_class: default from the scheduler's config, the checkpoint's betas.
        vae: in place of the model's own autoencoder, of the same latents.
        options: labels, device, dtype, channels_last, checkpointing, vae_slicing, vae_tiling of the constructor.
        Raises RestoreError for anything else, incomplete weights, and pickles with code, which is never run.
        """
        source = Path(source)
        if source.is_dir():
            if heads is not None or head_channels is not None:
                raise RestoreError(f"{source} is a converted model: its heads are already settled")
            network, own, trained = read_folder(source)
        else:
            network, own, trained = ldm_weights.read_checkpoint(source, heads, head_channels, ema)
        own_memory(network)
        vae = own_memory(own if vae is None else vae)
        given = {"schedule": schedule, "prediction_type": prediction_type, "null_class": null_class}
        trained |= {key: value for key, value in given.items() if value is not None}
        return cls(network, vae, **trained | options)

    def save(self, folder: str | Path, dtype: torch.dtype | str | None = None) -> None:
        """Write a folder of diffusers' LDMPipeline (fp32, or `dtype`) that `load` reads back."""
        folder = Path(folder)
        super().save(folder / "unet", dtype)
        save_autoencoder(self.vae, folder / PARTS[0], dtype)
        given = (
            self.trained_schedule if isinstance(self.trained_schedule, Mapping) else SCHEDULES[self.trained_schedule]
        )
        scheduler = {"_class_name": "DDIMScheduler", "clip_sample": False, **given}
        scheduler |= {"prediction_type": self.prediction_type}
        disk.write_json(disk.make_folder(folder / "scheduler") / SCHEDULER, scheduler)
        names = {PARTS[0]: type(self.vae).__name__, "unet": "UNet2DModel", "scheduler": scheduler["_class_name"]}
        index = {"_class_name": "LDMPipeline", **{part: ["diffusers", name] for part, name in names.items()}}
        disk.write_json(folder / INDEX, index)


def read_folder(folder: Path) -> tuple[UNet2DModel, nn.Module, dict]:
    """U-Net, autoencoder and keywords of the constructor from a pipeline's folder. Raises RestoreError."""
    if not (folder / INDEX).is_file():
        raise RestoreError(f"{folder} is no pipeline of latent diffusion: it has no {INDEX}")
    index = disk.read_json(folder / INDEX, required=True)
    parts = [part for part in PARTS if part in index]
    if "UNet2DModel" not in (index.get("unet") or []) or not parts:
        raise RestoreError(
            f"{folder} holds a {index.get('_class_name')}, not an LDMPipeline (a UNet2DModel and an autoencoder)"
        )
    if not (folder / "scheduler" / SCHEDULER).is_file():
        raise RestoreError(f"{folder} has no scheduler/{SCHEDULER}: the noise levels of its network are not known")
    config = disk.read_json(folder / "scheduler" / SCHEDULER, required=True)
    trained = {"schedule": config, "prediction_type": config.get("prediction_type", "epsilon")}
    network, more = load_network(folder / "unet")
    more.pop("schedule", None)  # the scheduler's file is what other programs read and a user edits
    more.pop("prediction_type", None)
    return network, load_vae(folder / parts[0], pickles=True), trained | more


def save_autoencoder(vae: nn.Module, folder: str | Path, dtype: torch.dtype | str | None = None) -> None:
    """A diffusers folder of the autoencoder alone, weights in fp32 or `dtype`."""
    folder = disk.make_folder(folder)
    disk.write_json(folder / "config.json", json.loads(vae.to_json_string()))
    state = vae.state_dict().items()
    weights = {name: tensor.detach().cpu().to(as_dtype(dtype)).contiguous() for name, tensor in state}
    disk.write_safetensors(folder / WEIGHTS, weights, {"format": "pt"})
