"""The pretrained networks that metrics need: which file, where it goes, and whether it is the right one."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from operators import RestoreError
from operators.naming import check_known
from restore.disk import hash_file


@dataclass(frozen=True)
class WeightsFile:
    """One published file. `sha256` is the prefix that its name carries; `probe` a parameter it must hold."""

    metric: str
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


def default_folder() -> Path:
    """Where PyTorch, torchvision and torch-fidelity themselves keep these files."""
    return Path(torch.hub.get_dir()) / "checkpoints"


@functools.lru_cache(maxsize=16)
def _hash(path: str, size: int, modified: int) -> str:
    return hash_file(path)


def hash_weights(path: str | os.PathLike) -> str:
    """Return the hexadecimal SHA-256 of a weight file, cached until its size or modification time changes."""
    status = os.stat(path)
    return _hash(str(path), status.st_size, status.st_mtime_ns)


def find_weights(name: str, weights: Mapping[str, str | os.PathLike] | None = None) -> Path:
    """The checked file for "inception", "vgg16" or "alexnet".

    weights: mapping from those names to a file of one's own, or to the folder that holds the published one;
        without an entry the file is looked for where PyTorch keeps its downloads.
    Raises RestoreError, saying which file to put where, when it is missing, damaged or another network's.
    """
    check_known(weights or {}, WEIGHTS, "metrics have no weights called")
    published = WEIGHTS[name]
    given = (weights or {}).get(name)
    path = Path(given).expanduser() if given else default_folder() / published.file
    if path.is_dir():
        path = path / published.file
    if not path.is_file():
        raise RestoreError(
            f"{published.metric} needs {path} ({published.megabytes} MB), which does not exist; "
            f"download {published.url} to that place, or give weights.{name}=FILE"
        )
    if path.name == published.file and not hash_weights(path).startswith(published.sha256):
        raise RestoreError(f"{path} is damaged: its sha256 does not begin with {published.sha256}; download it again")
    key, shape = published.probe
    state = read_state(path)
    if key not in state or tuple(state[key].shape) != shape:
        raise RestoreError(f"{path} holds another network: {key} of shape {shape} is not in it; give {published.file}")
    return path


def weight_files(settings: Sequence[str]) -> dict[str, str]:
    """["alexnet=FILE", ...] as a mapping for `find_weights`. Raises RestoreError for what is not NAME=FILE."""
    files = {}
    for setting in settings:
        name, equals, file = setting.partition("=")
        if not equals or not file or name not in WEIGHTS:
            raise RestoreError(f"the weights '{setting}' are not NAME=FILE with a name of {', '.join(WEIGHTS)}")
        files[name] = file
    return files


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from a PyTorch or safetensors file, tensors only: a pickle that wants to run code is refused."""
    broken = (RuntimeError, pickle.UnpicklingError, EOFError, ValueError)
    if path.suffix == ".safetensors":
        import safetensors.torch

        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise RestoreError(f"{path} is not a safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except broken:
        try:  # files older than PyTorch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
        except broken as error:
            raise RestoreError(f"{path} is not a file of PyTorch weights; download it again") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise RestoreError(f"{path} is not a state dict of tensors; give the published weights file")
    return dict(state)


def describe_weights(name: str, path: Path) -> dict[str, object]:
    """The protocol's entry: the hash, and whether it is the published file or somebody's own."""
    digest = hash_weights(path)
    return {"file": path.name, "sha256": digest, "published": digest.startswith(WEIGHTS[name].sha256)}
