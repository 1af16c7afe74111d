"""Training of a diffusion model: its network, its loss, what is measured and saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DModel
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from operators import RestoreError
from restore import disk
from restore.backbones.adm import load_network, run_network
from restore.backbones.base import CONVERSIONS, PREDICTION_TYPES
from restore.backbones.schedule import Schedule
from restore.backbones.sizes import Sized
from restore.backbones.weights import CONFIG
from restore.images import grids, io
from restore.samplers.generate import generate
from restore.samplers.noise import ImageNoise
from restore.training.sources import Latents, Pixels

HELD_OUT_LEVELS = (10, 50, 100, 200, 300, 450, 600, 800)


class Diffusion:
    """A UNet2DModel on the x_0 of a source; it predicts `config.prediction_type` and optionally the variance."""

    discriminator, discriminator_start = None, 0

    def __init__(self, config: DictConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.source = {"pixels": Pixels, "latents": Latents}[config.kind](config, device)
        self.model = build_unet(config, len(self.source.labels))
        self.schedule = OmegaConf.to_container(config.schedule)
        self.alpha_bar = Schedule.from_config(self.schedule).alphas_cumprod
        self.description = {"labels": list(self.source.labels)} if self.source.labels else {}
        self.facts = {"schedule": self.schedule, "prediction_type": config.prediction_type, "patch": config.patch}
        self.facts |= self.source.facts

    def loss(self, forward, step: int, generator: torch.Generator) -> tuple[Tensor, dict, None]:
        """Return the weighted loss of batch `step`, and its parts for the log. forward: the model, maybe compiled."""
        config, device = self.config, self.device
        alpha_bar = self.alpha_bar.to(device)
        x0, labels = self.source.batch(step, generator)
        eps = torch.randn(x0.shape, generator=generator, device=device)
        # Stratified timesteps: one per equal slice of the range, which lowers the gradient's variance.
        n = len(x0)
        slots = (torch.arange(n, device=device) + torch.rand(n, generator=generator, device=device)) / n
        t = place_times(slots, alpha_bar, config.denoising)
        if labels is not None:
            dropped = torch.rand(n, generator=generator, device=device) < config.label_dropout
            labels = torch.where(dropped, len(self.source.labels), labels)
        a = alpha_bar[t].float().view(-1, 1, 1, 1)
        x_t = (a.sqrt() * x0 + (1 - a).sqrt() * eps).contiguous(memory_format=torch.channels_last)
        out = run_network(forward, x_t, t, labels, config.patch).float()
        eps_hat, v = self.split_output(out, x_t, a.sqrt(), (1 - a).sqrt())
        simple, vlb = hybrid_loss(eps_hat, v, x0, eps, t, alpha_bar, weigh_levels(alpha_bar, config))
        logged = {"eps_loss": simple.detach()} | ({} if v is None else {"vlb_bits": vlb.detach()})
        return simple + config.vlb_weight * vlb, logged, None

    def split_output(self, out: Tensor, x_t: Tensor, alpha, sigma) -> tuple[Tensor, Tensor | None]:
        """Return the network's output as predicted noise and the raw learned variance, or None."""
        out, v = out.chunk(2, dim=1) if out.shape[1] == 2 * x_t.shape[1] else (out, None)
        return CONVERSIONS[PREDICTION_TYPES[self.config.prediction_type]](out, x_t, alpha, sigma)[0], v

    def measure_held_out(self, model: nn.Module) -> dict:
        """Return mean squared errors of eps per timestep; with classes per label, with and without it."""
        labels, errors = self.source.labels, {}
        for label, x0 in self.source.held_out.items():
            if not labels:
                return {"eps_mse": self.measure_errors(model, x0)}
            if label:
                errors[label] = self.measure_errors(model, x0, labels.index(label))
            errors[f"{label or 'others'} without label"] = self.measure_errors(model, x0, len(labels))
        return {"eps_mse": errors}

    @torch.no_grad()
    def measure_errors(self, model: nn.Module, x0: Tensor, label: int | None = None) -> dict[int, float]:
        """Return the mean squared error of eps per timestep, on fixed noise, over x0 (N, C, H, W)."""
        errors = {}
        for t in HELD_OUT_LEVELS:
            generator, total = torch.Generator().manual_seed(t), 0.0
            alpha, sigma = math.sqrt(float(self.alpha_bar[t])), math.sqrt(1 - float(self.alpha_bar[t]))
            for chunk in x0.split(32):
                eps = torch.randn(chunk.shape, generator=generator)
                x_t = (alpha * chunk + sigma * eps).to(self.device)
                times = torch.full((len(chunk),), t, device=self.device)
                labels = None if label is None else torch.full_like(times, label)
                out = run_network(model, x_t, times, labels, self.config.patch).float()
                eps_hat, _ = self.split_output(out, x_t, alpha, sigma)
                total += float(((eps_hat.cpu() - eps) ** 2).mean(dim=(1, 2, 3)).sum())
            errors[t] = total / len(x0)
        return errors

    def make_backbone(self, model: nn.Module):
        """Return a frozen prior with these weights."""
        options = {"schedule": self.schedule or "linear", "prediction_type": self.config.prediction_type}
        if self.config.patch > 1:
            options["patch"] = self.config.patch
        if self.source.labels:
            options |= {"labels": self.source.labels, "null_class": len(self.source.labels)}
        return self.source.make_backbone(model, **options)

    def write_samples(self, model: nn.Module, path: Path, n: int = 16, steps: int = 50) -> None:
        """Write a grid of DDIM samples, the classes in turn, always from the same noise, so that grids compare."""
        backbone = self.make_backbone(model)
        noise = ImageNoise([(0, str(i), 0) for i in range(n)], backbone.device)
        prior = Sized(backbone, *[backbone.resolution * backbone.downscale] * 2)
        classes = len(self.source.labels)
        condition = torch.arange(n, device=self.device) % classes if classes else None
        write_grid(path, generate(prior, n, steps=steps, noise=noise, ddim_eta=0.0, condition=condition))

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a folder that `restore.load` reads, weights in fp16."""
        self.make_backbone(model).save(folder, dtype="fp16")


def place_times(slots: Tensor, alpha_bar: Tensor, denoising: Mapping | None) -> Tensor:
    """Return the timesteps (n,) of positions (n,) in [0, 1): evenly over all of the schedule.

    denoising: {share, low, high}: the first `share` of the positions is spread evenly in log over the noise levels
        sigma / alpha from `low` to `high` instead, where photos are denoised.
    """
    if not denoising:
        return (slots * len(alpha_bar)).long()
    levels = ((1 - alpha_bar) / alpha_bar).sqrt().log()
    low, high, share = math.log(denoising.low), math.log(denoising.high), denoising.share
    near = torch.searchsorted(levels, (low + (high - low) * slots / share).to(levels))
    spread = ((slots - share) / (1 - share) * len(alpha_bar)).long() if share < 1 else near
    return torch.where(slots < share, near, spread).clamp(0, len(alpha_bar) - 1)


def weigh_levels(alpha_bar: Tensor, config: DictConfig) -> Tensor:
    """Return the weight of the noise error at every timestep, (T,).

    `denoising.weight` k: 1 + k sigma/alpha. The error of a trained prior of photos is close to 1/(1 + 33 sigma/alpha),
    so that with k = 33 every level counts in decibels alike, where a plain mean is that of the smallest noise alone.
    Otherwise min(SNR, snr_gamma)/SNR (Hang et al. 2023, Min-SNR) plus min(1/SNR, high_noise_weight): without a bound
    the sum 1 + 1/SNR is the weight of v-prediction (Salimans & Ho 2022, SNR + 1 on x0). The second part teaches
    colours and lighting, whose error, 1/SNR times the noise error, would otherwise be lost in the mean.
    """
    snr = alpha_bar / (1 - alpha_bar)
    if config.denoising and "weight" in config.denoising:
        return 1 + config.denoising.weight * snr.rsqrt()
    return (config.snr_gamma / snr).clamp(max=1) + (1 / snr).clamp(max=config.high_noise_weight)


def hybrid_loss(
    eps_hat: Tensor, v: Tensor | None, x0: Tensor, eps: Tensor, t: Tensor, alpha_bar: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (noise error weighted by weight (T,), variational term), both means over the batch.

    The variational term is L_{t-1} of Nichol & Dhariwal 2021, eq. 15-16, in bits per dimension, with the predicted
    mean held fixed so that it trains only the variance channels; at t = 0 the Gaussian negative log-likelihood of x0
    replaces the discretised one. It is 0 if v is None.
    """
    simple = (weight[t].float() * ((eps_hat - eps) ** 2).mean(dim=(1, 2, 3))).mean()
    if v is None:
        return simple, simple.new_zeros(())

    previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    beta = 1 - alpha_bar / previous
    posterior_variance = beta * (1 - previous) / (1 - alpha_bar)
    posterior_variance[0] = posterior_variance[1]
    coef_x0 = beta * previous.sqrt() / (1 - alpha_bar)
    a, c, lo, hi = (
        values[t].float().view(-1, 1, 1, 1) for values in (alpha_bar, coef_x0, posterior_variance.log(), beta.log())
    )
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    x0_hat = ((x_t - (1 - a).sqrt() * eps_hat.detach()) / a.sqrt()).clamp(-1, 1)
    # The two means differ only through their x0 term: mean = c1 x0 + c2 x_t.
    squared_gap = (c * (x0 - x0_hat)) ** 2
    log_var = (v + 1) / 2 * hi + (1 - v) / 2 * lo
    kl = 0.5 * (log_var - lo + torch.exp(lo - log_var) + squared_gap * torch.exp(-log_var) - 1)
    nll = 0.5 * (log_var + squared_gap * torch.exp(-log_var) + torch.log(torch.tensor(2 * torch.pi)))
    term = torch.where((t == 0).view(-1, 1, 1, 1), nll, kl).mean(dim=(1, 2, 3)) / torch.log(torch.tensor(2.0))
    return simple, term.mean()


def write_grid(path: Path, images: Tensor) -> None:
    """Write a square number of images (N, 3, H, W) in [-1, 1] as one picture."""
    side = math.isqrt(len(images))
    rows = [list(images[r * side : (r + 1) * side].cpu()) for r in range(side)]
    disk.make_folder(path.parent)
    io.write_image(path, io.to_tensor(grids.draw_grid(rows, [""] * side))[0])


def build_unet(config: DictConfig, labels: int = 0) -> UNet2DModel:
    """Build the network of `config.model`, with the weights in the folder `config.init` if there is one.

    labels: number of classes; one more is the null class. Weights without classes may start a network with classes:
    their embedding is then 0, so that the first output is the same for every class.
    Raises RestoreError if the folder holds no model, or weights of other shapes.
    """
    classes = {"num_class_embeds": labels + 1} if labels else {}
    model = UNet2DModel(**OmegaConf.to_container(config.model), **classes)
    if config.init is None:
        return model
    folder = Path(config.init)
    folder = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (folder / CONFIG).exists():
        raise RestoreError(f"init must be a folder with config.json and safetensors weights, got init={config.init}")
    state = load_network(folder)[0].state_dict()
    if labels and "class_embedding.weight" not in state:
        state["class_embedding.weight"] = torch.zeros_like(model.class_embedding.weight)
    return load_initial_state(model, state, config.init)


def load_initial_state(model: nn.Module, state: dict[str, Tensor], init: str) -> nn.Module:
    """Load weights into the model and return it. Raises RestoreError if their shapes are not the model's."""
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in model.state_dict().items()}:
        raise RestoreError(f"the weights must have the shapes that `model` describes, got others in init={init}")
    model.load_state_dict(state)
    return model
