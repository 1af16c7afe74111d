"""What backbones whose x is a latent have in common: the autoencoder, whichever it is."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from operators import RestoreError
from restore import disk
from restore.backbones.checkpointing import set_checkpointing
from restore.backbones.stable_diffusion_files import network, no_progress_bars
from restore.backbones.weights import as_dtype

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "VQModel")


class Latents:
    """A backbone with `vae`, one of AUTOENCODERS, and `network`; see restore.backbones.base.

    A latent x is scaled: (z − shift_factor) scaling_factor of what an AutoencoderKL makes of an image. An
    AutoencoderTiny was trained on scaled latents, and its own factors say so (1 and 0): the same x stands for the
    same image with either. A VQModel encodes without quantising and quantises as the first step of decoding, as in LDM;
    gradients pass the quantisation straight through, as if it were not there. Neither has a posterior: `encode` gives
    the latent itself, whatever the noise.
    """

    bounded = False

    def use_vae(
        self, vae: nn.Module, *, slicing: bool = False, tiling: bool = False, checkpointing: bool = False
    ) -> None:
        """Make `vae` the autoencoder of this backbone; see StableDiffusion.load for the options.

        Raises RestoreError for one of another number of channels, and for slices and tiles of one that has none.
        """
        # A codebook may have another width than the encoder.
        channels = getattr(vae.config, "vq_embed_dim", None) or vae.config.latent_channels
        if channels != self.channels:
            raise RestoreError(
                f"the VAE makes latents of {channels} channels but the network takes "
                f"{self.channels}: they belong to different models; take both from the same one"
            )
        self.vae = vae.eval().requires_grad_(False)
        self.downscale = 2 ** (len(vae.config.block_out_channels) - 1)
        if (slicing or tiling) and type(vae).__name__ == "VQModel":
            raise RestoreError("vae_slicing, vae_tiling: diffusers decodes a VQModel in one piece alone")
        if tiling and is_tiny(vae):
            raise RestoreError("vae_tiling=True: a tiny autoencoder needs no tiles, and diffusers' would break it")
        if slicing:
            vae.enable_slicing()
        if tiling:
            vae.enable_tiling()
        if checkpointing:
            # diffusers recomputes a whole level of the autoencoder at once; per unit the peak is a sixth lower.
            set_checkpointing(vae, True)

    @property
    def device(self) -> torch.device:
        return self.network.device

    def encode(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled latent (B, C, H/downscale, W/downscale) of `image` (B, 3, H, W) in [-1, 1], differentiable.

        The posterior's mean, or mean + std * noise. Raises RestoreError when the encoder overflows.
        """
        found = self.vae.encode(image.to(self.vae.dtype))
        if hasattr(found, "latents"):
            z = found.latents.to(image.dtype)
        else:
            mean, std = found.latent_dist.mean.to(image.dtype), found.latent_dist.std.to(image.dtype)
            z = mean if noise is None else mean + std * noise
        self._require_finite(z, image, "encoder")
        return (z - self._shift) * self.vae.config.scaling_factor

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Image (B, 3, H, W), about [-1, 1] and not clamped, of a scaled latent; differentiable.

        Raises RestoreError when the decoder overflows.
        """
        latent = z / self.vae.config.scaling_factor + self._shift
        image = self.vae.decode(latent.to(self.vae.dtype), return_dict=False)[0].to(z.dtype)
        self._require_finite(image, z, "decoder")
        return image

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    def _require_finite(self, output: torch.Tensor, given: torch.Tensor, part: str) -> None:
        # A non-finite input is the sampler's divergence, not an overflow here: it is reported there.
        if not torch.isfinite(output).all() and torch.isfinite(given).all():
            name = str(self.vae.dtype).removeprefix("torch.")
            raise RestoreError(
                f"the VAE's {part} overflowed in {name} (NaN or infinite values): keep the VAE in float32 or bfloat16 "
                "(vae_dtype), whatever the precision of the network"
            )


def vae_precision(vae_dtype: torch.dtype | str | None, dtype: torch.dtype) -> torch.dtype:
    """The autoencoder's: that of the network, but float32 beside float16, which its activations overflow."""
    if vae_dtype is None:
        return torch.float32 if dtype == torch.float16 else dtype
    return as_dtype(vae_dtype)


def is_tiny(vae: nn.Module) -> bool:
    """Whether `vae` is a distilled autoencoder of scaled latents (TAESD)."""
    return type(vae).__name__ == "AutoencoderTiny"


def load_vae(folder: str | Path, pickles: bool = False) -> nn.Module:
    """The autoencoder in a diffusers folder, which of AUTOENCODERS its config.json says, float32 on the CPU.

    A VQModel whose config.json states no scaling_factor has 1, as it was trained (LDM scaled none of its quantised
    models), not diffusers' later default of 0.18215. pickles: see stable_diffusion_files.network. Raises RestoreError
    for anything else and for weights that are missing or do not fit.
    """
    import diffusers

    folder = Path(folder).expanduser()
    config = disk.read_json(folder / "config.json", required=True)
    name = config.get("_class_name")
    if name not in AUTOENCODERS:
        raise RestoreError(f"{folder} holds no autoencoder but a {name}; expected one of {', '.join(AUTOENCODERS)}")
    with no_progress_bars():
        vae = network(getattr(diffusers, name), folder, "", pickles=pickles)
    if name == "VQModel" and "scaling_factor" not in config:
        vae.register_to_config(scaling_factor=1.0)
    return vae
