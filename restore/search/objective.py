"""What a search minimises: a weighted sum of metrics of a set of results, and its share of every image.

`lpips` (or any name of restore.metrics.table) alone means what that table calls better; in a mapping
{lpips: 1.0, psnr: -0.02} the weights are those of a cost, negative where more is better. A "module:function" is
called as f(results, truth), images (N, 3, H, W) in [-1, 1], in generation as f(results, prompts), and returns a number
for each image, (N,), or one for the set; its attribute `better` = 1 says that more is better. `clip_score` and
`pick_score` are such functions (restore.search.prompted).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from operators import RestoreError
from operators.naming import lookup
from restore import disk
from restore.bench import results
from restore.bench.batches import read_prompts
from restore.images import io
from restore.images.folder import list_images, read_rgb, to_file_name
from restore.metrics import sets, table
from restore.restoration import choose_device
from restore.search import prompted

KERNEL_DISTANCES = ("kid", "kid_vgg16")


@dataclass(frozen=True)
class Objective:
    """weights: of metrics of the table and of `own` functions, by name; the sum of both is minimised."""

    weights: Mapping[str, float]
    own: Mapping[str, Callable]

    @classmethod
    def build(cls, config: Any, kind: str = "restoration", clip: str | None = None) -> Objective:
        """From a name or {name: weight}; clip: the model of clip_score and pick_score, the published one when None.

        Raises RestoreError for unknown names and for weights of the wrong sign.
        """
        single = isinstance(config, str)
        given = {config: None} if single else config
        if not isinstance(given, Mapping) or not given:
            raise RestoreError(f"an objective is a metric or {{metric: weight}}, not {config!r}")
        weights, own = {}, {}
        for name, weight in given.items():
            found = lookup(name, {**table.METRICS, **prompted.SCORES}, "objective")
            if name in prompted.SCORES:
                if kind != "text_to_image":
                    raise RestoreError(f"{name} compares with a prompt, which kind={kind} has not")
                own[name] = replace(found, model=clip, processor=clip) if clip else found
            elif not isinstance(found, table.Metric):
                own[name] = found
            elif found.kind not in ("paired", "set", "samples") or (found.kind == "paired" and kind != "restoration"):
                raise RestoreError(f"{name} cannot be an objective of {kind}")
            better = getattr(found, "better", 0)
            if single and not better and name not in own:
                raise RestoreError(f"{name} has no better and worse; give objective={{{name}: WEIGHT}} to minimise it")
            weight = float(-better or 1) if single else weight
            if not isinstance(weight, (int, float)) or isinstance(weight, bool) or weight * better > 0 or not weight:
                sign = "negative" if better > 0 else "positive" if better else "a number"
                raise RestoreError(f"an objective is minimised: the weight of {name} must be {sign}, not {weight}")
            weights[name] = float(weight)
        return cls(weights, own)

    @property
    def metrics(self) -> list[str]:
        """What a benchmark must measure for it."""
        return [name for name in self.weights if name not in self.own]

    @property
    def of_sets(self) -> list[str]:
        return [name for name in self.metrics if table.find_metric(name).kind == "set"]

    def __str__(self) -> str:
        terms = [f"{w:+g} {name}".replace("+1 ", "+").replace("-1 ", "-") for name, w in self.weights.items()]
        return " ".join(terms).removeprefix("+")


@dataclass(frozen=True)
class Cell:
    """The results of one method on one task in a benchmark's folder, finished ones in order. ids: all of its images."""

    run: Path
    config: Mapping[str, Any]
    task: str
    method: str
    ids: tuple[str, ...]

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        return results.measured_rows(self.run, self.task, self.method, self.ids)

    @property
    def files(self) -> list[Path]:
        return [
            self.run / "results" / self.task / self.method / f"{to_file_name(row['image'])}.png" for row in self.rows
        ]

    @property
    def set_values(self) -> dict[str, float]:
        return results.kept_metrics(self.run, self.task, self.method).get("set_values", {})

    def truth(self) -> list[Path]:
        return [self.run / "truth" / f"{to_file_name(row['image'])}.png" for row in self.rows]


def per_image(cell: Cell, name: str, function: Callable | None = None) -> tuple[float, np.ndarray | None]:
    """(value of a metric on a cell, (N,) shares of its images, whose mean is the value).

    Of a kernel distance the shares are the jackknife's pseudo-values; of other metrics of sets there are none.
    function: for names that are not of the table.
    """
    if function is not None:
        each = _of_function(cell, name, function)
        return float(each.mean()), each if len(each) == len(cell.rows) else None
    if table.find_metric(name).kind != "set":
        each = np.array([np.inf if row[name] is None else row[name] for row in cell.rows], dtype=np.float64)
        return float(each.mean()), each
    value = cell.set_values[name]
    if name not in KERNEL_DISTANCES:
        return value, None
    options = results.metric_options(cell.config)
    network, layer = table.find_metric(name).network(options)
    reference = cell.config["metrics"]["reference"]
    theirs = list(list_images(reference)[0].values()) if reference else cell.truth()
    device = str(choose_device(cell.config["device"])).replace("mps", "cpu")
    where = {"weights": options.weights, "cache": cell.run / "features", "device": device}
    x, y = (sets.extract_features(files, network, [layer], **where)[layer] for files in (cell.files, theirs))
    each = kernel_shares(x.double().numpy(), y.double().numpy(), together=reference is None)
    # The package's own value may be over subsets of large sets.
    return value, each + (value - each.mean())


def kernel_shares(x: np.ndarray, y: np.ndarray, together: bool) -> np.ndarray:
    """Jackknife pseudo-values n d − (n − 1) d_{−i} of the unbiased squared MMD of features (N, C), (M, C).

    The kernel is KID's, (x.y / C + 1)^3. together: leaving out a result leaves out its truth as well.
    """
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    n, m = xy.shape
    np.fill_diagonal(xx, 0)
    np.fill_diagonal(yy, 0)

    def distance(sum_xx, sum_yy, sum_xy, n, m):
        return sum_xx / (n * (n - 1)) + sum_yy / (m * (m - 1)) - 2 * sum_xy / (n * m)

    whole = distance(xx.sum(), yy.sum(), xy.sum(), n, m)
    rest_xx = xx.sum() - 2 * xx.sum(1)
    if together:
        rest_xy = xy.sum() - xy.sum(0) - xy.sum(1) + np.diag(xy)
        without = distance(rest_xx, yy.sum() - 2 * yy.sum(1), rest_xy, n - 1, m - 1)
    else:
        without = distance(rest_xx, yy.sum(), xy.sum() - xy.sum(1), n - 1, m)
    return n * whole - (n - 1) * without


def cost(objective: Objective, cells: Sequence[Cell]) -> tuple[float, np.ndarray | None]:
    """(the objective, (N,) shares of the images) averaged over the tasks; cells: one of each task, of one method."""
    value, shares = 0.0, 0.0
    for cell in cells:
        for name, weight in objective.weights.items():
            one, each = per_image(cell, name, objective.own.get(name))
            value += weight * one / len(cells)
            shares = None if each is None or shares is None else shares + weight * each / len(cells)
    return value, shares


def _of_function(cell: Cell, name: str, function: Callable) -> np.ndarray:
    """(N,) or (1,) values, kept beside the benchmark's own under the hash of the results."""
    kept = cell.run / "objective" / cell.task / f"{cell.method}.{name.replace(':', '.')}.json"
    text = json.dumps([name, results.source(function), [row["sha256"] for row in cell.rows]])
    key = hashlib.sha256(text.encode()).hexdigest()
    found = disk.read_json(kept)
    if isinstance(found, dict) and found.get("key") == key:
        return np.asarray(found["values"], dtype=np.float64)
    other = _stack(cell.truth()) if cell.config["kind"] == "restoration" else prompts_of(cell)
    values = torch.as_tensor(function(_stack(cell.files), other), dtype=torch.float64)
    if values.shape not in ((), (len(cell.rows),)) or not torch.isfinite(values).all():
        raise RestoreError(f"the objective {name} must return (N,) finite numbers or one, not {tuple(values.shape)}")
    disk.write_json(disk.make_folder(kept.parent) / kept.name, {"key": key, "values": values.reshape(-1).tolist()})
    return values.reshape(-1).numpy()


def prompts_of(cell: Cell) -> list[str]:
    """The prompt of every finished image, as the worker gave it; empty without a file of prompts."""
    file = cell.config["tasks"][cell.task]["prompts"]
    prompts, grouped = read_prompts(file) if file else [""], cell.config["metrics"]["group_by_prompt"]
    numbers = [int(row["image"].split("-")[0]) for row in cell.rows]
    return [prompts[i if grouped else i % len(prompts)] for i in numbers]


def _stack(files: Sequence[Path]) -> torch.Tensor:
    return torch.cat([io.to_tensor(read_rgb(path)) for path in files])
