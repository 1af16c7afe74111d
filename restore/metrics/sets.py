"""Metrics of a set of images: FID, KID, Inception Score, precision and recall, by torch-fidelity.

torch-fidelity's own networks and formulas; what is added is the check of the weights before anything runs,
a cache keyed by content, and a refusal of sets too small for the number to mean anything.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from operators import RestoreError
from restore import disk, zoo
from restore.images.folder import read_rgb
from restore.metrics.weights import find_weights, hash_weights, read_state

MINIMUM_IMAGES = 1000
KID_SUBSET = 1000
VGG_MEANS = "relu5_3 mean"  # the layer of KID-VGG16


def default_cache() -> Path:
    """The folder of reference features: `statistics` in the cache of the package."""
    return zoo.cache_dir() / "statistics"


def fid(results: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Frechet distance of two Gaussians fitted to features (N, C) (Heusel et al. 2017)."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(features) for features in (results, reference)]
    return {"fid": fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]}


def kid(results: torch.Tensor, reference: torch.Tensor, name: str = "kid") -> dict[str, float]:
    """Squared MMD with the kernel (x.y / C + 1)^3 (Binkowski et al. 2018) over 100 subsets, their mean and std."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(KID_SUBSET, len(results), len(reference))
    out = kid_features_to_metric(results, reference, kid_subset_size=size, verbose=False)
    return {f"{name}{end}": out[f"kernel_inception_distance_{k}"] for end, k in (("", "mean"), ("_std", "std"))}


def inception_score(results: torch.Tensor, reference: None = None) -> dict[str, float]:
    """Inception Score (Salimans et al. 2016) over ten splits, of logits (N, 1008)."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    out = isc_features_to_metric(results, splits=min(10, len(results)))
    return {"is": out["inception_score_mean"], "is_std": out["inception_score_std"]}


def precision_recall(results: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Shares of either set within the other's 3-neighbour manifold (Kynkaanniemi et al. 2019)."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    if min(len(results), len(reference)) < 4:
        raise RestoreError("precision and recall look at the 3 nearest neighbours and need 4 images or more")
    out = prc_features_to_metric(results, reference, save_cpu_ram=True, verbose=False)
    return {"precision": out["precision"], "recall": out["recall"]}


def extract(
    paths: Sequence[Path],
    network: str,
    layers: Sequence[str],
    *,
    weights: Mapping[str, str | os.PathLike] | None = None,
    device: str = "cpu",
    batch_size: int = 32,
    cache: Path | None = None,
) -> dict[str, torch.Tensor]:
    """Features of images of one size: layer name to float32 (N, C), on the CPU.

    network: "inception" or "vgg16", by torch-fidelity; VGG_MEANS is a layer of its own beside theirs. cache:
    folder in which the result is kept under the hash of the images, the weights, the network and the version.
    """
    import safetensors.torch

    path, layers = find_weights(network, weights), sorted(set(layers))
    kept = None
    if cache is not None:
        key = [disk.hash_files(paths), hash_weights(path), network, version("torch-fidelity"), *layers]
        kept = Path(cache) / (hashlib.sha256("\n".join(key).encode()).hexdigest() + ".safetensors")
        if kept.exists():
            return safetensors.torch.load_file(kept)
    own = [layer for layer in layers if layer == VGG_MEANS]
    theirs = [layer for layer in layers if layer != VGG_MEANS]
    parts = []
    if theirs:
        parts.append((theirs, _fidelity_network(network, theirs, path).to(device)))
    if own:
        parts.append((own, _vgg_means(path, device)))
    collected: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    # No worker processes: decoding is cheap beside the network, and a library must not fork under its caller.
    for first in range(0, len(paths), batch_size):
        pixels = [read_rgb(p) for p in paths[first : first + batch_size]]
        if len({p.shape for p in pixels}) > 1:
            raise RestoreError(f"the images beside {paths[0]} have different sizes; bring them to one size")
        batch = torch.stack([torch.from_numpy(p.copy()).permute(2, 0, 1) for p in pixels]).to(device)
        with torch.no_grad():
            for names, model in parts:
                for name, features in zip(names, model(batch), strict=True):
                    collected[name].append(features.float().cpu())
    result = {name: torch.cat(features).contiguous() for name, features in collected.items()}
    if kept is not None:
        disk.write_safetensors(disk.make_folder(kept.parent) / kept.name, result)
    return result


def _fidelity_network(network: str, layers: list[str], path: Path) -> torch.nn.Module:
    from torch_fidelity import utils

    name = {"inception": "inception-v3-compat"}.get(network, network)
    options = {"cuda": False, "verbose": False, "feature_extractor_weights_path": str(path)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            return utils.create_feature_extractor(name, layers, **options)
        except (RuntimeError, ValueError, KeyError) as error:
            raise RestoreError(f"{path} does not fit {name}: {str(error).splitlines()[0]}") from error


def _vgg_means(path: Path, device: str) -> Callable[[torch.Tensor], tuple[torch.Tensor]]:
    """uint8 (B, 3, H, W) -> relu5_3 of VGG-16 averaged over the image, (B, 512); torchvision's convolutions."""
    from torchvision.models.vgg import cfgs, make_layers

    network = make_layers(cfgs["D"], batch_norm=False)[:30]
    state = read_state(path)
    wanted = {key: state.get(f"features.{key}") for key in network.state_dict()}
    missing = [key for key, value in wanted.items() if value is None]
    if missing:
        raise RestoreError(f"{path} holds no complete VGG-16: features.{missing[0]} is not in it")
    network.load_state_dict(wanted)
    network.requires_grad_(False).eval().to(device)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)
    return lambda pixels: (network((pixels.float() / 255 - mean) / std).mean(dim=(2, 3)),)


def refuse_few(n: int, what: str, allow_small: bool, minimum: int | None = None) -> None:
    """FID's bias depends on the number of images and dominates it when they are few."""
    minimum = MINIMUM_IMAGES if minimum is None else minimum
    if n < minimum and not allow_small:
        raise RestoreError(
            f"FID on {n} images ({what}) says little, at least {minimum} are needed; set allow_small=true to have it"
            " anyway, marked as such, or leave the metrics of sets out"
        )


def set_metrics(
    results: Sequence[Path],
    reference: Sequence[Path] | None,
    metrics: Mapping[str, Any],
    options: Any,
    *,
    device: str = "cpu",
    batch_size: int = 32,
    cache: Path | None = None,
) -> dict[str, float]:
    """The chosen set metrics of `results` against `reference` (None if only "is" is asked for).

    metrics, options: rows of kind "set" and Options of metrics/table.py. Every image goes through a network once.
    Values equal the torch-fidelity command line's on the same files: input1 is `results`, input2 the reference,
    subsets of KID clipped to the set's size. Raises RestoreError for sets below MINIMUM_IMAGES unless
    options.allow_small, and for missing weights.
    """
    binary = {name for name, row in metrics.items() if not row.alone}
    if binary and not reference:
        raise RestoreError(f"{', '.join(sorted(binary))} compare two sets of images; give a reference folder")
    refuse_few(len(results), "results", options.allow_small)
    if binary:
        refuse_few(len(reference), "reference", options.allow_small)
    layers: dict[str, set[str]] = {}
    shared: dict[str, set[str]] = {}
    for name, row in metrics.items():
        network, layer = row.network(options)
        layers.setdefault(network, set()).add(layer)
        if name in binary:
            shared.setdefault(network, set()).add(layer)
    common = {"weights": options.weights, "device": device, "batch_size": batch_size}
    ours = {network: extract(results, network, sorted(of), **common) for network, of in layers.items()}
    theirs = {net: extract(reference, net, sorted(of), cache=cache, **common) for net, of in shared.items()}
    values: dict[str, float] = {}
    for name, row in metrics.items():
        if name not in values:
            network, layer = row.network(options)
            values |= row.function(ours[network][layer], theirs[network][layer] if name in binary else None)
    # Functions that give two metrics at once (precision and recall) may give one that was not asked for.
    return {k: float(v) for k, v in values.items() if k in metrics or k.removesuffix("_std") in metrics}
