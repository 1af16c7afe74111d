"""Unconditional and class-conditional latent diffusion (Rombach et al. 2022): a UNet2DModel on latents.

Read from the folders of diffusers' LDMPipeline, such as CompVis/ldm-celebahq-256, and from the original checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import diffusers
import torch
from diffusers import UNet2DModel
from torch import nn

from operators import RestoreError
from restore import atomic
from restore.backbones import ldm_weights
from restore.backbones.adm import ADM, SCHEDULER, SCHEDULES, load_network, save_weights
from restore.backbones.checkpointing import set_checkpointing
from restore.backbones.weights import as_dtype, first_line, own_memory, read_json

AUTOENCODERS = ("VQModel", "AutoencoderKL", "AutoencoderTiny")
PARTS = ("vqvae", "vae")  # where a pipeline's folder has its autoencoder
INDEX = "model_index.json"


class LatentDiffusion(ADM):
    """A diffusion model of an autoencoder's latents as a `Backbone` (see restore.backbones.base).

    network, schedule, prediction_type, null_class, labels, dtype, channels_last: as for ADM, but on latents
        (B, C, h, w): attention layers have the names of the U-Net, `resolution` and `multiple` count latent cells.
    vae: AutoencoderKL, AutoencoderTiny or VQModel. With fp16 it stays in fp32: decoders overflow fp16.
    vae_slicing, vae_tiling: decode one image, one tile at a time. checkpointing: of both networks.

    x is (z - shift_factor) scaling_factor of the autoencoder's latent z (no shift where its config has none).
    A VQModel encodes without quantising and quantises as the first step of decoding, as in LDM; gradients pass the
    quantisation straight through, as if it were not there. It and AutoencoderTiny have no posterior: `encode`
    returns the latent itself whatever the noise.
    Raises RestoreError for parts that do not belong together.
    """

    bounded = False

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
        channels = latent_channels(vae)
        if channels != self.channels:
            raise RestoreError(
                f"the autoencoder makes latents of {channels} channels but the U-Net takes {self.channels}: they "
                "belong to different models; take both from the same one"
            )
        self.vae = vae.eval().requires_grad_(False).to(self.device)
        self.downscale = 2 ** (len(vae.config.block_out_channels) - 1)
        self.vae_dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        for name, on in (("enable_slicing", vae_slicing), ("enable_tiling", vae_tiling)):
            if on and type(vae).__name__ != "AutoencoderKL":  # diffusers cannot, or (Tiny) does it wrong
                raise RestoreError(f"a {type(vae).__name__} cannot decode in slices or tiles; leave vae_tiling off")
            if on:
                getattr(vae, name)()
        set_checkpointing(vae, checkpointing)

    def encode(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled latent (B, C, H/downscale, W/downscale) of `image` (B, 3, H, W) in [-1, 1], differentiable.

        With an AutoencoderKL the posterior's mean, or mean + std * noise.
        """
        with self._autocast(image):
            found = self.vae.encode(image)
        if hasattr(found, "latents"):
            z = found.latents.to(image.dtype)
        else:
            mean, std = found.latent_dist.mean.to(image.dtype), found.latent_dist.std.to(image.dtype)
            z = mean if noise is None else mean + std * noise
        return (z - self._shift) * self.vae.config.scaling_factor

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Image (B, 3, H, W), about [-1, 1] and not clamped, of a scaled latent; differentiable."""
        with self._autocast(z):
            return self.vae.decode(z / self.vae.config.scaling_factor + self._shift).sample.to(z.dtype)

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

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
        **options,
    ) -> LatentDiffusion:
        """From a folder of diffusers' LDMPipeline, or a CompVis latent-diffusion checkpoint without conditioning.

        heads, head_channels: of the U-Net's attention, which a checkpoint does not tell (default 32 channels a head,
            as the published models with a vq-f4 autoencoder); ema: its averaged weights, where it has them.
        schedule, prediction_type, null_class: default from the scheduler's config, the checkpoint's betas.
        options: labels, device, dtype, channels_last, checkpointing, vae_slicing, vae_tiling of the constructor.
        A VQModel whose config.json states no scaling_factor has 1, as it was trained (LDM scaled none of its
        quantised models), not diffusers' later default of 0.18215.
        Raises RestoreError for anything else, incomplete weights, and pickles with code, which is never run.
        """
        source = Path(source)
        if source.is_dir():
            if heads is not None or head_channels is not None:
                raise RestoreError(f"{source} is a converted model: its heads are already settled")
            network, vae, trained = read_folder(source)
        else:
            network, vae, trained = ldm_weights.read_checkpoint(source, heads, head_channels, ema)
        own_memory(network)
        own_memory(vae)
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
        (folder / "scheduler").mkdir(exist_ok=True)
        atomic.write_json(folder / "scheduler" / SCHEDULER, scheduler)
        names = {PARTS[0]: type(self.vae).__name__, "unet": "UNet2DModel", "scheduler": scheduler["_class_name"]}
        index = {"_class_name": "LDMPipeline", **{part: ["diffusers", name] for part, name in names.items()}}
        atomic.write_json(folder / INDEX, index)


def latent_channels(vae: nn.Module) -> int:
    """Channels of what `vae` encodes to; a VQModel's codebook may have another width than its encoder."""
    return getattr(vae.config, "vq_embed_dim", None) or vae.config.latent_channels


def read_folder(folder: Path) -> tuple[UNet2DModel, nn.Module, dict]:
    """U-Net, autoencoder and keywords of the constructor from a pipeline's folder. Raises RestoreError."""
    if not (folder / INDEX).is_file():
        raise RestoreError(f"{folder} is no pipeline of latent diffusion: it has no {INDEX}")
    index = read_json(folder / INDEX)
    parts = [part for part in PARTS if part in index]
    if "UNet2DModel" not in (index.get("unet") or []) or not parts:
        raise RestoreError(
            f"{folder} holds a {index.get('_class_name')}, not an LDMPipeline (a UNet2DModel and an autoencoder)"
        )
    if not (folder / "scheduler" / SCHEDULER).is_file():
        raise RestoreError(f"{folder} has no scheduler/{SCHEDULER}: the noise levels of its network are not known")
    config = read_json(folder / "scheduler" / SCHEDULER)
    trained = {"schedule": config, "prediction_type": config.get("prediction_type", "epsilon")}
    network, more = load_network(folder / "unet")
    more.pop("schedule", None)  # the scheduler's file is what other programs read and a user edits
    more.pop("prediction_type", None)
    return network, load_autoencoder(folder / parts[0]), trained | more


def load_autoencoder(folder: str | Path) -> nn.Module:
    """The autoencoder in a diffusers folder of its own, fp32 on the CPU, every weight from the file.

    Raises RestoreError for another kind of model and for weights that do not fit.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if name not in AUTOENCODERS:
        raise RestoreError(f"{folder} holds a {name}, which is none of {', '.join(AUTOENCODERS)}")
    try:
        vae, info = getattr(diffusers, name).from_pretrained(
            folder, use_safetensors=None, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # a damaged file fails anywhere in diffusers, with errors of any kind
        raise RestoreError(f"the autoencoder in {folder} cannot be loaded: {first_line(error)}") from error
    bad = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    if bad:
        raise RestoreError(f"the weights in {folder} do not fit its config.json: {len(bad)}, first {sorted(bad)[0]}")
    if name == "VQModel" and "scaling_factor" not in config:
        vae.register_to_config(scaling_factor=1.0)
    return vae.float().eval()


def save_autoencoder(vae: nn.Module, folder: str | Path, dtype: torch.dtype | str | None = None) -> None:
    """A diffusers folder of the autoencoder alone, weights in fp32 or `dtype`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_json(folder / "config.json", json.loads(vae.to_json_string()))
    state = vae.state_dict().items()
    save_weights(folder, {name: tensor.detach().cpu().to(as_dtype(dtype)).contiguous() for name, tensor in state})
