"""Folders of images, and one tiny model of every kind of training."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny_training import config, smooth

from restore.training import train


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Square faces, and photos of several sizes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, sizes in {"faces": [(32, 32)] * 12, "photos": [(30, 44), (61, 40), (25, 25), (90, 120)]}.items():
        (root / name).mkdir()
        for i, size in enumerate(sizes):
            Image.fromarray(smooth(rng, *size)).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def autoencoder(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("autoencoder")
    return train(config("autoencoder", folders, out, "steps=40", "optimizer.lr=2e-3")), out


@pytest.fixture(scope="session")
def latent(folders, autoencoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("latent")
    return train(config("latent", folders, out, f"autoencoder={autoencoder[0]}", "steps=24")), out


@pytest.fixture(scope="session")
def classes(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("classes")
    return train(config("prior-v2", folders, out, "steps=24")), out
