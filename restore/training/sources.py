"""Data of a diffusion model: pixels, or the latents of an autoencoder. Each is a source of batches x_0.

`labels`: class names, in the order of their indices, () without classes; the index after the last is the null class.
`held_out`: x_0 that training never sees, by label ("" without). `batch(step, generator)`: x_0 of batch `step` and
class indices or None. `make_backbone(network, **options)`: the network as a prior on this source's x. `facts`: what
x_0 depends on beside the images, which must stay when a run is continued. For the model card: `training_x0(label)`,
with classes `mean_image`, and, as images, `training_images` and `held_out_images`.
"""

from __future__ import annotations

import copy
import hashlib
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
from restore.backbones.precision import has_native_bf16
from restore.backbones.weights import align_memory
from restore.training import dataset

MAX_HELD_OUT = 128
MAX_TRAINING = 8192  # of a set, for baselines and nearest images


def _thin(images: torch.Tensor, limit: int) -> torch.Tensor:
    return images[:: max(1, len(images) // limit)]


class Pixels:
    """Faces, photos or other images, with a class for each label of the sets."""

    facts: dict[str, str] = {}

    def __init__(self, config: DictConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        crop = config.get("crop") if config.kind == "pixels" else None  # an autoencoder cuts its crops itself
        self.size = crop or config.patch * config.model.sample_size
        self.sets = dataset.load_training_sets(config.data, config.seed)
        self.labels = tuple(dict.fromkeys(one.label for one in self.sets if one.label is not None))
        for one in self.sets:
            if device.type == "cuda":  # there is room, and the augmentation is faster there
                one.training = one.training.to(device)
        self.counts = dataset.divide_batch(self.sets, config.batch)
        if 0 in self.counts:
            name = self.sets[self.counts.index(0)].name
            raise RestoreError(f"batch={config.batch} is too small for images of data.sets.{name}; give a larger one")

    @property
    def held_out(self) -> dict[str, torch.Tensor]:
        by_label: dict[str, list[torch.Tensor]] = {}
        for one in self.sets:
            x0 = dataset.to_float(_thin(one.held_out, MAX_HELD_OUT), self.size, one.cut)
            by_label.setdefault(one.label or "", []).append(x0)
        return {label: torch.cat(x0) for label, x0 in by_label.items()}

    def training_x0(self, label: str) -> torch.Tensor:
        """Return the images of one label ("": without) as held-out ones: without augmentation, on the CPU."""
        return torch.cat([self._to_x0(one) for one in self.sets if (one.label or "") == label])

    @property
    def mean_image(self) -> torch.Tensor:
        """(3, size, size): of all classes, each as often as in a batch. The best guess without a label."""
        weighted = [count * self._to_x0(one).mean(0) for one, count in zip(self.sets, self.counts, strict=True)]
        return torch.stack(weighted).sum(0) / sum(self.counts)

    def _to_x0(self, one: dataset.TrainingSet) -> torch.Tensor:
        return dataset.to_float(_thin(one.training, MAX_TRAINING).cpu(), self.size, one.cut)

    @property
    def training_images(self) -> torch.Tensor:
        return torch.cat([self.training_x0(label) for label in self.held_out])

    @property
    def held_out_images(self) -> torch.Tensor:
        return torch.cat(list(self.held_out.values()))

    def batch(self, step: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        x0, labels = [], []
        for one, count in zip(self.sets, self.counts, strict=True):
            indices = dataset.batch_indices(len(one.training), count, step, self.config.seed).to(one.training.device)
            images = one.training[indices].to(self.device)
            x0.append(dataset.augment(images, self.size, generator, self.config.data.augment, one.cut))
            labels += [len(self.labels) if one.label is None else self.labels.index(one.label)] * count
        x0 = torch.cat(x0)
        if not self.labels:
            return x0, None
        # Timesteps are stratified over the batch: its order must not be that of the classes.
        order = torch.randperm(len(x0), generator=generator, device=self.device)
        return x0[order], torch.tensor(labels, device=self.device)[order]

    def make_backbone(self, network: UNet2DModel, **options) -> ADM:
        return ADM(network, **options)


class Latents:
    """The latents of augmented images, encoded once and kept in `out`/latents.safetensors; see `encode_images`."""

    labels = ()

    def __init__(self, config: DictConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        if not Path(config.autoencoder).is_dir():
            raise RestoreError(f"autoencoder must be the folder of a trained one, got autoencoder={config.autoencoder}")
        self.vae = align_memory(load_vae(config.autoencoder)).requires_grad_(False)
        channels = self.vae.config.latent_channels
        if channels != config.model.in_channels:
            raise RestoreError(
                f"model.in_channels must be {channels}, the autoencoder's channels, got {config.model.in_channels}"
            )
        self.vae.register_to_config(scaling_factor=1.0)
        self.facts = {"encoder": self._hash_encoder()}
        path, identity = Path(config.out) / "latents.safetensors", self._describe_encoding()
        if not path.is_file() or (safe_open(path, "pt").metadata() or {}).get("made of") != identity:
            latents = encode_images(config, self.vae.to(device), device)
            disk.write_safetensors(disk.make_folder(path.parent) / path.name, latents, {"made of": identity})
        latents = load_file(path)
        self.factor = 1 / float(latents["training"].float().std())
        self.vae.register_to_config(scaling_factor=self.factor)
        self.training = latents["training"].to(device)
        self.held_out = {"": latents["held_out"].float() * self.factor}

    def _list_encoder(self) -> list[torch.Tensor]:
        # Without the decoder, which may have been trained further.
        decoder = ("decoder.", "post_quant_conv.")
        return [p for name, p in self.vae.named_parameters() if not name.startswith(decoder)]

    def _hash_encoder(self) -> str:
        digest = hashlib.sha256()
        for parameter in self._list_encoder():
            digest.update(parameter.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _describe_encoding(self) -> str:
        total = float(sum(p.double().abs().sum() for p in self._list_encoder()))
        identity = {"data": OmegaConf.to_container(self.config.data), "seed": self.config.seed, "weights": total}
        # Not hashes: reading all images again would take as long as encoding them.
        states = [(path.name, path.stat()) for path in dataset.list_training_files(self.config.data)]
        files = json.dumps([(name, state.st_size, state.st_mtime_ns) for name, state in states])
        return json.dumps({**identity, "files": hashlib.sha256(files.encode()).hexdigest()}, sort_keys=True)

    def training_x0(self, label: str) -> torch.Tensor:
        """Return scaled latents of the training images, on the CPU."""
        return _thin(self.training, MAX_TRAINING).cpu().float() * self.factor

    @property
    def training_images(self) -> torch.Tensor:
        """The images themselves: samples are compared with them after decoding."""
        return self._load_images("training")

    @property
    def held_out_images(self) -> torch.Tensor:
        return self._load_images("held_out")

    def _load_images(self, part: str) -> torch.Tensor:
        (images,) = dataset.load_training_sets(self.config.data, self.config.seed)
        return dataset.to_float(getattr(images, part), self.config.data.stored_size)

    def batch(self, step: int, generator: torch.Generator) -> tuple[torch.Tensor, None]:
        indices = dataset.batch_indices(len(self.training), self.config.batch, step, self.config.seed)
        return self.training[indices.to(self.device)].float() * self.factor, None

    def make_backbone(self, network: UNet2DModel, **options) -> LatentDiffusion:
        return LatentDiffusion(network, copy.deepcopy(self.vae), **options)


@torch.no_grad()
def encode_images(config: DictConfig, vae, device: torch.device, batch: int = 64) -> dict[str, torch.Tensor]:
    """Return unscaled latents: `training` fp16 (N * data.copies, C, h, w), `held_out` fp32 of the images as they are.

    Every copy is another augmentation (mirrored, shifted, recoloured) and another sample of the encoder's posterior;
    held-out latents are its mean.
    """
    (images,) = dataset.load_training_sets(config.data, config.seed)
    size, training, held_out = config.data.stored_size, [], []
    generator = torch.Generator(device).manual_seed(config.seed)
    # bf16 rounds by less than the posterior's own noise.
    low_precision = config.precision != "fp32" and has_native_bf16(device)
    for _ in range(config.data.copies):
        for chunk in images.training.split(batch):
            x = dataset.augment(chunk.to(device), size, generator, config.data.augment)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low_precision):
                posterior = vae.encode(x).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            n = torch.randn(mean.shape, generator=generator, device=device)
            training.append((mean + std * n).half().cpu())
    for chunk in images.held_out.split(batch):
        held_out.append(vae.encode(dataset.to_float(chunk, size).to(device)).latent_dist.mean.cpu())
    return {"training": torch.cat(training).contiguous(), "held_out": torch.cat(held_out).contiguous()}
