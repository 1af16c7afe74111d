"""What is measured of a trained network for its model card: `restore train CONFIG --card FOLDER`."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from omegaconf import DictConfig

from restore import disk
from restore.backbones.autoencoder import load_vae
from restore.restorer import Restorer, load
from restore.training import autoencoder, dataset
from restore.training.diffusion import HELD_OUT_LEVELS, Diffusion, write_grid
from restore.training.train import build


def measure(config: DictConfig, weights: str | Path, folder: str | Path, samples: int = 16, steps: int = 250) -> dict:
    """Write `folder`/card.json and a picture about the model in `weights`; returns what card.json holds.

    Diffusion models: parameters; held-out mean squared error of eps per timestep (per class, with and without the
    label) against two baselines; distances of `samples` samples and of held-out images to their nearest training
    image, root mean squared on [-1, 1], mirrored images included; samples.png. A prior that memorises has samples much
    nearer than held-out images. Where there is an autoencoder: PSNR and, where lpips.weights are given, LPIPS of
    reconstructions, held-out ones and those of `card.folders`; of an autoencoder alone pairs.png too.
    """
    folder, device = Path(folder), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = build(config, device)
    if isinstance(kind, Diffusion):
        restorer = load(weights, device=str(device))
        network = restorer.backbone.network
        result = {
            "parameters": _count(network),
            "training_images": len(kind.source.training_images),
            "held_out_images": {label or "all": len(x0) for label, x0 in kind.source.held_out.items()},
            "held_out_eps_mse": _denoising(kind, network),
            **_samples(kind, restorer, folder, samples, steps),
        }
        if config.kind == "latents":
            result["autoencoder_parameters"] = _count(restorer.backbone.vae)
            result["scaling_factor"] = restorer.backbone.vae.config.scaling_factor
            result["reconstruction"] = _reconstructions(config, restorer.backbone.vae, device)
    else:
        vae = load_vae(weights).to(device)
        kind.model.vae = vae
        kind.picture(kind.model, folder / "pairs.png")
        result = {"parameters": _count(vae), "reconstruction": _reconstructions(config, vae, device)}
    disk.write_json(folder / "card.json", result)
    return result


def _count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _denoising(kind: Diffusion, network: torch.nn.Module) -> dict:
    """Errors at HELD_OUT_LEVELS: the baselines of each class, and the model."""
    alpha_bar = kind.alpha_bar
    found = {
        "t": list(HELD_OUT_LEVELS),
        "noise_to_signal": [float(((1 - alpha_bar[t]) / alpha_bar[t]).sqrt()) for t in HELD_OUT_LEVELS],
    }
    errors = kind.held_out(network)["eps_mse"]
    # Without labels there is one mean image; a model that is not told the label has to beat that of all.
    mean_of_all = kind.source.mean_image if kind.source.labels else None
    for label, held_out in kind.source.held_out.items():
        training = kind.source.training_x0(label)
        of = f", {label}" if label else ""
        mean = training.mean(0)
        for t in HELD_OUT_LEVELS:
            a = float(alpha_bar[t])
            found.setdefault("mean image" + of, []).append(trivial_loss(mean, held_out, a))
            if mean_of_all is not None:
                found.setdefault("mean image of all" + of, []).append(trivial_loss(mean_of_all, held_out, a))
            found.setdefault("Wiener filter" + of, []).append(wiener_loss(training, held_out, a))
    for label, row in errors.items() if kind.source.labels else [("", errors)]:
        found["model" + (f", {label}" if label else "")] = [row[t] for t in HELD_OUT_LEVELS]
    return found


def _samples(kind: Diffusion, restorer: Restorer, folder: Path, n: int, steps: int) -> dict:
    classes = len(kind.source.labels)
    labels = [i % classes for i in range(n)] if classes else None
    images = restorer.generate(n, steps=steps, labels=labels, batch_size=8).cpu()
    write_grid(folder / "samples.png", images)
    training, held_out = kind.source.training_images, kind.source.held_out_images
    return {
        "nearest_training_image": {
            "samples": nearest(images, training),
            "held-out images": nearest(held_out[:: max(1, len(held_out) // 32)], training),
        },
        "samples": {"number": n, "steps": steps, "sampler": "DDPM"},
    }


def _reconstructions(config: DictConfig, vae: torch.nn.Module, device: torch.device) -> dict[str, dict[str, float]]:
    """Of held-out images and of each folder of `card.folders`, at most card.limit each, at the trained size."""
    lpips, size = autoencoder.load_lpips(config, device), config.data.stored_size
    sets = {"held-out images": dataset.split(dataset.list_images(config.data.folder), config.data.held_out_every)[1]}
    sets |= {Path(path).name: dataset.list_images(path) for path in config.card.folders}
    found = {}
    for name, files in sets.items():
        images = dataset.reduced(dataset.load(files[: config.card.limit], size), size)
        found[name] = {"images": len(images), **autoencoder.measure(vae, images, device, lpips)}
    return found


def trivial_loss(mean: torch.Tensor, held_out: torch.Tensor, a: float) -> float:
    """Error of eps when x0_hat is the mean training image, or when eps_hat is 0, whichever is less."""
    error = float(((held_out - mean) ** 2).mean())
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
    """What card.json measured, as Markdown: held-out errors by noise level, reconstructions."""
    lines = []
    if "held_out_eps_mse" in card:
        losses = dict(card["held_out_eps_mse"])
        levels, ratios = losses.pop("t"), losses.pop("noise_to_signal")
        lines += [" | ".join(["t", "noise / signal", *losses]), " | ".join(["---"] * (2 + len(losses)))]
        for i, t in enumerate(levels):
            lines.append(" | ".join([str(t), f"{ratios[i]:.2f}", *(f"{values[i]:.5f}" for values in losses.values())]))
    if "reconstruction" in card:
        rows = card["reconstruction"]
        names = list(next(iter(rows.values())))
        lines += ["", " | ".join(["reconstruction", *names]), " | ".join(["---"] * (1 + len(names)))]
        lines += [" | ".join([name, *(f"{row[key]:.4g}" for key in names)]) for name, row in rows.items()]
    return "\n".join(lines).strip()
