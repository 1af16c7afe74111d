"""An AutoencoderKL as something to train (Rombach et al. 2022, sec. 3.1): L1, perceptual, KL and adversarial terms."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from omegaconf import DictConfig, OmegaConf
from torch import nn

from operators import RestoreError
from restore.backbones.autoencoder import load_vae
from restore.backbones.weights import save_network
from restore.metrics.single import LPIPS, LPIPS_NETS, psnr
from restore.training import dataset
from restore.training.diffusion import write_grid
from restore.training.sources import Pixels


class Reconstruction(nn.Module):
    """x (B, 3, H, W) and noise like its latent -> the decoded sample, the posterior's mean and log-variance."""

    def __init__(self, vae: AutoencoderKL, frozen_encoder: bool = False) -> None:
        super().__init__()
        self.vae, self.frozen_encoder = vae, frozen_encoder
        for part in (vae.encoder, vae.quant_conv) if frozen_encoder else ():
            part.requires_grad_(False)

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_encoder):
            posterior = self.vae.encode(x).latent_dist
        x_hat = self.vae.decode(posterior.mean + posterior.std * noise).sample
        return x_hat, posterior.mean, posterior.logvar


class Autoencoder:
    """The networks and losses of an autoencoder's training.

    The discriminator judges patches (Isola et al. 2017) by the hinge loss, from step discriminator.start on.
    Raises RestoreError for a crop that the network or its images do not allow.
    """

    def __init__(self, config: DictConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.f, self.crop = 2 ** (len(config.model.block_out_channels) - 1), config.get("crop")
        size = config.model.sample_size
        if self.crop is not None and not (0 < self.crop <= size and self.crop % self.f == 0):
            raise RestoreError(f"crop={self.crop} must be a multiple of {self.f} and at most {size}")
        self.source = Pixels(config, device)
        self.model = Reconstruction(build_autoencoder(config), config.get("frozen_encoder", False))
        self.lpips = load_lpips(config, device)
        self.starts = config.discriminator.start
        self.adversary = None if self.starts is None else PatchDiscriminator(config.discriminator.channels)
        self.description = {}

    def loss(self, forward, step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict, tuple]:
        """The weighted loss of batch `step`, its parts to be logged, and (x, x_hat) for the adversary."""
        config = self.config
        x, _ = self.source.batch(step, generator)
        if self.crop is not None:
            x = dataset.cropped(x, self.crop, generator)
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
        if self.adversary is not None and step >= self.starts:
            terms["fooling"] = -self.adversary(x_hat).mean()
            total = total + config.discriminator.weight * terms["fooling"]
        return total, {name: term.detach() for name, term in terms.items()}, (x, x_hat.detach())

    def adversary_loss(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Hinge loss of telling x from x_hat."""
        real, made = (self.adversary(images) for images in pair)
        return F.relu(1 - real).mean() + F.relu(1 + made).mean()

    def held_out(self, model: Reconstruction) -> dict:
        """PSNR of the posterior mean's reconstruction, and LPIPS where its weights are given."""
        return {"reconstruction": measure(model.vae, self.source.held_out[""], self.device, self.lpips)}

    def picture(self, model: Reconstruction, path: Path, n: int = 16) -> None:
        """Held-out images, each beside its reconstruction."""
        x = self.source.held_out[""][: n // 2]
        pairs = torch.stack([x, reconstruct(model.vae, x, self.device)], dim=1).flatten(0, 1)
        write_grid(path, pairs.clamp(-1, 1))

    def save(self, model: Reconstruction, folder: Path) -> None:
        """A diffusers folder, weights in fp16."""
        save_network(model.vae, folder, dtype="fp16")


class PatchDiscriminator(nn.Sequential):
    """Judges overlapping patches of 70 pixels: images (B, 3, H, W) to scores (B, 1, H / 8 - 2, W / 8 - 2)."""

    def __init__(self, channels: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        # Group normalisation, as the rest of the network: a result does not depend on its company in the batch.
        for i, stride in ((1, 2), (2, 2), (4, 1)):
            layers += [nn.Conv2d(i * channels, 2 * i * channels, 4, stride, 1, bias=False)]
            layers += [nn.GroupNorm(8, 2 * i * channels), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * channels, 1, 4, 1, 1))


def build_autoencoder(config: DictConfig) -> AutoencoderKL:
    """The network of `config.model`, from the folder `config.init` if there is one. Raises RestoreError."""
    model = AutoencoderKL(**OmegaConf.to_container(config.model))
    if config.init is None:
        return model
    start = load_vae(config.init).state_dict()
    if {k: v.shape for k, v in start.items()} != {k: v.shape for k, v in model.state_dict().items()}:
        raise RestoreError(f"the weights in init={config.init} do not have the shapes that `model` describes")
    model.load_state_dict(start)
    return model


def load_lpips(config: DictConfig, device: torch.device | str) -> LPIPS | None:
    """The perceptual distance of `config.lpips`, None without its weights. Raises RestoreError for a wrong file."""
    if config.lpips.weights is None:
        return None
    return LPIPS(config.lpips.net, {LPIPS_NETS[config.lpips.net]: config.lpips.weights}, device=str(device))


@torch.no_grad()
def reconstruct(vae: nn.Module, images: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Decoded posterior means of images (N, 3, H, W), on the CPU, clamped to [-1, 1]."""
    found = [vae.decode(vae.encode(x.to(device)).latent_dist.mean).sample.float().cpu() for x in images.split(16)]
    return torch.cat(found).clamp(-1, 1)


def measure(vae: nn.Module, images: torch.Tensor, device: torch.device | str, lpips: LPIPS | None) -> dict[str, float]:
    """Means over images (N, 3, H, W) in [-1, 1] of PSNR in dB and, where it is given, LPIPS of their reconstruction."""
    x_hat = reconstruct(vae, images, device)
    found = {"psnr": float(psnr(x_hat, images).mean())}
    if lpips is not None:
        pairs = zip(x_hat.split(16), images.split(16), strict=True)
        found[f"lpips_{lpips.net}"] = float(torch.cat([lpips(a, b) for a, b in pairs]).mean())
    return found
