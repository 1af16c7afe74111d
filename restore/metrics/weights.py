"""The pretrained networks that metrics need: their files, where these are searched, and checks of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from operators import RestoreError
from operators.naming import check_known
from restore import disk
from restore.backbones.weights import read_weights

WeightFiles = Mapping[str, str | os.PathLike]  # network -> its file, or the folder of the published one


@dataclass(frozen=True)
class WeightsFile:
    """A published file. `sha256` is the prefix that its name carries; `probe` a parameter that it must hold."""

    metrics: str
    file: str
    url: str
    sha256: str
    probe: tuple[str, tuple[int, ...]]
    megabytes: int


WEIGHTS = {
    "inception": WeightsFile(
        "FID, KID, IS and precision/recall",
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
        ("Conv2d_1a_3x3.conv.weight", (32, 3, 3, 3)),
        91,
    ),
    "vgg16": WeightsFile(
        "LPIPS (vgg), KID-VGG16 and precision/recall",
        "vgg16-397923af.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af",
        ("features.0.weight", (64, 3, 3, 3)),
        528,
    ),
    "alexnet": WeightsFile(
        "LPIPS (alex)",
        "alexnet-owt-7be5be79.pth",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "7be5be79",
        ("features.0.weight", (64, 3, 11, 11)),
        233,
    ),
}


def find_weights(name: str, weights: WeightFiles | None = None) -> Path:
    """Return the checked file of "inception", "vgg16" or "alexnet".

    weights: mapping from those names to a file, or to the folder that holds the published one; without an entry
        the file is searched in the cache of PyTorch, torchvision and torch-fidelity.
    Raises RestoreError, saying which file to put where, if it is missing, damaged or of another network.
    """
    check_known(weights or {}, WEIGHTS, "metrics have no weights called")
    published = WEIGHTS[name]
    given = (weights or {}).get(name)
    path = Path(given).expanduser() if given else Path(torch.hub.get_dir()) / "checkpoints" / published.file
    if path.is_dir():
        path = path / published.file
    if not path.is_file():
        raise RestoreError(
            f"{published.metrics} needs {path} ({published.megabytes} MB), which does not exist; "
            f"download {published.url} to that place, or give weights.{name}=FILE"
        )
    if path.name == published.file and not disk.hash_file_once(path).startswith(published.sha256):
        raise RestoreError(f"{path} is damaged: its sha256 must begin with {published.sha256}; download it again")
    key, shape = published.probe
    state = read_weights(path, "meta")
    if not isinstance(state, Mapping) or not hasattr(state.get(key), "shape") or tuple(state[key].shape) != shape:
        raise RestoreError(f"{path} holds another network: it must have {key} of shape {shape}; give {published.file}")
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
    return {"file": path.name, "sha256": digest, "published": digest.startswith(WEIGHTS[name].sha256)}
