"""The pretrained networks that metrics need: their files, where these are searched, and checks of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from operators import RestoreError
from operators.naming import check_known
from restore import disk, zoo
from restore.backbones.weights import read_weights

WeightFiles = Mapping[str, str | os.PathLike]  # network -> its file, or the folder of the published one


# Registered networks of metrics (configs/model) with a parameter that their files must hold.
WEIGHTS = {
    "inception": ("Conv2d_1a_3x3.conv.weight", (32, 3, 3, 3)),
    "vgg16": ("features.0.weight", (64, 3, 3, 3)),
    "alexnet": ("features.0.weight", (64, 3, 11, 11)),
}


def find_weights(name: str, weights: WeightFiles | None = None) -> Path:
    """Return the checked file of "inception", "vgg16" or "alexnet".

    weights: mapping from those names to a file, or to the folder that holds the published one; without an entry
        the file is searched among the pulled models and in the cache of PyTorch, torchvision and torch-fidelity.
    Raises RestoreError, saying how to get the file, if it is missing, damaged or of another network.
    """
    check_known(weights or {}, WEIGHTS, "metrics have no weights called")
    entry = zoo.find_model(name)
    file, sha256 = entry.download.file, entry.download.sha256
    given = (weights or {}).get(name)
    path = Path(given).expanduser() if given else zoo.locate(name).path
    path = path or Path(torch.hub.get_dir()) / "checkpoints" / file
    if path.is_dir():
        path = path / file
    if not path.is_file():
        raise RestoreError(
            f"{path} is missing, {entry.title}; try `restore models pull {name}`, or give weights.{name}=FILE"
        )
    if path.name == file and not disk.hash_file_once(path).startswith(sha256):
        raise RestoreError(f"{path} is damaged: its sha256 must begin with {sha256}; download it again")
    key, shape = WEIGHTS[name]
    state = read_weights(path, "meta")
    if not isinstance(state, Mapping) or not hasattr(state.get(key), "shape") or tuple(state[key].shape) != shape:
        raise RestoreError(f"{path} holds another network: it must have {key} of shape {shape}; give {file}")
    return path


def parse_weight_files(settings: Sequence[str]) -> dict[str, str]:
    """Turn ["alexnet=FILE", ...] into a mapping for `find_weights`. Raises RestoreError unless each is NAME=FILE."""
    files = {}
    for setting in settings:
        name, _, file = setting.partition("=")
        if not file or name not in WEIGHTS:
            raise RestoreError(f"weights must be NAME=FILE with NAME one of {', '.join(WEIGHTS)}, got '{setting}'")
        files[name] = file
    return files


def describe_weights(name: str, path: Path) -> dict[str, object]:
    """Return the protocol's entry of a file: its hash, and whether it is the published one."""
    digest = disk.hash_file_once(path)
    return {"file": path.name, "sha256": digest, "published": digest.startswith(zoo.find_model(name).download.sha256)}
