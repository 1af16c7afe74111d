"""The objective that a search minimises: a weighted sum of metrics of a set of results, and its share of every image.

A name of restore.metrics.table, such as `lpips`, is minimised or maximised as that table says; in a mapping
{lpips: 1.0, psnr: -0.02} the weights are those of a cost, negative if more is better. A "module:function" is
called as f(results, truth), images (N, 3, H, W) in [-1, 1], in generation as f(results, prompts), and returns a number
for each image, (N,), or one for the set; its attribute `better` = 1 says that more is better.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from operators import RestoreError
from operators.naming import lookup
from restore import disk
from restore.bench import results
from restore.bench.batches import find_truth, list_prompts
from restore.images import io
from restore.images.folder import read_rgb, to_file_name
from restore.metrics import sets, table
from restore.metrics.references import load_reference
from restore.restoration import choose_device
from restore.versions import hash_own_code

KERNEL_DISTANCES = ("kid", "kid_vgg16")
SCORABLE = ("paired", "prompt", "set", "samples")


@dataclass(frozen=True)
class Objective:
    """The sum of metrics to minimise. weights: by name, of metrics of the table and of `functions`."""

    weights: Mapping[str, float]
    functions: Mapping[str, Callable]

    @classmethod
    def from_config(cls, config: Any, kind: str = "restoration") -> Objective:
        """Build an objective from a name or {name: weight} for benchmarks of a kind.

        Raises RestoreError for unknown names and for weights of the wrong sign.
        """
        by_name = isinstance(config, str)
        requested = {config: None} if by_name else config
        if not isinstance(requested, Mapping) or not requested:
            raise RestoreError(f"an objective must be a metric or {{metric: weight}}, got {config!r}")
        weights, functions = {}, {}
        for name, weight in requested.items():
            metric = lookup(name, table.METRICS, "objective")
            if not isinstance(metric, table.Metric):
                functions[name] = metric
            elif metric.kind == "prompt" and not metric.no_reference and kind != "text_to_image":
                raise RestoreError(f"{name} compares images with prompts, which kind={kind} does not have")
            elif metric.kind not in SCORABLE or (metric.kind == "paired" and kind != "restoration"):
                raise RestoreError(f"{name} cannot be an objective of {kind}")
            better = getattr(metric, "better", 0)
            if by_name and not better and name not in functions:
                raise RestoreError(f"{name} has no direction; give objective={{{name}: WEIGHT}} to minimise it")
            weight = float(-better or 1) if by_name else weight
            if not isinstance(weight, (int, float)) or isinstance(weight, bool) or weight * better > 0 or not weight:
                sign = "negative" if better > 0 else "positive" if better else "a number"
                raise RestoreError(f"an objective is minimised: the weight of {name} must be {sign}, got {weight}")
            weights[name] = float(weight)
        return cls(weights, functions)

    @property
    def metrics(self) -> list[str]:
        """The metrics that a benchmark must measure for it."""
        return [name for name in self.weights if name not in self.functions]

    @property
    def set_metrics(self) -> list[str]:
        return [name for name in self.metrics if table.find_metric(name).kind == "set"]

    def __str__(self) -> str:
        terms = [f"{w:+g} {name}".replace("+1 ", "+").replace("-1 ", "-") for name, w in self.weights.items()]
        return " ".join(terms).removeprefix("+")

    def score(self, task_results: Sequence[MethodResults]) -> Score:
        """Return the mean over tasks; task_results: of one method, one for each task."""
        value, shares = 0.0, 0.0
        for result in task_results:
            for name, weight in self.weights.items():
                one = result.score(name, self.functions.get(name))
                value += weight * one.value / len(task_results)
                missing = shares is None or one.shares is None
                shares = None if missing else shares + weight * one.shares / len(task_results)
        return Score(value, shares)


def check_scorable(names: Sequence[str], config: Mapping[str, Any]) -> None:
    """Raise RestoreError for metrics of which a benchmark with this configuration has no number for each image or set:
    found after the last image, that would lose a search."""
    noises = [task["operator"].get("noise") or {} for task in config["tasks"].values()]
    for name, row in table.select_metrics(names).items():
        if row.kind not in SCORABLE:
            raise RestoreError(f"metrics of a search must be of images or sets, got {name}; leave it out")
        if name in ("spread", "coverage") and config["samples"] == 1:
            raise RestoreError(f"samples must be 2 or more for {name}, got 1")
        if name == "residual_ratio" and not all(noise.get("sigma") for noise in noises):
            raise RestoreError("residual_ratio needs Gaussian noise in every task; leave it out of the metrics")


@dataclass(frozen=True)
class Score:
    """A metric of a set of images. shares: (N,) of the images, whose mean is the value; None if it has none."""

    value: float
    shares: np.ndarray | None


@dataclass(frozen=True)
class MethodResults:
    """The finished results of one method on one task in a benchmark's folder. ids: all of its images."""

    run: Path
    config: Mapping[str, Any]
    task: str
    method: str
    ids: tuple[str, ...]

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        return results.read_rows(self.run, self.task, self.method, self.ids)

    @property
    def files(self) -> list[Path]:
        folder = self.run / "results" / self.task / self.method
        return [folder / f"{to_file_name(row['image'])}.png" for row in self.rows]

    @property
    def truth(self) -> list[Path]:
        return [find_truth(self.run, self.task, to_file_name(row["image"])) for row in self.rows]

    @property
    def prompts(self) -> list[str]:
        """The prompt of every image, as the worker gave it; "" without a file of prompts."""
        return list_prompts(self.config, self.task, [row["image"] for row in self.rows])

    def score(self, name: str, function: Callable | None = None) -> Score:
        """Return a metric of these results; function: for names that are not in the table.

        The shares of a kernel distance are the jackknife's pseudo-values, of three images or more; other metrics of
        sets have none.
        """
        if function is not None:
            each = self._call_function(name, function)
            return Score(float(each.mean()), each if len(each) == len(self.rows) else None)
        metric = table.find_metric(name)
        if metric.kind != "set":
            each = np.array([np.inf if row[name] is None else row[name] for row in self.rows], dtype=np.float64)
            return Score(float(each.mean()), each)
        value = results.read_metrics(self.run, self.task, self.method)["set_values"][name]
        if name not in KERNEL_DISTANCES or len(self.rows) < 3:  # without one of two there is no distance
            return Score(value, None)
        options = results.metric_options(self.config)
        network, layer = metric.network(options)
        reference = self.config["metrics"]["reference"]
        theirs = load_reference(reference, options.reference_size) if reference else self.truth
        device = str(choose_device(self.config["device"])).replace("mps", "cpu")
        shared = {"weights": options.weights, "cache": self.run / "features", "device": device}
        x, y = (sets.extract_features(files, network, [layer], **shared)[layer] for files in (self.files, theirs))
        each = jackknife_kernel_distance(x.double().numpy(), y.double().numpy(), paired=reference is None)
        # The value itself may be over subsets of large sets.
        return Score(value, each + (value - each.mean()))

    def _call_function(self, name: str, function: Callable) -> np.ndarray:
        """(N,) or (1,) values, kept beside the benchmark's metrics under the hash of the results."""
        path = self.run / "objective" / self.task / f"{self.method}.{name.replace(':', '.')}.json"
        text = json.dumps([name, hash_own_code(function), [row["sha256"] for row in self.rows]])
        key = hashlib.sha256(text.encode()).hexdigest()
        kept = disk.read_json(path)
        if isinstance(kept, dict) and kept.get("key") == key:
            return np.asarray(kept["values"], dtype=np.float64)
        truth = _stack(self.truth) if self.config["kind"] == "restoration" else self.prompts
        values = torch.as_tensor(function(_stack(self.files), truth), dtype=torch.float64)
        if values.shape not in ((), (len(self.rows),)) or not torch.isfinite(values).all():
            raise RestoreError(
                f"the objective {name} must return one finite number or (N,) of them, got {tuple(values.shape)}"
            )
        disk.write_json(disk.make_folder(path.parent) / path.name, {"key": key, "values": values.reshape(-1).tolist()})
        return values.reshape(-1).numpy()


def jackknife_kernel_distance(x: np.ndarray, y: np.ndarray, paired: bool) -> np.ndarray:
    """Return the pseudo-values n d - (n - 1) d_{-i} of the unbiased squared MMD of features (N, C), (M, C), N > 2.

    The kernel is KID's, (x.y / C + 1)^3. paired: leaving out a result leaves out its truth as well.
    """
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    n, m = xy.shape
    np.fill_diagonal(xx, 0)
    np.fill_diagonal(yy, 0)

    def distance(sum_xx, sum_yy, sum_xy, n, m):
        return sum_xx / (n * (n - 1)) + sum_yy / (m * (m - 1)) - 2 * sum_xy / (n * m)

    rest_yy, rest_xy, rest_m = yy.sum(), xy.sum() - xy.sum(1), m
    if paired:
        rest_xy = xy.sum() - xy.sum(0) - xy.sum(1) + np.diag(xy)
        rest_yy, rest_m = yy.sum() - 2 * yy.sum(1), m - 1
    without = distance(xx.sum() - 2 * xx.sum(1), rest_yy, rest_xy, n - 1, rest_m)
    return n * distance(xx.sum(), yy.sum(), xy.sum(), n, m) - (n - 1) * without


def _stack(files: Sequence[Path]) -> torch.Tensor:
    return torch.cat([io.to_tensor(read_rgb(path)) for path in files])
