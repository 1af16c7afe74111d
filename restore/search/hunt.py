"""The benchmarks of one search: rounds, curve and test, each in a folder of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from operators import RestoreError
from restore import disk, zoo
from restore.backbones.attention_layers import find_attention_layers
from restore.backbones.base import AttentionLayer
from restore.backbones.pipeline_files import read_architecture
from restore.bench import run as benchmarks
from restore.bench.batches import Batch, list_image_ids
from restore.bench.config import load_config
from restore.bench.datasets import ImageSet
from restore.bench.protocol import check_folder
from restore.metrics.statistics import bootstrap_mean
from restore.metrics.table import select_metrics
from restore.search import config as configs
from restore.search.config import Head, build_benchmark, format_heads, set_layers
from restore.search.objective import MethodResults, Objective, Score, check_scorable

Progress = Callable[[dict[str, Any]], None]
Results = Callable[..., list[MethodResults]]  # (method, first=None): one for each task, of the first images if given


class HeadSearch:
    """One search: its checked configuration, the benchmarks of both halves, pool of heads and folder."""

    def __init__(self, config: dict[str, Any], progress: Progress | None = None):
        self.config, self.progress = config, progress
        disk.require_file_names([config["name"]], "name")
        self.folder = Path(config["out"] or Path("runs") / config["name"])
        kind = config["rest"].get("kind", "restoration")
        self.objective = Objective.from_config(config["objective"], kind)
        self.scale = configs.get_scale(config["guidance"])
        self.scales = config["scales"] or [self.scale]
        names = (config["rest"].get("metrics") or {}).get("names")
        if names is None:
            names = ["psnr", "ssim"] if kind == "restoration" else []
        self.metrics = list(select_metrics([*names, *self.objective.metrics]))
        self.halves = {
            half: load_config(build_benchmark(config, half, {"none": {}}, names, self.folder / half))
            for half, names in (("calibration", self.objective.metrics), ("test", self.metrics))
        }
        test = self.halves["test"]
        check_scorable(self.metrics, test)
        if {task["backbone"] for task in test["tasks"].values()} - {None, test["backbone"]}:
            raise RestoreError("a search must have one backbone; leave `backbone` out of its tasks")
        self.images = configs.load_halves(**self.halves)
        self.attention = find_layers(test["backbone"], test["offline"], test["model_options"])
        self.pool = configs.list_heads(self.attention, config["layers"])
        self.layers = list(dict.fromkeys(layer for layer, _ in self.pool))
        rounds, top = config["rounds"], config["top"]
        if top * rounds > len(self.pool):
            raise RestoreError(f"rounds x top must be at most {len(self.pool)} heads, got rounds={rounds}, top={top}")

    def claim_folder(self) -> None:
        """Create the folder, or check that it has this search. Raises RestoreError otherwise."""
        own, rest = (
            {k: v for k, v in part.items() if k not in configs.CIRCUMSTANCES}
            for part in (self.config, self.config["rest"])
        )
        identity = json.loads(json.dumps(own | {"rest": rest}))
        manifest = self.folder / "config.json"
        existing = disk.read_json(manifest)
        if manifest.exists() and not isinstance(existing, dict):
            raise RestoreError(f"{manifest} is damaged; start the search again in another folder")
        check_folder(self.folder, existing, identity, "search")
        disk.write_json(disk.make_folder(self.folder) / manifest.name, identity)

    def count_images(self, half: str) -> int:
        config = self.halves[half]
        return len(list_image_ids(config, next(iter(config["tasks"])), self.images[half]))

    def describe_images(self, half: str) -> dict[str, Any]:
        if self.images[half] is not None:
            return self.images[half].describe()
        return {"count": self.count_images(half), "seed": self.halves[half]["seed"]}

    def make_method(
        self, layers: Sequence[Head] | Sequence[str], title: str | None = None, scale: float | None = None
    ) -> dict[str, Any]:
        """Return the benchmark's entry of a method guided on heads or whole layers; scale: None: the guidance's."""
        return {"guidance": set_layers(self.config["guidance"], layers, scale), "title": title}

    def name_at(self, name: str, scale: float) -> str:
        """Return the name of a method at a scale: its own at that of the search."""
        return name if scale == self.scale else f"{name}-w{scale:g}"

    @property
    def cfg(self) -> float:
        """The scale w of classifier-free guidance in the test; 0 unless every task has a condition."""
        tasks = self.halves["test"]["tasks"].values()
        has_condition = all(task["prompts"] or task["labels"] is not None for task in tasks)
        given = self.config["cfg"]
        return (configs.CFG if given is None else given) * has_condition

    def run(
        self, half: str, name: str, methods: Mapping[str, Any], only: Callable[[Batch], bool] | None = None
    ) -> Results:
        """Run or finish the benchmark `name` of these methods; only: which batches to compute now."""
        metrics = self.metrics if half == "test" else self.objective.metrics
        config = build_benchmark(self.config, half, methods, metrics, self.folder / name)
        return self.run_config(config, name, self.images[half], only)

    def run_config(
        self,
        config: Mapping[str, Any],
        phase: str,
        images: ImageSet | None,
        only: Callable[[Batch], bool] | None = None,
    ) -> Results:
        """Run or finish a benchmark of the search; phase: its name in the progress; images: those that it is of."""
        progress = None if self.progress is None else lambda state: self.progress({"phase": phase, **state})
        run = benchmarks.run_benchmark(config, progress=progress, only=only).folder
        config = load_config(config)

        def results(method: str, first: int | None = None) -> list[MethodResults]:
            ids = {task: tuple(list_image_ids(config, task, images)[:first]) for task in config["tasks"]}
            return [MethodResults(run, config, task, method, of) for task, of in ids.items()]

        return results

    def score(self, results: Sequence[MethodResults], none: Score) -> dict[str, Any]:
        """Return cost and number of images of a method's results, and their change against `none`."""
        score = self.objective.score(results)
        images = min(len(result.rows) for result in results)
        return {"cost": score.value, "images": images, "change": compare_scores(score, none)}

    def run_round(self, number: int, heads: Sequence[Head]) -> dict[str, Any]:
        """Add every remaining head of the pool to `heads` on trial: their ranking, and which were taken."""
        name, first = f"round-{number:02d}", number == 1
        candidates = {f"{layer}-{head}": (layer, head) for layer, head in self.pool if (layer, head) not in heads}
        methods = {"none": {"guidance": None}} if first else {}
        methods |= {key: self.make_method([*heads, head]) for key, head in candidates.items()}
        whole = {}
        if first:
            levels = [(layer, scale) for scale in dict.fromkeys([self.scale, *self.scales]) for layer in self.layers]
            whole = {self.name_at(f"layer-{layer}", scale): (layer, scale) for layer, scale in levels}
            methods |= {name: self.make_method([layer], scale=scale) for name, (layer, scale) in whole.items()}
            methods |= {"all": self.make_method(self.layers)}
        if self.config["halving"]:
            results, skipped = self.run_halving(name, methods, candidates)
        else:
            results, skipped = self.run("calibration", name, methods), []
        if first:
            self.none = self.objective.score(results("none"))
        scores = {method: self.score(results(method), self.none) for method in methods}
        ranking = sorted(candidates, key=lambda key: (-scores[key]["images"], scores[key]["cost"]))
        result = {
            "ranking": [{"head": list(candidates[key]), **scores[key]} for key in ranking],
            "chosen": [list(candidates[key]) for key in ranking[: self.config["top"]]],
            "skipped": skipped,
        }
        if first:
            result["none"] = {key: scores["none"][key] for key in ("cost", "images")}
            result["layers"] = [
                {"name": layer, "scale": scale, **scores[name]} for name, (layer, scale) in whole.items()
            ]
            result["all"] = scores["all"]
        return result

    def run_halving(
        self, name: str, methods: Mapping[str, Any], candidates: Mapping[str, Head]
    ) -> tuple[Results, list[dict[str, Any]]]:
        """Run a round that drops the worse half of the candidates after each doubling; return also which it dropped."""
        size, count = self.halves["calibration"]["batch"], self.count_images("calibration")
        batches, limit, left, skipped = math.ceil(count / size), 1, list(candidates), []
        if batches < 2:
            raise RestoreError(f"halving needs several batches of images: give batch= less than {count}")
        while True:
            limits = {key: limit if key in left else 0 for key in candidates}
            results = self.run(
                "calibration", name, methods, lambda b, limits=limits: b.index < limits.get(b.method, batches)
            )
            if limit >= batches:
                return results, skipped
            seen = min(limit * size, count)
            # Of these images only: a search that is continued finds more, and must choose as it did before.
            costs = {key: self.objective.score(results(key, seen)).value for key in left}
            ranking = sorted(left, key=costs.__getitem__)
            keep = max(self.config["top"], math.ceil(len(left) / 2))
            dropped = [list(candidates[key]) for key in ranking[keep:]]
            skipped.append({"images": seen, "of": count, "heads": dropped})
            left = [key for key in left if key in ranking[:keep]]
            limit *= 2

    def curve_sizes(self, total: int) -> list[int]:
        """Return the sizes of sets on the curve: those at the end of each round, and powers of two between them."""
        if self.config["sizes"]:
            return sorted(set(self.config["sizes"]))
        ends = range(self.config["top"], total + 1, self.config["top"])
        return sorted({*ends, *(2**i for i in range(total.bit_length()))})

    def run_curve(self, heads: Sequence[Head]) -> list[dict[str, Any]]:
        """Score the first n of the heads on the calibration images, at each scale."""
        points = [(n, scale) for scale in self.scales for n in self.curve_sizes(len(heads))]
        named = {self.name_at(f"heads-{n}", scale): (n, scale) for n, scale in points}
        methods = {name: self.make_method(heads[:n], scale=scale) for name, (n, scale) in named.items()}
        results = self.run("calibration", "curve", methods)
        return [
            {"size": n, "scale": scale, "heads": format_heads(heads[:n]), **self.score(results(name), self.none)}
            for name, (n, scale) in named.items()
        ]

    def make_tests(
        self, heads: Sequence[Head], curve: Sequence[Mapping[str, Any]], best: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Return the methods of the test: no guidance, sets of every size and the best layer at every scale, all
        layers, CFG alone and with the chosen heads. best: {size, scale, layers: {scale: name}} on calibration."""
        methods = {"none": {"guidance": None, "title": "no guidance"}}
        at = {scale: f", scale {scale:g}" * (len(self.scales) > 1) for scale in self.scales}
        for point in curve:
            n, scale = point["size"], point["scale"]
            what = "best single head" if n == 1 else f"{n} heads"
            mark = " (chosen)" if (n, scale) == (best["size"], best["scale"]) else ""
            title = f"{what}{at[scale]}: {' '.join(point['heads'])}{mark}"
            methods[self.name_at(f"heads-{n}", scale)] = self.make_method(heads[:n], title, scale)
        for scale, layer in best["layers"].items():
            title = f"best layer{at[scale]}: {layer}"
            methods[self.name_at("layer", scale)] = self.make_method([layer], title, scale)
        title = f"all {len(self.layers)} layers{at[best['scale']]}"
        methods["all"] = self.make_method(self.layers, title, best["scale"])
        rest, has_cfg = configs.split_cfg(self.config["guidance"])
        if has_cfg:
            methods["cfg"] = {"guidance": rest, "title": "CFG, without heads"}
        elif w := self.cfg:
            cfg = [{"cfg": {"scale": w}}]
            chosen = set_layers(self.config["guidance"], heads[: best["size"]], best["scale"])
            methods["cfg"] = {"guidance": cfg, "title": f"CFG, w {w:g}"}
            methods["cfg-heads"] = {"guidance": chosen + cfg, "title": f"CFG, w {w:g}, and the chosen heads"}
        return methods

    def run_test(self, methods: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Compare methods on the test images.

        Returns per method and task its metrics, each with its interval and its paired change against no guidance.
        """
        results = self.run("test", "test", methods)
        functions = {name: f for name, f in self.objective.functions.items() if name not in self.metrics}
        none = results("none")
        none_score = self.objective.score(none)
        table: dict[str, Any] = {}
        for method, entry in methods.items():
            own = results(method)
            table[method] = {"title": entry["title"], "tasks": {}, "objective": self.score(own, none_score)}
            for result, plain in zip(own, none, strict=True):
                metrics = table[method]["tasks"][result.task] = {}
                for name in [*self.metrics, *functions]:
                    score, base = (one.score(name, functions.get(name)) for one in (result, plain))
                    interval = {} if score.shares is None else _estimate(score.shares, "low", "high")
                    metrics[name] = {"value": score.value, **interval, "change": compare_scores(score, base)}
        return table


def find_layers(backbone: str, offline: bool, options: Mapping[str, Any] | None = None) -> Mapping[str, AttentionLayer]:
    """Return the attention layers of a backbone: from configuration files alone, unless it is a single weight file.

    options: keywords of the loader of such a file.
    """
    folder = zoo.pull_configuration(backbone, offline or None)
    if folder.is_dir():
        return find_attention_layers(read_architecture(folder))
    options = {name: value for name, value in (options or {}).items() if name != "per_channel"}
    return zoo.load_backbone(backbone, offline=offline or None, options=options)[1].attention


def compare_scores(score: Score, none: Score) -> dict[str, float | None]:
    """Return score - none with the bootstrap interval of the paired differences over the images that both have."""
    if score.shares is None or none.shares is None:
        return {"mean": _finite(score.value - none.value), "low": None, "high": None}
    return _estimate(score.shares - none.shares[: len(score.shares)], "mean", "low", "high")


def _estimate(shares: Any, *keys: str) -> dict[str, float | None]:
    estimate = bootstrap_mean(shares)
    return {key: _finite(getattr(estimate, key)) for key in keys}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
