"""The autoencoder of backbones whose x is a latent."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from operators import RestoreError
from restore import disk
from restore.backbones.weights import as_dtype, hide_progress_bars, load_part

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "VQModel")


class Latents:
    """Base of backbones with a `network` on the latents of `vae`, one of AUTOENCODERS; see restore.backbones.base.

    x is a scaled latent, (z − shift_factor) · scaling_factor for the z of an AutoencoderKL. An AutoencoderTiny was
    trained on scaled latents, so its own factors are 1 and 0: the same x stands for the same image with either. A
    VQModel encodes without quantising and quantises as the first step of decoding, as in LDM; gradients pass straight
    through the quantisation. Neither has a posterior: `encode` returns the latent itself for any noise.
    """

    bounded = False

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        vae_dtype: torch.dtype | str | None = None,
        vae: nn.Module | None = None,
        **options,
    ):
        """Load a model from a folder written by diffusers' `save_pretrained`, or what else `read` of the class takes.

        dtype: precision of the network: a torch dtype or "fp32", "bf16", "fp16". vae_dtype: of the autoencoder; by
            default the same, except that it stays float32 with float16, which the decoder's activations overflow.
        vae: an autoencoder in place of the model's.
        options: of the class's `read` and constructor.
        Raises RestoreError if `source` is not a complete model of this kind.
        """
        dtype = as_dtype(dtype)
        network, vae, parts = cls.read(source, dtype, vae, **options)
        # nn.Module.to, because diffusers' own warns about modules to keep in float32 even if there are none.
        network = nn.Module.to(network, device, dtype)
        return cls(network, nn.Module.to(vae, device, vae_precision(vae_dtype, dtype)), **parts)

    def use_vae(self, vae: nn.Module) -> None:
        """Make `vae` the autoencoder of this backbone. Raises RestoreError if its latents have other channels."""
        # A codebook may have another width than the encoder.
        channels = getattr(vae.config, "vq_embed_dim", None) or vae.config.latent_channels
        if channels != self.channels:
            raise RestoreError(
                f"vae must make latents of {self.channels} channels, got {channels}; try that of the same model"
            )
        self.vae = vae.eval().requires_grad_(False)
        self.downscale = 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def device(self) -> torch.device:
        return self.network.device

    def encode(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return the scaled latent (B, C, H/downscale, W/downscale) of `image` (B, 3, H, W) in [-1, 1], differentiable.

        It is the posterior's mean, or mean + std · noise. Raises RestoreError if the encoder overflows.
        """
        output = self.vae.encode(image.to(self.vae.dtype))
        if hasattr(output, "latents"):
            z = output.latents.to(image.dtype)
        else:
            mean, std = output.latent_dist.mean.to(image.dtype), output.latent_dist.std.to(image.dtype)
            z = mean if noise is None else mean + std * noise
        self._require_finite(z, image, "encoder")
        return (z - self._shift) * self.vae.config.scaling_factor

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Return the image (B, 3, H, W), about [-1, 1] and not clamped, of a scaled latent; differentiable.

        Raises RestoreError if the decoder overflows.
        """
        latent = z / self.vae.config.scaling_factor + self._shift
        image = self.vae.decode(latent.to(self.vae.dtype), return_dict=False)[0].to(z.dtype)
        self._require_finite(image, z, "decoder")
        return image

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    def _require_finite(self, output: torch.Tensor, given: torch.Tensor, part: str) -> None:
        # Only float16 overflows for an input of sensible size, and to look makes the host wait for the device. A
        # non-finite input means that the sampler diverged, which is reported there.
        if self.vae.dtype != torch.float16:
            return
        if not torch.isfinite(output).all() and torch.isfinite(given).all():
            name = str(self.vae.dtype).removeprefix("torch.")
            raise RestoreError(
                f"vae_dtype must be float32 or bfloat16, got {name}, in which the {part} overflowed (NaN or infinite "
                "values); the network may keep its own precision"
            )


def vae_precision(vae_dtype: torch.dtype | str | None, dtype: torch.dtype) -> torch.dtype:
    """Return `vae_dtype`, by default the network's dtype, but float32 with float16."""
    if vae_dtype is None:
        return torch.float32 if dtype == torch.float16 else dtype
    return as_dtype(vae_dtype)


def load_vae(folder: str | Path, pickles: bool = False) -> nn.Module:
    """Load the autoencoder in a diffusers folder, one of AUTOENCODERS, in float32 on the CPU.

    A VQModel whose config.json has no scaling_factor gets 1, as it was trained (LDM did not scale the latents of its
    quantised models), not diffusers' later default of 0.18215. pickles: see weights.load_part. Raises
    RestoreError for other networks and if weights are missing or do not fit.
    """
    import diffusers

    folder = Path(folder).expanduser()
    config = disk.read_json(folder / "config.json", required=True)
    name = config.get("_class_name")
    if name not in AUTOENCODERS:
        raise RestoreError(f"{folder} must hold an autoencoder ({', '.join(AUTOENCODERS)}), got a {name}")
    with hide_progress_bars():
        vae = load_part(getattr(diffusers, name), folder, "", pickles=pickles)
    if name == "VQModel" and "scaling_factor" not in config:
        vae.register_to_config(scaling_factor=1.0)
    return vae
