"""Training of an AutoencoderKL (Rombach et al. 2022, sec. 3.1): L1, perceptual, KL and adversarial terms."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from operators import RestoreError
from restore.backbones.autoencoder import load_vae
from restore.backbones.weights import save_network
from restore.metrics.single import LPIPS, LPIPS_NETS, psnr
from restore.training import dataset
from restore.training.diffusion import load_initial_state, write_grid
from restore.training.sources import Pixels


class Reconstruction(nn.Module):
    """x (B, 3, H, W) and noise of its latent's shape -> the decoded sample, the posterior's mean and log-variance."""

    def __init__(self, vae: AutoencoderKL, frozen_encoder: bool = False) -> None:
        super().__init__()
        self.vae, self.frozen_encoder = vae, frozen_encoder
        for part in (vae.encoder, vae.quant_conv) if frozen_encoder else ():
            part.requires_grad_(False)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_encoder):
            posterior = self.vae.encode(x).latent_dist
        x_hat = self.vae.decode(posterior.mean + posterior.std * noise).sample
        return x_hat, posterior.mean, posterior.logvar


class Autoencoder:
    """Networks and losses of an autoencoder's training.

    The discriminator judges patches (Isola et al. 2017) by the hinge loss, from step discriminator.start on.
    Raises RestoreError if the crop does not fit the network or its images.
    """

    def __init__(self, config: DictConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.f, self.crop = 2 ** (len(config.model.block_out_channels) - 1), config.get("crop")
        size = config.model.sample_size
        if self.crop is not None and not (0 < self.crop <= size and self.crop % self.f == 0):
            raise RestoreError(f"crop must be a multiple of {self.f} and at most {size}, got crop={self.crop}")
        self.source = Pixels(config, device)
        self.model = Reconstruction(build_autoencoder(config), config.get("frozen_encoder", False))
        self.lpips = load_lpips(config, device)
        self.discriminator_start, channels = config.discriminator.start, config.discriminator.channels
        self.discriminator = None if self.discriminator_start is None else PatchDiscriminator(channels)
        self.description, self.facts = {}, {}

    def loss(self, forward, step: int, generator: torch.Generator) -> tuple[Tensor, dict, tuple]:
        """Return the weighted loss of batch `step`, its parts for the log, and (x, x_hat) for the discriminator."""
        config = self.config
        x, _ = self.source.batch(step, generator)
        if self.crop is not None:
            x = dataset.crop_randomly(x, self.crop, generator)
        x = x.contiguous(memory_format=torch.channels_last)
        shape = (len(x), config.model.latent_channels, x.shape[-2] // self.f, x.shape[-1] // self.f)
        noise = torch.randn(shape, generator=generator, device=self.device)
        x_hat, mean, logvar = (part.float() for part in forward(x, noise))
        terms = {"l1": (x_hat - x).abs().mean()}
        terms["kl"] = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        total = terms["l1"] + config.kl_weight * terms["kl"]
        if self.lpips is not None:
            terms["lpips"] = self.lpips.model(x_hat, x).mean()
            total = total + config.lpips.weight * terms["lpips"]
        if self.discriminator is not None and step >= self.discriminator_start:
            terms["fooling"] = -self.discriminator(x_hat).mean()
            total = total + config.discriminator.weight * terms["fooling"]
        return total, {name: term.detach() for name, term in terms.items()}, (x, x_hat.detach())

    def discriminator_loss(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        """Return the hinge loss of distinguishing x from x_hat."""
        real, fake = (self.discriminator(images) for images in pair)
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()

    def measure_held_out(self, model: Reconstruction) -> dict:
        """Return PSNR of the posterior mean's reconstruction, and LPIPS if its weights are given."""
        x = self.source.held_out[""]
        return {"reconstruction": measure_reconstruction(model.vae, x, self.device, self.lpips)}

    def write_samples(self, model: Reconstruction, path: Path, n: int = 16) -> None:
        """Write held-out images, each beside its reconstruction."""
        x = self.source.held_out[""][: n // 2]
        write_grid(path, torch.stack([x, reconstruct(model.vae, x, self.device)], dim=1).flatten(0, 1))

    def save(self, model: Reconstruction, folder: Path) -> None:
        """Write a diffusers folder, weights in fp16."""
        save_network(model.vae, folder, dtype="fp16")


class PatchDiscriminator(nn.Sequential):
    """Judges overlapping patches of 70 pixels: images (B, 3, H, W) to scores (B, 1, H / 8 - 2, W / 8 - 2)."""

    def __init__(self, channels: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        # Group normalisation, as in the rest of the network: a result does not depend on the others in its batch.
        for i, stride in ((1, 2), (2, 2), (4, 1)):
            layers += [nn.Conv2d(i * channels, 2 * i * channels, 4, stride, 1, bias=False)]
            layers += [nn.GroupNorm(8, 2 * i * channels), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * channels, 1, 4, 1, 1))


def build_autoencoder(config: DictConfig) -> AutoencoderKL:
    """Build the network of `config.model`, with the weights in the folder `config.init` if there is one.

    Raises RestoreError if their shapes differ.
    """
    model = AutoencoderKL(**OmegaConf.to_container(config.model))
    if config.init is None:
        return model
    return load_initial_state(model, load_vae(config.init).state_dict(), config.init)


def load_lpips(config: DictConfig, device: torch.device | str) -> LPIPS | None:
    """Load the network of `config.lpips`, None without its weights. Raises RestoreError for a wrong file."""
    if config.lpips.weights is None:
        return None
    return LPIPS(config.lpips.net, {LPIPS_NETS[config.lpips.net]: config.lpips.weights}, device=str(device))


@torch.no_grad()
def reconstruct(vae: nn.Module, images: Tensor, device: torch.device | str) -> Tensor:
    """Return decoded posterior means of images (N, 3, H, W), on the CPU, clamped to [-1, 1]."""
    x_hat = [vae.decode(vae.encode(x.to(device)).latent_dist.mean).sample.float().cpu() for x in images.split(16)]
    return torch.cat(x_hat).clamp(-1, 1)


def measure_reconstruction(
    vae: nn.Module, images: Tensor, device: torch.device | str, lpips: LPIPS | None
) -> dict[str, float]:
    """Return means over images (N, 3, H, W) in [-1, 1] of the reconstruction's PSNR in dB and, if given, LPIPS."""
    x_hat = reconstruct(vae, images, device)
    means = {"psnr": float(psnr(x_hat, images).mean())}
    if lpips is not None:
        pairs = zip(x_hat.split(16), images.split(16), strict=True)
        means[f"lpips_{lpips.net}"] = float(torch.cat([lpips(a, b) for a, b in pairs]).mean())
    return means
