"""Metrics of a set of images: FID, KID, Inception Score, precision and recall, by torch-fidelity.

Networks and formulas are torch-fidelity's; added are a check of the weights before anything runs, a cache keyed by
content, and a refusal of sets too small for the number to mean anything.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from operators import RestoreError
from restore import disk, zoo
from restore.backbones.weights import read_weights
from restore.metrics.references import ReferenceSet, as_reference, to_batch
from restore.metrics.weights import WeightFiles, find_weights

MINIMUM_IMAGES = 1000
KID_SUBSET = 1000
MANIFOLD_IMAGES = 100_000  # all pairs of them: hours on a GPU
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VGG_MEANS = "relu5_3 mean"  # the layer of KID-VGG16
FULL_PREFIX = "full_"  # of a set metric against the second, larger reference


def default_cache_dir() -> Path:
    """Return the folder of reference features: `statistics` in the cache of the package."""
    return zoo.cache_dir() / "statistics"


def fid(results: torch.Tensor, reference: torch.Tensor | Mapping[str, Any]) -> dict[str, float]:
    """Return the Frechet distance of two Gaussians fitted to features (N, C) (Heusel et al. 2017). reference: features,
    or `mu` and `sigma` of them."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [x if isinstance(x, Mapping) else fid_features_to_statistics(x) for x in (results, reference)]
    return {"fid": fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]}


def kid(results: torch.Tensor, reference: torch.Tensor, name: str = "kid") -> dict[str, float]:
    """Return the squared MMD with the kernel (x.y / C + 1)^3 (Binkowski et al. 2018) over 100 subsets: mean and std."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(KID_SUBSET, len(results), len(reference))
    out = kid_features_to_metric(results, reference, kid_subset_size=size, verbose=False)
    return {f"{name}{end}": out[f"kernel_inception_distance_{k}"] for end, k in (("", "mean"), ("_std", "std"))}


def inception_score(
    results: torch.Tensor, reference: None = None, *, split_size: int | None = None
) -> dict[str, float]:
    """Return the Inception Score (Salimans et al. 2016), the mean over splits, of logits (N, 1008).

    split_size: images of a split, at most, in equal splits (ADM's evaluator: 5000). None: ten splits of any set.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    splits = min(10, len(results)) if split_size is None else math.ceil(len(results) / split_size)
    out = isc_features_to_metric(results, splits=splits)
    return {"is": out["inception_score_mean"], "is_std": out["inception_score_std"]}


def precision_recall(results: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Return the share of either set within the other's 3-neighbour manifold (Kynkaanniemi et al. 2019)."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    _check_manifold(max(len(results), len(reference)))
    if min(len(results), len(reference)) < 4:
        raise RestoreError("precision and recall need 4 images or more, for 3 nearest neighbours")
    out = prc_features_to_metric(results, reference, save_cpu_ram=True, verbose=False)
    return {"precision": out["precision"], "recall": out["recall"]}


def extract_features(
    images: ReferenceSet | Sequence[Path],
    network: str,
    layers: Sequence[str],
    *,
    weights: WeightFiles | None = None,
    device: str = "cpu",
    batch_size: int = 32,
    cache: Path | None = None,
) -> dict[str, torch.Tensor]:
    """Return the features of images of one size: layer name to float32 (N, C), on the CPU.

    network: "inception" or "vgg16", by torch-fidelity, which has not the layer VGG_MEANS. cache: folder in which the
    result is kept under the hash of images, weights, network and version.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    images, path, layers = as_reference(images), find_weights(network, weights), sorted(set(layers))
    cached = None
    if cache is not None:
        key = [images.hash(), disk.hash_file_once(path), network, version("torch-fidelity"), *layers]
        cached = Path(cache) / (hashlib.sha256("\n".join(key).encode()).hexdigest() + ".safetensors")
        with suppress(OSError, SafetensorError):  # missing or damaged: made again
            return safetensors.torch.load_file(cached)
    if not len(images):
        raise RestoreError(f"{images.place} must hold images (arr_0) for these metrics, got only mu and sigma for FID")
    images.check_one_size()
    fidelity_layers = [layer for layer in layers if layer != VGG_MEANS]
    models = []
    if fidelity_layers:
        from torch_fidelity import utils

        name = {"inception": "inception-v3-compat"}.get(network, network)
        options = {"cuda": False, "verbose": False, "feature_extractor_weights_path": str(path)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                models.append((fidelity_layers, utils.create_feature_extractor(name, fidelity_layers, **options)))
            except (RuntimeError, ValueError, KeyError) as error:
                raise RestoreError(f"{path} does not fit {name}: {str(error).splitlines()[0]}") from error
    if VGG_MEANS in layers:
        models.append(([VGG_MEANS], VGGMeans(path)))
    collected: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    # No worker processes: decoding is cheap beside the network, and a library must not fork under its caller.
    for first in range(0, len(images), batch_size):
        batch = to_batch(images.read(first, min(first + batch_size, len(images))), device)
        with torch.no_grad():
            for names, model in models:
                for name, features in zip(names, model.to(device)(batch), strict=True):
                    collected[name].append(features.float().cpu())
    result = {name: torch.cat(features).contiguous() for name, features in collected.items()}
    if cached is not None:
        disk.write_safetensors(disk.make_folder(cached.parent) / cached.name, result)
    return result


class VGGMeans(torch.nn.Module):
    """uint8 (B, 3, H, W) -> relu5_3 of VGG-16 averaged over the image, (B, 512); torchvision's convolutions."""

    def __init__(self, path: Path) -> None:
        from torchvision.models.vgg import cfgs, make_layers

        super().__init__()
        self.layers = make_layers(cfgs["D"], batch_norm=False)[:30]
        state = read_weights(path)
        try:
            self.layers.load_state_dict({key: state[f"features.{key}"] for key in self.layers.state_dict()})
        except KeyError as error:
            raise RestoreError(f"{path} must hold a complete VGG-16, but {error} is missing") from error

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor]:
        mean, std = (pixels.new_tensor(v, dtype=torch.float32).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return (self.layers((pixels.float() / 255 - mean) / std).mean(dim=(2, 3)),)


def check_set_size(n: int, part: str, allow_small: bool) -> None:
    """Raise RestoreError if a set is below MINIMUM_IMAGES, where FID's bias dominates it, unless `allow_small`."""
    if n < MINIMUM_IMAGES and not allow_small:
        raise RestoreError(
            f"FID needs at least {MINIMUM_IMAGES} images, got {n} ({part}); set allow_small=true to compute it anyway,"
            " marked as such, or leave the metrics of sets out"
        )


def check_results(files: Sequence[Path], options: Any) -> None:
    """Raise RestoreError for results that set metrics could not be computed of: too few, or of several sizes."""
    check_set_size(len(files), "results", options.allow_small)
    ReferenceSet(tuple(files)).check_one_size()


def check_reference(reference: ReferenceSet, metrics: Mapping[str, Any], options: Any, part: str) -> None:
    """Raise RestoreError for a reference that these set metrics could not be compared with after a run.

    metrics, options: as compute_set_metrics takes them. part: the reference's name in messages.
    """
    compared = {name for name, row in metrics.items() if not row.no_reference}
    if compared - _find_fitted(reference, options):
        check_set_size(len(reference), part, options.allow_small)
        reference.check_one_size()
    if compared & {"precision", "recall"}:
        _check_manifold(len(reference))


def _find_fitted(reference: ReferenceSet, options: Any) -> set[str]:
    """The metrics that need only the statistics which the reference has."""
    return {"fid"} if reference.statistics is not None and options.fid_layer == "2048" else set()


def _check_manifold(count: int) -> None:
    if count > MANIFOLD_IMAGES:
        raise RestoreError(
            f"precision and recall compare all pairs of images, so a set must have at most {MANIFOLD_IMAGES}, got"
            f" {count}; give a smaller reference (ADM's evaluator takes the 10,000 images of its .npz)"
        )


def compute_set_metrics(
    results: Sequence[Path],
    reference: ReferenceSet | Sequence[Path] | None,
    metrics: Mapping[str, Any],
    options: Any,
    *,
    full_reference: ReferenceSet | Sequence[Path] | None = None,
    device: str = "cpu",
    batch_size: int = 32,
    cache: Path | None = None,
) -> dict[str, float]:
    """Return the set metrics of `results` against `reference` (None if all of them are without reference).

    metrics, options: rows of kind "set" and MetricOptions of metrics/table.py. full_reference: a second, larger
    reference, whose values carry FULL_PREFIX. cache: folder for the features of references. Values equal the
    torch-fidelity command line's on the same files: input1 is `results`, input2 the reference, subsets of KID
    clipped to the set's size. Raises RestoreError for missing weights, and for sets below MINIMUM_IMAGES unless
    options.allow_small.
    """
    compared = [name for name, row in metrics.items() if not row.no_reference]
    if compared and reference is None:
        raise RestoreError(f"{', '.join(sorted(compared))} compare two sets of images; give a reference folder")
    check_set_size(len(results), "results", options.allow_small)
    networks = {name: row.network(options) for name, row in metrics.items()}

    def extract(
        files: ReferenceSet | Sequence[Path], names: Iterable[str], cache: Path | None = None
    ) -> dict[str, dict]:
        layers: dict[str, set[str]] = {}
        for network, layer in (networks[name] for name in names):
            layers.setdefault(network, set()).add(layer)
        shared = {"weights": options.weights, "device": device, "batch_size": batch_size, "cache": cache}
        return {network: extract_features(files, network, sorted(of), **shared) for network, of in layers.items()}

    ours, values = extract(results, metrics), {}
    for prefix, files in (("", reference), (FULL_PREFIX, full_reference)):
        if prefix and not (compared and files is not None):
            continue
        files, computed = as_reference(files), {}
        fitted = _find_fitted(files, options)
        theirs = {}
        if set(compared) - fitted:
            check_set_size(len(files), "reference", options.allow_small)
            theirs = extract(files, set(compared) - fitted, cache)
        for name in compared if prefix else metrics:
            if name not in computed:
                network, layer = networks[name]
                features = files.statistics if name in fitted else theirs.get(network, {}).get(layer)
                settings = metrics[name].settings(options)
                computed |= metrics[name].function(ours[network][layer], features, **settings)
        # Functions that give two metrics at once (precision and recall) may give one that was not requested.
        values |= {
            prefix + name: float(value)
            for name, value in computed.items()
            if name in metrics or name.removesuffix("_std") in metrics
        }
    return values
