"""What a diffusion model is trained on: pixels, or the latents of an autoencoder. Each is a source of batches x_0.

`labels`: class names, in the order of their numbers, () without classes; the number after the last means none.
`held_out`: x_0 that training never sees, by label ("" without). `batch(step, generator)`: x_0 of batch `step` and
class numbers or None. `backbone(network, **options)`: the network as a prior on this source's x. For the model card
there are `training_x0(label)`, with classes `mean_image`, and, as images, `training_images` and `held_out_images`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers import UNet2DModel
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file

from operators import RestoreError
from restore import disk
from restore.backbones.adm import ADM
from restore.backbones.autoencoder import load_vae
from restore.backbones.latent import LatentDiffusion
from restore.backbones.weights import align_memory
from restore.training import dataset
from restore.training.precision import native_bf16

MOST_HELD_OUT = 128
MOST_TRAINING = 8192  # of a set, where baselines and nearest images are computed


class Pixels:
    """Faces, photos or any other images, with a class for each set that has a label."""

    def __init__(self, config: DictConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.sets = dataset.load_sets(config.data, config.seed)
        self.labels = tuple(dict.fromkeys(one.label for one in self.sets if one.label is not None))
        self.size = config.model.sample_size
        for one in self.sets:
            if device.type == "cuda":  # there is room, and the augmentation is faster there
                one.training = one.training.to(device)
        self.counts = dataset.shares(self.sets, config.batch)
        if 0 in self.counts:
            name = self.sets[self.counts.index(0)].name
            raise RestoreError(f"batch={config.batch} leaves no place for images of data.sets.{name}")

    @property
    def held_out(self) -> dict[str, torch.Tensor]:
        found: dict[str, list[torch.Tensor]] = {}
        for one in self.sets:
            chosen = one.held_out[:: max(1, len(one.held_out) // MOST_HELD_OUT)]
            found.setdefault(one.label or "", []).append(dataset.reduced(chosen, self.size, one.cut))
        return {label: torch.cat(images) for label, images in found.items()}

    def training_x0(self, label: str) -> torch.Tensor:
        """Those of one label ("": without) as they are held out: without augmentation, on the CPU."""
        return torch.cat([self._plain(one) for one in self.sets if (one.label or "") == label])

    @property
    def mean_image(self) -> torch.Tensor:
        """(3, size, size): of all classes, each as often as batches have it. The best guess without a label."""
        weighted = [count * self._plain(one).mean(0) for one, count in zip(self.sets, self.counts, strict=True)]
        return torch.stack(weighted).sum(0) / sum(self.counts)

    def _plain(self, one: dataset.ImageSet) -> torch.Tensor:
        images = one.training.cpu()
        return dataset.reduced(images[:: max(1, len(images) // MOST_TRAINING)], self.size, one.cut)

    @property
    def training_images(self) -> torch.Tensor:
        return torch.cat([self.training_x0(label) for label in self.held_out])

    @property
    def held_out_images(self) -> torch.Tensor:
        return torch.cat(list(self.held_out.values()))

    def batch(self, step: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        x0, labels = [], []
        for one, count in zip(self.sets, self.counts, strict=True):
            chosen = dataset.batch_indices(len(one.training), count, step, self.config.seed).to(one.training.device)
            images = one.training[chosen].to(self.device)
            x0.append(dataset.augment(images, self.size, generator, self.config.data.augment, one.cut))
            labels += [len(self.labels) if one.label is None else self.labels.index(one.label)] * count
        x0 = torch.cat(x0)
        if not self.labels:
            return x0, None
        # Timesteps are stratified over the batch: its order must not be that of the classes.
        order = torch.randperm(len(x0), generator=generator, device=self.device)
        return x0[order], torch.tensor(labels, device=self.device)[order]

    def backbone(self, network: UNet2DModel, **options) -> ADM:
        return ADM(network, **options)


class Latents:
    """The latents of augmented images, encoded once and kept in `out`/latents.safetensors; see `encode_all`."""

    labels = ()

    def __init__(self, config: DictConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        if not Path(config.autoencoder).is_dir():
            raise RestoreError(f"autoencoder={config.autoencoder} is not a folder with a trained autoencoder")
        self.vae = align_memory(load_vae(config.autoencoder)).requires_grad_(False)
        if self.vae.config.latent_channels != config.model.in_channels:
            raise RestoreError(
                f"the autoencoder makes latents of {self.vae.config.latent_channels} channels, but model.in_channels "
                f"is {config.model.in_channels}"
            )
        self.vae.register_to_config(scaling_factor=1.0)
        path, wanted = Path(config.out) / "latents.safetensors", self._identity()
        if not path.is_file() or _identity_of(path) != wanted:
            latents = encode_all(config, self.vae.to(device), device)
            disk.write_safetensors(disk.make_folder(path.parent) / path.name, latents, {"made of": wanted})
        latents = load_file(path)
        self.factor = 1 / float(latents["training"].float().std())
        self.vae.register_to_config(scaling_factor=self.factor)
        self.training = latents["training"].to(device)
        self.held_out = {"": latents["held_out"].float() * self.factor}

    def _identity(self) -> str:
        # Not of the decoder, which may have been trained further.
        encoding = (
            p for name, p in self.vae.named_parameters() if not name.startswith(("decoder.", "post_quant_conv."))
        )
        total = float(sum(p.double().abs().sum() for p in encoding))
        wanted = {"data": OmegaConf.to_container(self.config.data), "seed": self.config.seed, "weights": total}
        return json.dumps(wanted, sort_keys=True)

    def training_x0(self, label: str) -> torch.Tensor:
        """Scaled latents of the training images, on the CPU."""
        return self.training[:: max(1, len(self.training) // MOST_TRAINING)].cpu().float() * self.factor

    @property
    def training_images(self) -> torch.Tensor:
        """The images themselves: samples are compared with them after decoding."""
        return self._images("training")

    @property
    def held_out_images(self) -> torch.Tensor:
        return self._images("held_out")

    def _images(self, part: str) -> torch.Tensor:
        (images,) = dataset.load_sets(self.config.data, self.config.seed)
        return dataset.reduced(getattr(images, part), self.config.data.stored_size)

    def batch(self, step: int, generator: torch.Generator) -> tuple[torch.Tensor, None]:
        chosen = dataset.batch_indices(len(self.training), self.config.batch, step, self.config.seed)
        return self.training[chosen.to(self.device)].float() * self.factor, None

    def backbone(self, network: UNet2DModel, **options) -> LatentDiffusion:
        return LatentDiffusion(network, copy.deepcopy(self.vae), **options)


def _identity_of(path: Path) -> str | None:
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("made of")


@torch.no_grad()
def encode_all(config: DictConfig, vae, device: torch.device, batch: int = 64) -> dict[str, torch.Tensor]:
    """Unscaled latents: `training` fp16 (N · data.copies, C, h, w), `held_out` fp32 of the images as they are.

    Every copy is another augmentation (mirrored, shifted, recoloured) and another sample of the encoder's posterior;
    held-out ones are its mean.
    """
    (images,) = dataset.load_sets(config.data, config.seed)
    size, found, low = config.data.stored_size, [], config.precision != "fp32" and native_bf16()
    generator = torch.Generator(device).manual_seed(config.seed)
    for _ in range(config.data.copies):
        for chunk in images.training.split(batch):
            x = dataset.augment(chunk.to(device), size, generator, config.data.augment)
            # bf16 rounds by less than the posterior's own noise.
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
                posterior = vae.encode(x).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            n = torch.randn(mean.shape, generator=generator, device=device)
            found.append((mean + std * n).half().cpu())
    held_out = [vae.encode(chunk.to(device)).latent_dist.mean.cpu() for chunk in _floats(images.held_out, size, batch)]
    return {"training": torch.cat(found).contiguous(), "held_out": torch.cat(held_out).contiguous()}


def _floats(images: torch.Tensor, size: int, batch: int):
    return (dataset.reduced(chunk, size) for chunk in images.split(batch))
