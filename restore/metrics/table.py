"""Every metric in one table: how it is shown, which way is better, what computes it and with which network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any

from operators import RestoreError
from operators.naming import check_known, lookup
from restore.metrics import sets, single
from restore.metrics.weights import describe_weights, find_weights


@dataclass
class Options:
    """What metrics leave open. lpips_net: alex or vgg. weights: own files, see weights.find_weights. pr_network:
    vgg16 (Kynkaanniemi et al. 2019) or inception (ADM's evaluator). fid_layer: of Inception. allow_small: permit
    set metrics below sets.MINIMUM_IMAGES. lpips_enlarge: LPIPS sees images this many times larger (bicubic); at 64
    pixels AlexNet's last layers would have 3 x 3 places."""

    lpips_net: str = "alex"
    weights: dict[str, str] = field(default_factory=dict)
    pr_network: str = "vgg16"
    fid_layer: str = "2048"
    allow_small: bool = False
    lpips_enlarge: int = 1


@dataclass(frozen=True)
class Metric:
    """One row. label, digits, meaning: how it is shown. better: +1 larger, -1 smaller, 0 neither.

    kind: what it is computed on, and so what `function` is:
        "paired": f(result, truth) -> (B,), images (B, 3, H, W) in [-1, 1]; with a network f(options, device)
            makes that function.
        "set": f(results, reference) -> {name: value} on features (N, C), the reference None where none is needed.
        "samples", "pairs" and "cost" come out of a benchmark run: its samples, its prompts, its clock.
    network: options -> (its name in weights.WEIGHTS, the layer). alone: a set metric without a reference.
    """

    label: str
    better: int
    digits: int
    meaning: str
    kind: str = "paired"
    function: Callable | None = None
    network: Callable[[Options], tuple[str, str]] | None = None
    alone: bool = False


def _lpips_network(options: Options) -> tuple[str, str]:
    check_known([options.lpips_net], single.LPIPS_NETS, "LPIPS has no net")
    larger = f" of images enlarged x{options.lpips_enlarge}" if options.lpips_enlarge != 1 else ""
    return single.LPIPS_NETS[options.lpips_net], f"lpips 0.1{larger}"


def _pr_network(options: Options) -> tuple[str, str]:
    known = {"vgg16": "fc2_relu", "inception": "2048"}
    check_known([options.pr_network], known, "precision and recall have no network")
    return options.pr_network, known[options.pr_network]


def load_lpips(options: Options, device: str = "cpu") -> single.LPIPS:
    return single.LPIPS(options.lpips_net, options.weights, device, options.lpips_enlarge)


def _inception(layer: str) -> Callable[[Options], tuple[str, str]]:
    return lambda options: ("inception", layer)


_PR = {"kind": "set", "function": sets.precision_recall, "network": _pr_network}
_KID_VGG = partial(sets.kid, name="kid_vgg16")

METRICS = {
    "psnr": Metric("PSNR", 1, 2, single.PSNR_DEFINITION, "paired", single.psnr),
    "ssim": Metric("SSIM", 1, 3, single.SSIM_DEFINITION, "paired", single.ssim),
    "lpips": Metric(
        "LPIPS", -1, 3, "perceptual distance (Zhang et al. 2018), 8 bit", "paired", load_lpips, _lpips_network
    ),
    "fid": Metric(
        "FID", -1, 2, "Frechet distance of Inception features", "set", sets.fid, lambda o: ("inception", o.fid_layer)
    ),
    "kid": Metric("KID", -1, 5, "kernel distance of Inception features", "set", sets.kid, _inception("2048")),
    "kid_vgg16": Metric(
        "KID-VGG16", -1, 5, "cubic polynomial kernel distance of VGG-16 relu5_3, averaged over each image", "set",
        _KID_VGG, lambda o: ("vgg16", sets.VGG_MEANS),
    ),
    "is": Metric("IS", 1, 2, "Inception Score", "set", sets.inception_score, _inception("logits_unbiased"), True),
    "precision": Metric("Precision", 1, 3, "share of results that look like true images, 3 neighbours", **_PR),
    "recall": Metric("Recall", 1, 3, "share of true images that the results cover, 3 neighbours", **_PR),
    "lpips_pairs": Metric(
        "LPIPS of pairs", 1, 3, "perceptual distance between samples of one prompt", "pairs", load_lpips, _lpips_network
    ),
    "residual_ratio": Metric(
        "Residual", 0, 3, "||y - A(x)|| divided by sigma_y sqrt(m): 1 explains y up to its noise", "samples"
    ),
    "spread": Metric("Spread", 0, 3, single.SPREAD_DEFINITION, "samples"),
    "coverage": Metric("Coverage", 0, 3, single.COVERAGE_DEFINITION, "samples"),
    "seconds_per_image": Metric("Seconds/image", -1, 3, "seconds of sampling per image", "cost"),
    "cpu_seconds_per_image": Metric(
        "CPU s/image", -1, 3, "processor seconds of sampling per image, of all threads; waiting does not count", "cost"
    ),
    "iterations_per_second": Metric("Steps/s", 1, 2, "sampling steps per second", "cost"),
    "peak_memory_mb": Metric("Memory MB", -1, 0, "peak memory", "cost"),
}  # fmt: skip
# What every restored image of a benchmark is measured with, asked for or not.
ALWAYS = {name: row for name, row in METRICS.items() if row.kind == "paired" and row.network is None}
TOGETHER = {"pr": ("precision", "recall")}
FULL = "full_"  # prefix of a set metric against the second, larger reference


def find(name: str) -> Metric:
    """The row of a metric, also of "module:function" (paired) or "module:RECORD" with a Metric of one's own.

    A function's docstring is its meaning; its attribute `better`, if it has one, says which way is better.
    Raises RestoreError for an unknown name.
    """
    found = lookup(name, METRICS, "metric")
    if isinstance(found, Metric):
        return found
    if not callable(found):
        raise RestoreError(f"the metric '{name}' is neither a function nor a restore.metrics.table.Metric")
    label = getattr(found, "__name__", name)
    meaning = (getattr(found, "__doc__", None) or label).strip().splitlines()[0]
    return Metric(label, getattr(found, "better", 0), 3, meaning, "paired", found)


def shown(name: str) -> Metric:
    """As `find`, also for values against the second reference (`full_fid`)."""
    if not name.startswith(FULL):
        return find(name)
    row = find(name.removeprefix(FULL))
    return replace(row, label=f"{row.label} (full set)", meaning=f"{row.meaning}, against the full reference set")


def rows(names: Sequence[str], *kinds: str) -> dict[str, Metric]:
    """The rows of `names` ("pr" being precision and recall), each once; with `kinds` only those of these kinds.

    Raises RestoreError for an unknown metric.
    """
    result = {}
    for name in names:
        lookup(name, {**METRICS, **TOGETHER}, "metric")
        for each in TOGETHER.get(name, (name,)):
            row = find(each)
            if not kinds or row.kind in kinds:
                result[each] = row
    return result


def check(metrics: Mapping[str, Metric], options: Options) -> dict[str, Any]:
    """Fail now rather than after the run: settings and weight files. Returns the protocol's entry: what each
    number means, the networks' hashes, the implementations."""
    needed = {name: row.network(options) for name, row in metrics.items() if row.network is not None}
    entry: dict[str, Any] = {}
    for name, row in metrics.items():
        if row.kind != "cost":
            entry[name] = row.meaning + (f"; {' '.join(needed[name])}" if name in needed else "")
    if needed:
        files = {weights: find_weights(weights, options.weights) for weights, _ in sorted(set(needed.values()))}
        entry["weights"] = {name: describe_weights(name, path) for name, path in files.items()}
        entry["implementation"] = ", ".join(f"{name} {version(name)}" for name in ("lpips", "torch-fidelity"))
    return entry


def paired_functions(metrics: Mapping[str, Metric], options: Options, device: str = "cpu") -> dict[str, Callable]:
    """f(result, truth) of every paired metric among `metrics`, its network loaded."""
    return {
        name: row.function(options, device) if row.network is not None else row.function
        for name, row in metrics.items()
        if row.kind == "paired"
    }
