"""Measurements of a trained network for its model card: `restore train CONFIG --card FOLDER`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig

from restore import disk
from restore.backbones.autoencoder import load_vae
from restore.images.folder import check_owned
from restore.restorer import Restorer, load
from restore.training import autoencoder, dataset
from restore.training.diffusion import HELD_OUT_LEVELS, Diffusion, write_grid
from restore.training.train import KINDS


def write_card(
    config: DictConfig,
    weights: str | Path,
    folder: str | Path,
    samples: int = 16,
    steps: int = 250,
    overwrite: bool = False,
) -> dict:
    """Write `folder`/card.json and a picture about the model in `weights`; return the content of card.json.

    Diffusion models: parameters; held-out mean squared error of eps per timestep (per class, with and without the
    label) against two baselines; distances of `samples` samples, as large as the images of training, and of held-out
    images to their nearest training image, root mean squared on [-1, 1], mirrored images included; samples.png. A prior
    that memorises has samples much nearer than held-out images. With an autoencoder: PSNR and, if lpips.weights are
    given, LPIPS of reconstructions of held-out images and those of `card.folders`; of an autoencoder on its own
    pairs.png too.

    Raises RestoreError before it measures if a file would be replaced that no earlier card names, unless `overwrite`.
    """
    folder, device = Path(folder), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sidecar = folder / "card.json"
    files = [sidecar.name, "samples.png" if issubclass(KINDS[config.kind], Diffusion) else "pairs.png"]
    check_owned([folder / name for name in files], sidecar, sidecar, overwrite)
    kind = KINDS[config.kind](config, device)
    if isinstance(kind, Diffusion):
        restorer = load(weights, device=str(device))
        network = restorer.backbone.network
        card = {
            "parameters": network.num_parameters(),
            "training_images": len(kind.source.training_images),
            "held_out_images": {label or "all": len(x0) for label, x0 in kind.source.held_out.items()},
            "held_out_eps_mse": _measure_denoising(kind, network),
            **_measure_samples(kind, restorer, folder, samples, steps),
        }
        if config.kind == "latents":
            vae = restorer.backbone.vae
            card["autoencoder_parameters"] = vae.num_parameters()
            card["scaling_factor"] = vae.config.scaling_factor
            card["reconstruction"] = _measure_reconstructions(config, vae, device)
    else:
        vae = load_vae(weights).to(device)
        kind.model.vae = vae
        kind.write_samples(kind.model, folder / "pairs.png")
        card = {"parameters": vae.num_parameters(), "reconstruction": _measure_reconstructions(config, vae, device)}
    card = {"files": files, **card}
    disk.write_json(sidecar, card)
    return card


def _measure_denoising(kind: Diffusion, network: torch.nn.Module) -> dict:
    """Errors at HELD_OUT_LEVELS: the baselines of each class, and the model."""
    alpha_bar = [float(kind.alpha_bar[t]) for t in HELD_OUT_LEVELS]
    errors = {"t": list(HELD_OUT_LEVELS), "noise_to_signal": [math.sqrt((1 - a) / a) for a in alpha_bar]}
    for label, held_out in kind.source.held_out.items():
        training = kind.source.training_x0(label)
        suffix = f", {label}" if label else ""
        errors["mean image" + suffix] = [measure_mean_loss(training.mean(0), held_out, a) for a in alpha_bar]
        if kind.source.labels:  # a model that is not told the label has to beat the mean of all images
            mean = kind.source.mean_image
            errors["mean image of all" + suffix] = [measure_mean_loss(mean, held_out, a) for a in alpha_bar]
        errors["Wiener filter" + suffix] = [measure_wiener_loss(training, held_out, a) for a in alpha_bar]
    measured = kind.measure_held_out(network)["eps_mse"]
    for label, row in measured.items() if kind.source.labels else [("", measured)]:
        errors["model" + (f", {label}" if label else "")] = [row[t] for t in HELD_OUT_LEVELS]
    return errors


def _measure_samples(kind: Diffusion, restorer: Restorer, folder: Path, n: int, steps: int) -> dict:
    classes = len(kind.source.labels)
    labels = [i % classes for i in range(n)] if classes else None
    training, held_out = kind.source.training_images, kind.source.held_out_images
    size = tuple(training.shape[-2:])  # that of `crop`, if the network was trained on crops
    images = restorer.generate(n, steps=steps, labels=labels, batch_size=8, size=size).cpu()
    write_grid(folder / "samples.png", images)
    return {
        "nearest_training_image": {
            "samples": measure_nearest(images, training),
            "held-out images": measure_nearest(held_out[:: max(1, len(held_out) // 32)], training),
        },
        "samples": {"number": n, "steps": steps, "sampler": "DDPM"},
    }


def _measure_reconstructions(config: DictConfig, vae: torch.nn.Module, device: torch.device) -> dict[str, dict]:
    """Of held-out images and of each folder of `card.folders`, at most card.limit each, at the trained size."""
    lpips, size = autoencoder.load_lpips(config, device), config.data.stored_size
    sets = {"held-out images": dataset.list_held_out_files(config.data)}
    names = [Path(path).name for path in config.card.folders]
    for name, path in zip(names, config.card.folders, strict=True):
        sets[name if names.count(name) == 1 else path] = dataset.list_files(path)
    rows = {}
    for name, files in sets.items():
        images = dataset.to_float(dataset.load_squares(files[: config.card.limit], size), size)
        measured = autoencoder.measure_reconstruction(vae, images, device, lpips)
        rows[name] = {"images": len(images), **measured}
    return rows


def measure_mean_loss(mean: torch.Tensor, held_out: torch.Tensor, a: float) -> float:
    """Return the error of eps if x0_hat is the mean training image, or if eps_hat is 0, the lower of both."""
    error = float(((held_out - mean) ** 2).mean())
    return min(1.0, a / (1 - a) * error)


def measure_wiener_loss(training: torch.Tensor, held_out: torch.Tensor, a: float) -> float:
    """Return the error of eps of the best linear shift-invariant denoiser: the training set's mean and spectrum."""
    mean = training.mean(0)
    spectrum = (torch.fft.fft2(training - mean, norm="ortho").abs() ** 2).mean(0)
    eps = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0))
    x_t = math.sqrt(a) * held_out + math.sqrt(1 - a) * eps
    gain = math.sqrt(a) * spectrum / (a * spectrum + 1 - a)
    x0_hat = mean + torch.fft.ifft2(gain * torch.fft.fft2(x_t - math.sqrt(a) * mean)).real
    eps_hat = (x_t - math.sqrt(a) * x0_hat) / math.sqrt(1 - a)
    return float(((eps_hat - eps) ** 2).mean())


def measure_nearest(images: torch.Tensor, training: torch.Tensor) -> dict[str, float]:
    """Return min, median and max of the RMS distance to the nearest training image or its mirror image."""
    both = torch.cat([training, training.flip(-1)]).flatten(1)
    distances = torch.cdist(images.flatten(1), both).min(1).values / both.shape[1] ** 0.5
    return {name: float(getattr(distances, name)()) for name in ("min", "median", "max")}


def format_card(card: dict) -> str:
    """Return a card's held-out errors by noise level and its reconstructions as Markdown tables."""
    parts = []
    if "held_out_eps_mse" in card:
        losses = dict(card["held_out_eps_mse"])
        t, ratios = losses.pop("t"), losses.pop("noise_to_signal")
        rows = zip(t, ratios, *losses.values(), strict=True)
        rows = [[str(t), f"{ratio:.2f}", *(f"{value:.5f}" for value in values)] for t, ratio, *values in rows]
        parts.append(_format_table(["t", "noise / signal", *losses], rows))
    if "reconstruction" in card:
        sets = card["reconstruction"]
        rows = [[name, *(f"{value:.4g}" for value in row.values())] for name, row in sets.items()]
        parts.append(_format_table(["reconstruction", *next(iter(sets.values()))], rows))
    return "\n\n".join(parts)


def _format_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(" | ".join(row) for row in [heads, ["---"] * len(heads), *rows])
