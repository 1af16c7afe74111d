"""What is measured of a trained prior for its model card: `restore train CONFIG --card FOLDER`."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch.nn.functional import interpolate

from restore import atomic
from restore.restorer import load
from restore.training import dataset
from restore.training.train import HELD_OUT_LEVELS, held_out_loss, write_grid


def measure(config: DictConfig, weights: str | Path, folder: str | Path, samples: int = 16, steps: int = 250) -> dict:
    """Write `folder`/card.json and `folder`/samples.png about the model in `weights`; returns what card.json holds.

    card.json: parameters; held-out mean squared error of eps per timestep against two baselines; distances
    of unconditional samples and of held-out faces to their nearest training image, root mean squared on
    [-1, 1], mirrored images included. A prior that memorises has samples much nearer than held-out faces.
    """
    folder = Path(folder)
    size = config.model.sample_size
    training_files, held_out_files = dataset.split(dataset.list_images(config.data.folder), config.data.held_out_every)
    training = _reduced(training_files, config.data.stored_size, size)
    held_out = _reduced(held_out_files, config.data.stored_size, size)
    restorer = load(weights)
    network = restorer.backbone.network
    alpha_bar = restorer.backbone.schedule.alphas_cumprod

    model = held_out_loss(network, held_out, alpha_bar, restorer.device)
    images = restorer.generate(samples, steps=steps, batch_size=8).cpu()
    write_grid(folder / "samples.png", images)
    result = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "training_images": len(training),
        "held_out_images": len(held_out),
        "held_out_eps_mse": {
            "t": list(HELD_OUT_LEVELS),
            "noise_to_signal": [float(((1 - alpha_bar[t]) / alpha_bar[t]).sqrt()) for t in HELD_OUT_LEVELS],
            "mean image": [trivial_loss(training, held_out, float(alpha_bar[t])) for t in HELD_OUT_LEVELS],
            "Wiener filter": [wiener_loss(training, held_out, float(alpha_bar[t])) for t in HELD_OUT_LEVELS],
            "model": [model[t] for t in HELD_OUT_LEVELS],
        },
        "nearest_training_image": {
            "samples": nearest(images, training),
            "held-out faces": nearest(held_out[:: max(1, len(held_out) // 32)], training),
        },
        "samples": {"number": samples, "steps": steps, "sampler": "DDPM"},
    }
    atomic.write_json(folder / "card.json", result)
    return result


def _reduced(files: list[Path], stored_size: int, size: int) -> torch.Tensor:
    return interpolate(dataset.load(files, stored_size).float() / 127.5 - 1, size=(size, size), mode="area")


def trivial_loss(training: torch.Tensor, held_out: torch.Tensor, a: float) -> float:
    """Error of eps when x0_hat is the mean training image, or when eps_hat is 0, whichever is less."""
    error = float(((held_out - training.mean(0)) ** 2).mean())
    return min(1.0, a / (1 - a) * error)


def wiener_loss(training: torch.Tensor, held_out: torch.Tensor, a: float) -> float:
    """Error of eps of the best linear shift-invariant denoiser: mean and power spectrum of the training set."""
    mean = training.mean(0)
    spectrum = (torch.fft.fft2(training - mean, norm="ortho").abs() ** 2).mean(0)
    eps = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0))
    x_t = math.sqrt(a) * held_out + math.sqrt(1 - a) * eps
    gain = math.sqrt(a) * spectrum / (a * spectrum + 1 - a)
    x0_hat = mean + torch.fft.ifft2(gain * torch.fft.fft2(x_t - math.sqrt(a) * mean)).real
    eps_hat = (x_t - math.sqrt(a) * x0_hat) / math.sqrt(1 - a)
    return float(((eps_hat - eps) ** 2).mean())


def nearest(images: torch.Tensor, training: torch.Tensor) -> dict[str, float]:
    """Least, median and greatest root mean squared distance to the nearest training image or its mirror image."""
    both = torch.cat([training, training.flip(-1)]).flatten(1)
    distances = torch.cdist(images.flatten(1), both).min(1).values / both.shape[1] ** 0.5
    return {name: float(getattr(distances, name)()) for name in ("min", "median", "max")}


def table(card: dict) -> str:
    """The held-out errors of card.json as a Markdown table."""
    losses = card["held_out_eps_mse"]
    lines = ["t | noise / signal | mean image | Wiener filter | this model", "---|---|---|---|---"]
    for i, t in enumerate(losses["t"]):
        values = [losses[name][i] for name in ("mean image", "Wiener filter", "model")]
        cells = [str(t), f"{losses['noise_to_signal'][i]:.2f}", *(f"{value:.4f}" for value in values)]
        lines.append(" | ".join(cells))
    return "\n".join(lines)
