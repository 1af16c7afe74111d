"""The table of all metrics: how each is shown, which direction is better, what computes it and with which network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any

from operators import RestoreError
from operators.naming import check_known, lookup
from restore.metrics import perceptual, scores, sets, single
from restore.metrics.weights import describe_weights, find_weights


@dataclass
class MetricOptions:
    """Options of metrics.

    lpips_net: alex or vgg. weights: files of networks, see weights.find_weights. pr_network: vgg16 (Kynkaanniemi et
    al. 2019) or inception (ADM's evaluator). fid_layer: of Inception. allow_small: permit set metrics below
    sets.MINIMUM_IMAGES. lpips_enlarge: factor by which images are enlarged (bicubic) for LPIPS; at 64 pixels
    AlexNet's last layers would have 3 x 3 positions. is_split_size: images of a split of the Inception Score, at most,
    which grows with it (ADM's evaluator: 5000); None: ten splits of any set. models: folders, files or hub
    ids in place of the published models of scores.MODELS, by name. reference_size: pixels to which references of
    sets are brought, see references.crop_center; None: as they are. offline: fetch no models of scores.
    """

    lpips_net: str = "alex"
    weights: dict[str, str] = field(default_factory=dict)
    pr_network: str = "vgg16"
    fid_layer: str = "2048"
    allow_small: bool = False
    lpips_enlarge: int = 1
    is_split_size: int | None = None
    models: dict[str, str] = field(default_factory=dict)
    offline: bool = False
    reference_size: int | None = None


@dataclass(frozen=True)
class Metric:
    """One row of the table. label, digits, meaning: how it is shown. better: +1 larger, -1 smaller, 0 neither.

    kind: what it is computed on, which decides the signature of `function`:
        "paired": f(result, truth) -> (B,), images (B, 3, H, W) in [-1, 1]; with a network, f(options, device)
            returns that function.
        "prompt": f(options, device) returns f(results, prompts) -> (B,), the prompts of the images.
        "set": f(results, reference, **settings) -> {name: value} on features (N, C); reference is None if
            `no_reference`.
        "samples", "pairs" and "cost" come from a benchmark run: its samples, its prompts, its clock.
    network: options -> (name in weights.WEIGHTS, layer). settings: options -> keywords of `function`, part of the
    protocol. models: names in scores.MODELS. no_reference: needs no reference set, or no prompts. by_torchmetrics:
    needs that package, an extra.
    """

    label: str
    better: int
    digits: int
    meaning: str
    kind: str = "paired"
    function: Callable | None = None
    network: Callable[[MetricOptions], tuple[str, str]] | None = None
    no_reference: bool = False
    settings: Callable[[MetricOptions], dict[str, Any]] = lambda options: {}
    models: tuple[str, ...] = ()
    by_torchmetrics: bool = False


def _lpips_network(options: MetricOptions) -> tuple[str, str]:
    check_known([options.lpips_net], single.LPIPS_NETS, "LPIPS has no net")
    larger = f" of images enlarged x{options.lpips_enlarge}" if options.lpips_enlarge != 1 else ""
    return single.LPIPS_NETS[options.lpips_net], f"lpips 0.1{larger}"


def _pr_network(options: MetricOptions) -> tuple[str, str]:
    known = {"vgg16": "fc2_relu", "inception": "2048"}
    check_known([options.pr_network], known, "precision and recall have no network")
    return options.pr_network, known[options.pr_network]


def _is_settings(options: MetricOptions) -> dict[str, Any]:
    size = options.is_split_size
    if size is not None and size < 1:
        raise RestoreError(
            f"is_split_size must be a whole number of images from 1 on, or null for ten splits, got {size}"
        )
    return {"split_size": size}


def load_lpips(options: MetricOptions, device: str = "cpu") -> single.LPIPS:
    """Load the LPIPS network that the options describe."""
    return single.LPIPS(options.lpips_net, options.weights, device, options.lpips_enlarge)


_LPIPS = {"function": load_lpips, "network": _lpips_network}
_FID = {"function": sets.fid, "network": lambda options: ("inception", options.fid_layer)}
_KID = {"function": sets.kid, "network": lambda options: ("inception", "2048")}
_KID_VGG = {"function": partial(sets.kid, name="kid_vgg16"), "network": lambda options: ("vgg16", sets.VGG_MEANS)}
_IS = {"function": sets.inception_score, "network": lambda options: ("inception", "logits_unbiased")}
_IS |= {"no_reference": True, "settings": _is_settings}
_PR = {"function": sets.precision_recall, "network": _pr_network}
_CLIP_SCORE = {"kind": "prompt", "function": scores.load_clip_score, "models": ("clip_l",)}
_PICK_SCORE = {"kind": "prompt", "function": scores.load_pick_score, "models": ("pick_score", "clip_h")}
_HPSV2 = {"kind": "prompt", "function": scores.load_hpsv2, "models": ("hpsv2", "clip_h")}
_AESTHETIC = {"kind": "prompt", "function": scores.load_aesthetic, "models": ("aesthetic", "clip_l")}
_AESTHETIC |= {"no_reference": True}
_DISTS = {"function": perceptual.load_dists, "network": lambda options: ("vgg16", "DISTS"), "by_torchmetrics": True}
_ARNIQA = {"kind": "prompt", "function": perceptual.load_arniqa, "models": ("arniqa", "arniqa_regressor")}
_ARNIQA |= {"no_reference": True, "by_torchmetrics": True}
_VIF = {"function": perceptual.vif, "by_torchmetrics": True}
_KID_VGG_MEANING = "cubic polynomial kernel distance of VGG-16 relu5_3, averaged over each image"
_CPU_MEANING = "processor seconds of sampling per image, summed over threads; waiting does not count"
_LOOP_MEANING = "steps per second of a pipeline's denoising loop, without text encoder and autoencoder"

METRICS = {
    "psnr": Metric("PSNR", 1, 2, single.PSNR_DEFINITION, "paired", single.psnr),
    "ssim": Metric("SSIM", 1, 3, single.SSIM_DEFINITION, "paired", single.ssim),
    "lpips": Metric("LPIPS", -1, 3, "perceptual distance (Zhang et al. 2018), 8 bit", "paired", **_LPIPS),
    "dists": Metric("DISTS", -1, 3, "structure and texture (Ding et al. 2020), 8 bit", **_DISTS),
    "vif": Metric("VIF", 1, 3, "visual information fidelity in pixels (Sheikh & Bovik 2006), 8 bit", **_VIF),
    "fid": Metric("FID", -1, 2, "Frechet distance of Inception features", "set", **_FID),
    "kid": Metric("KID", -1, 5, "kernel distance of Inception features", "set", **_KID),
    "kid_vgg16": Metric("KID-VGG16", -1, 5, _KID_VGG_MEANING, "set", **_KID_VGG),
    "is": Metric("IS", 1, 2, "Inception Score", "set", **_IS),
    "precision": Metric("Precision", 1, 3, "share of results that look like true images, 3 neighbours", "set", **_PR),
    "recall": Metric("Recall", 1, 3, "share of true images that the results cover, 3 neighbours", "set", **_PR),
    "lpips_pairs": Metric(
        "LPIPS of pairs", 1, 3, "perceptual distance between samples of one prompt", "pairs", **_LPIPS
    ),
    "clip_score": Metric(
        "CLIP score", 1, 2, "100 max(cos, 0) of image and prompt, CLIP ViT-L/14 (Hessel et al. 2021)", **_CLIP_SCORE
    ),
    "pick_score": Metric(
        "PickScore", 1, 3, "exp(logit_scale) cos of image and prompt (Kirstain et al. 2023)", **_PICK_SCORE
    ),
    "hpsv2": Metric("HPSv2", 1, 2, "100 cos of image and prompt, HPS v2.1 (Wu et al. 2023)", **_HPSV2),
    "aesthetic": Metric(
        "Aesthetic", 1, 3, "LAION's predictor sac+logos+ava1-l14-linearMSE, of the image alone", **_AESTHETIC
    ),
    "arniqa": Metric("ARNIQA", 1, 3, "quality of the image alone (Agnolucci et al. 2024), KonIQ-10k", **_ARNIQA),
    "residual_ratio": Metric(
        "Residual", 0, 3, "||y - A(x)|| divided by sigma_y sqrt(m): 1 explains y up to its noise", "samples"
    ),
    "spread": Metric("Spread", 0, 3, single.SPREAD_DEFINITION, "samples"),
    "coverage": Metric("Coverage", 0, 3, single.COVERAGE_DEFINITION, "samples"),
    "seconds_per_image": Metric("Seconds/image", -1, 3, "seconds of sampling per image", "cost"),
    "cpu_seconds_per_image": Metric("CPU s/image", -1, 3, _CPU_MEANING, "cost"),
    "iterations_per_second": Metric("Steps/s", 1, 2, "sampling steps per second", "cost"),
    "loop_steps_per_second": Metric("Loop steps/s", 1, 2, _LOOP_MEANING, "cost"),
    "process_memory_mb": Metric("Process MB", -1, 0, "memory in use on the whole device after the batch", "cost"),
    "peak_memory_mb": Metric("Memory MB", -1, 0, "peak memory", "cost"),
}
# Measured for every restored image of a benchmark, requested or not: they need no network.
BASE_METRICS = {
    name: row
    for name, row in METRICS.items()
    if row.kind == "paired" and row.network is None and not row.by_torchmetrics
}
GROUPS = {"pr": ("precision", "recall")}


def find_metric(name: str) -> Metric:
    """Return the row of a metric, of "full_NAME", of "module:function" (paired) or of "module:METRIC", a Metric.

    A function's docstring is its meaning; its attribute `better`, if present, says which direction is better.
    Raises RestoreError if the name is unknown.
    """
    if name.startswith(sets.FULL_PREFIX):
        row = find_metric(name.removeprefix(sets.FULL_PREFIX))
        return replace(row, label=f"{row.label} (full set)", meaning=f"{row.meaning}, against the full reference set")
    found = lookup(name, METRICS, "metric")
    if isinstance(found, Metric):
        return found
    if not callable(found):
        raise RestoreError(f"the metric '{name}' must be a function or a restore.metrics.table.Metric, got {found!r}")
    label = getattr(found, "__name__", name)
    meaning = (getattr(found, "__doc__", None) or label).strip().splitlines()[0]
    return Metric(label, getattr(found, "better", 0), 3, meaning, "paired", found)


def select_metrics(names: Sequence[str], *kinds: str) -> dict[str, Metric]:
    """Return the rows of `names` ("pr" stands for precision and recall), each once; only of these kinds, if given.

    Raises RestoreError if a name is unknown.
    """
    result = {}
    for name in names:
        lookup(name, METRICS | GROUPS, "metric")
        for member in GROUPS.get(name, (name,)):
            row = find_metric(member)
            if not kinds or row.kind in kinds:
                result[member] = row
    return result


def check_metrics(metrics: Mapping[str, Metric], options: MetricOptions) -> dict[str, Any]:
    """Check options and weights before a run, and return the protocol's entry: meanings, weights, implementations.

    Raises RestoreError for unknown options and for missing or damaged weights.
    """
    needed = {name: row.network(options) for name, row in metrics.items() if row.network is not None}
    entry: dict[str, Any] = {}
    for name, row in metrics.items():
        if row.by_torchmetrics:
            perceptual.require_torchmetrics(name)
        if row.kind != "cost":
            entry[name] = row.meaning + (f"; {' '.join(needed[name])}" if name in needed else "")
            for key, value in row.settings(options).items():
                entry[name] += f"; {key} {'ten splits' if value is None else value}"
    if models := [model for row in metrics.values() for model in row.models]:
        entry["models"] = scores.describe_models(models, options.models)
    if needed:
        files = {weights: find_weights(weights, options.weights) for weights, _ in sorted(set(needed.values()))}
        entry["weights"] = {name: describe_weights(name, path) for name, path in files.items()}
    packages = ["lpips", "torch-fidelity"] * bool(needed)
    packages += ["torchmetrics"] * any(row.by_torchmetrics for row in metrics.values())
    if packages:
        entry["implementation"] = ", ".join(f"{name} {version(name)}" for name in packages)
    return entry


def load_paired_metrics(
    metrics: Mapping[str, Metric], options: MetricOptions, device: str = "cpu"
) -> dict[str, Callable]:
    """Return f(result, truth) -> (B,) of every paired metric among `metrics`, with its network loaded."""
    return {
        name: row.function(options, device) if row.network is not None else row.function
        for name, row in metrics.items()
        if row.kind == "paired"
    }


def load_scores(metrics: Mapping[str, Metric], options: MetricOptions, device: str = "cpu") -> dict[str, scores.Score]:
    """Return f(results, prompts) -> (B,) of every metric of kind "prompt" among `metrics`, with its models loaded."""
    return {name: row.function(options, device) for name, row in metrics.items() if row.kind == "prompt"}
