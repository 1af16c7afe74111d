"""Folders of images, and one tiny model of every kind of training."""

from __future__ import annotations

import pytest
from tiny_training import config, write_folders

from restore.training import train


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("images"))


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
