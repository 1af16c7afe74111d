"""Random numbers that depend only on the image.

Every draw is a pure function of (run seed, image id, sample index, kind, step). So a result depends on neither the
batch size, the order of images nor the number of workers or samples, and options that draw more noise of one kind do
not shift the others. Drawn on the CPU: the same bytes on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from restore.backbones.transfer import send


def derive_seed(*key) -> int:
    """Return a 63-bit seed of any printable key, stable across processes, platforms and versions."""
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") >> 1


def measurement_generator(seed: int, image_id: str) -> torch.Generator:
    """Return the generator of the noise of a measurement, which depends only on the seed and the image."""
    return torch.Generator().manual_seed(derive_seed(seed, image_id, "measurement"))


class ImageNoise:
    """Standard normal noise for a batch, one independent stream per image.

    keys: one (run seed, image id, sample index) per batch element.
    """

    def __init__(self, keys: Sequence[tuple], device: torch.device | str = "cpu", dtype=torch.float32) -> None:
        self.keys, self.device, self.dtype = list(keys), torch.device(device), dtype

    def __call__(self, k: int, shape: Sequence[int], kind: str = "latent") -> torch.Tensor:
        """Return noise of `shape` (B, ...) for step k; kind: its purpose, "start", "latent" or a sampler's own."""
        if shape[0] != len(self.keys):
            raise ValueError(f"shape must be that of {len(self.keys)} images, got a batch of {shape[0]}")
        generators = (torch.Generator().manual_seed(derive_seed(*key, kind, k)) for key in self.keys)
        draws = [
            torch.randn(tuple(shape[1:]), generator=generator, dtype=torch.float32, device="cpu")
            for generator in generators
        ]
        return send(torch.stack(draws), self.device, self.dtype)
