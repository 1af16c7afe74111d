"""Metrics of a set of images: FID, KID, Inception Score, precision and recall, by torch-fidelity.

torch-fidelity's own networks and formulas; what is added is the check of the weights before anything runs,
a cache keyed by content, and a refusal of sets too small for the number to mean anything.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import torch

from operators import RestoreError
from restore.bench.datasets import read_rgb
from restore.metrics.weights import describe_weights, find_weights, sha256

SET_METRICS = ("fid", "kid", "is", "pr")
MINIMUM_IMAGES = 1000
# Features of precision and recall: VGG-16 as in Kynkaanniemi et al. 2019, or Inception as in ADM's evaluator.
PR_NETWORKS = {"vgg16": ("vgg16", "fc2_relu"), "inception": ("inception-v3-compat", "2048")}


def default_cache() -> Path:
    """The folder of reference features: `statistics` in $RESTORE_CACHE or the platform's cache folder."""
    chosen = os.environ.get("RESTORE_CACHE")
    return (Path(chosen).expanduser() if chosen else Path(pooch.os_cache("restore"))) / "statistics"


def content_hash(paths: Sequence[Path]) -> str:
    """sha256 over the contents of the files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


class _Files(torch.utils.data.Dataset):
    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(read_rgb(self.paths[i]).copy()).permute(2, 0, 1)


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

    network: torch-fidelity's "inception-v3-compat" or "vgg16". cache: folder in which the result is kept under
    the hash of the images, the weights, the network and the version of torch-fidelity.
    """
    import safetensors.torch
    from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

    path = find_weights("inception" if network.startswith("inception") else network, weights)
    layers = sorted(set(layers))
    kept = None
    if cache is not None:
        key = [content_hash(paths), sha256(path), network, version("torch-fidelity"), *layers]
        kept = Path(cache) / (hashlib.sha256("\n".join(key).encode()).hexdigest() + ".safetensors")
        if kept.exists():
            return safetensors.torch.load_file(kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        extractor = create_feature_extractor(
            network, layers, cuda=False, verbose=False, feature_extractor_weights_path=str(path)
        ).to(device)
    cuda = str(device).startswith("cuda")
    try:
        # No worker processes: decoding is cheap beside the network, and a library must not fork under its caller.
        features = get_featuresdict_from_dataset(_Files(paths), extractor, batch_size, cuda, True, False)
    except RuntimeError as error:
        if "stack expects each tensor to be equal size" in str(error):
            raise RestoreError(f"the images beside {paths[0]} have different sizes; bring them to one size") from error
        raise
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}.tmp")
        safetensors.torch.save_file({k: v.contiguous() for k, v in features.items()}, temporary)
        os.replace(temporary, kept)
    return features


def check(
    metrics: Sequence[str],
    *,
    weights: Mapping[str, str | os.PathLike] | None = None,
    pr_network: str = "vgg16",
) -> dict[str, Any]:
    """Fail now rather than after the run: names and weight files. Returns the protocol's entry."""
    unknown = [m for m in metrics if m not in SET_METRICS]
    if unknown:
        raise RestoreError(f"there is no set metric {unknown[0]}; there are {', '.join(SET_METRICS)}")
    if pr_network not in PR_NETWORKS:
        raise RestoreError(f"precision and recall use the features of {' or '.join(PR_NETWORKS)}, not {pr_network}")
    needed = set()
    if {"fid", "kid", "is"} & set(metrics) or ("pr" in metrics and pr_network == "inception"):
        needed.add("inception")
    if "pr" in metrics and pr_network == "vgg16":
        needed.add("vgg16")
    entry: dict[str, Any] = {"implementation": f"torch-fidelity {version('torch-fidelity')}"}
    for name in sorted(needed):
        entry[name] = describe_weights(name, find_weights(name, weights))
    if "pr" in metrics:
        entry["precision_recall"] = f"{pr_network} features, k = 3"
    return entry if needed else {}


def refuse_few(n: int, what: str, allow_small: bool, minimum: int = MINIMUM_IMAGES) -> None:
    """FID's bias depends on the number of images and dominates it when they are few."""
    if n < minimum and not allow_small:
        raise RestoreError(
            f"FID on {n} images ({what}) says little, at least {minimum} are needed; set allow_small=true to have it"
            " anyway, marked as such, or leave fid, kid, is and pr out of the metrics"
        )


def set_metrics(
    results: Sequence[Path],
    reference: Sequence[Path] | None,
    metrics: Sequence[str],
    *,
    weights: Mapping[str, str | os.PathLike] | None = None,
    pr_network: str = "vgg16",
    fid_layer: str = "2048",
    kid_subset_size: int = 1000,
    device: str = "cpu",
    batch_size: int = 32,
    allow_small: bool = False,
    cache: Path | None = None,
) -> dict[str, float]:
    """The chosen set metrics of `results` against `reference` (None if only "is" is asked for).

    Returns fid; kid and kid_std; is and is_std; precision and recall. Values equal the torch-fidelity command
    line's on the same files: input1 is `results`, input2 the reference, subsets of KID clipped to the set's size.
    Raises RestoreError for sets below MINIMUM_IMAGES unless allow_small, and for missing weights.
    """
    check(metrics, weights=weights, pr_network=pr_network)
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    binary = [m for m in metrics if m != "is"]
    if binary and not reference:
        raise RestoreError(f"{', '.join(binary)} compare two sets of images; give a reference folder")
    refuse_few(len(results), "results", allow_small)
    if binary:
        refuse_few(len(reference), "reference", allow_small)
    options = {"weights": weights, "device": device, "batch_size": batch_size}
    layers = [layer for m, layer in (("fid", fid_layer), ("kid", "2048"), ("is", "logits_unbiased")) if m in metrics]
    values: dict[str, float] = {}
    if layers:
        ours = extract(results, "inception-v3-compat", layers, **options)
        shared = [layer for layer in layers if layer != "logits_unbiased"]
        theirs = extract(reference, "inception-v3-compat", shared, cache=cache, **options) if shared else {}
    if "fid" in metrics:
        statistics = [fid_features_to_statistics(features[fid_layer]) for features in (ours, theirs)]
        values["fid"] = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    if "kid" in metrics:
        size = min(kid_subset_size, len(results), len(reference))
        out = kid_features_to_metric(ours["2048"], theirs["2048"], kid_subset_size=size, verbose=False)
        values["kid"], values["kid_std"] = (out[f"kernel_inception_distance_{k}"] for k in ("mean", "std"))
    if "is" in metrics:
        splits = min(10, len(results))
        out = isc_features_to_metric(ours["logits_unbiased"], splits=splits)
        values["is"], values["is_std"] = out["inception_score_mean"], out["inception_score_std"]
    if "pr" in metrics:
        if min(len(results), len(reference)) < 4:
            raise RestoreError("precision and recall look at the 3 nearest neighbours and need 4 images or more")
        network, layer = PR_NETWORKS[pr_network]
        pair = [extract(results, network, [layer], **options)[layer]]
        pair.append(extract(reference, network, [layer], cache=cache, **options)[layer])
        out = prc_features_to_metric(*pair, save_cpu_ram=True, verbose=False)
        values["precision"], values["recall"] = out["precision"], out["recall"]
    return {name: float(np.float64(value)) for name, value in values.items()}
