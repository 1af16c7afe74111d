"""HeadHunter: greedy search for the attention heads to perturb (Algorithm 1 of arXiv 2506.10978), for any objective.

    S = {};  R times:  score(h) = mean over images and tasks of the objective of results guided on S + {h}, for all h;
                       S = S + the k best

Every round is a benchmark (restore.bench) in a folder of its own, a candidate one of its methods: results, resuming,
clusters and bytes are its business. The images of the search (`calibration`) and those of the numbers in the end
(`test`) are never the same.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from operators import RestoreError
from restore import disk
from restore.bench import run as benchmarks
from restore.bench.batches import Batch, image_ids
from restore.bench.config import load_config
from restore.bench.protocol import differences, format_differences
from restore.metrics.statistics import bootstrap_mean
from restore.search import config as configs
from restore.search.config import Head, benchmark, guidance_on, spelled
from restore.search.objective import Cell, Objective, cost, per_image

Progress = Callable[[dict[str, Any]], None]


@dataclass
class Found:
    """What `heads` found. folder: of the search. heads: the best set, in the order in which they were taken.

    guidance: as restore.guidance.build takes it. table: everything that the report says, search.json.
    """

    folder: Path
    heads: list[Head]
    guidance: list[dict[str, Any]]
    table: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a search takes. evaluations: (candidate, task) pairs on the calibration images, and methods x tasks on the
    test images; nfe and seconds: of all; None where nothing was measured."""

    candidates: int
    calibration: int
    test: int
    images: tuple[int, int]
    nfe: int | None
    seconds: float | None


def heads(
    config: str | os.PathLike | Mapping[str, Any], overrides: Sequence[str] = (), *, progress: Progress | None = None
) -> Found:
    """Search, or go on with a search, and write search.json, guidance.yaml, report.html and report.md.

    config, overrides: see restore.search.config; everything is in config.out, runs/<name> by default.
    halving: successive halving (Jamieson & Talwalkar 2016) within a round: all candidates on the first batch of
        images, the better half on twice as many, and so on; the report says what was skipped.
    progress: called with what a benchmark says and {phase}.
    Raises RestoreError before anything runs for mistakes, images in both halves, and a folder with another search.
    """
    from restore.search.pages import write

    hunt = Hunt(configs.load_config(config, overrides), progress)
    hunt.claim()
    chosen: list[Head] = []
    rounds = []
    for number in range(1, hunt.search["rounds"] + 1):
        rounds.append(hunt.round(number, chosen))
        chosen += [tuple(head) for head in rounds[-1]["chosen"]]
    curve = hunt.curve(chosen)
    best = min(curve, key=lambda point: (point["cost"], point["size"]))
    layers = sorted(rounds[0]["layers"], key=lambda entry: entry["cost"])
    found = {
        "name": hunt.search["name"],
        "objective": str(hunt.objective),
        "pool": hunt.pool,
        "none": rounds[0]["none"],
        "rounds": rounds,
        "curve": curve,
        "best": {"size": best["size"], "heads": spelled(chosen[: best["size"]]), "layer": layers[0]["name"]},
        "images": {part: images_of(c, hunt.images[part]) for part, c in hunt.checked.items()},
    }
    found["test"] = hunt.test(chosen, curve, best["size"], layers[0]["name"])
    guidance = guidance_on(hunt.search["guidance"], chosen[: best["size"]])
    disk.write_json(hunt.folder / "search.json", found)
    said = f"# {found['name']}: chosen on the calibration images by {found['objective']}, {best['cost']:.5g} with it,"
    said += f" {found['none']['cost']:.5g} without\n"
    disk.write_bytes(hunt.folder / "guidance.yaml", (said + yaml.safe_dump(guidance, sort_keys=False)).encode())
    found = json.loads(json.dumps(found))
    write(hunt.folder, found, hunt.search)
    return Found(hunt.folder, chosen[: best["size"]], guidance, found)


def images_of(config: Mapping[str, Any], images: Any) -> dict[str, Any]:
    if images is not None:
        return images.describe()
    return {"count": len(image_ids(config, next(iter(config["tasks"])), None)), "seed": config["seed"]}


class Hunt:
    """One search: its checked configuration, pool and folder."""

    def __init__(self, search: dict[str, Any], progress: Progress | None = None):
        self.search, self.progress = search, progress
        self.folder = Path(search["out"] or Path("runs") / search["name"])
        kind = search["rest"].get("kind", "restoration")
        self.objective = Objective.build(search["objective"], kind, search["clip"])
        asked = (search["rest"].get("metrics") or {}).get("names")
        asked = (["psnr", "ssim"] if kind == "restoration" else []) if asked is None else asked
        self.metrics = list(dict.fromkeys([*asked, *self.objective.metrics]))
        none = {"none": {}}
        self.checked = {
            part: load_config(benchmark(search, part, none, names, self.folder / part))
            for part, names in (("calibration", self.objective.metrics), ("test", self.metrics))
        }
        backbones = {task["backbone"] for task in self.checked["test"]["tasks"].values()} - {None}
        if backbones - {self.checked["test"]["backbone"]}:
            raise RestoreError("a search is about the heads of one backbone; leave `backbone` out of its tasks")
        self.images = configs.check_halves(**self.checked)
        self.pool = self._pool()
        self.layers = list(dict.fromkeys(layer for layer, _ in self.pool))
        if search["top"] * search["rounds"] > len(self.pool):
            wanted = f"rounds={search['rounds']} of top={search['top']}"
            raise RestoreError(f"{wanted} take more heads than the {len(self.pool)} there are")

    def _pool(self) -> list[Head]:
        from restore.restorer import load

        c = self.checked["test"]
        model = load(c["backbone"], device="cpu", precision=c["precision"], offline=c["offline"])
        return configs.all_heads(model.backbone.attention, self.search["layers"])

    def claim(self) -> None:
        """Make the folder, or make sure that it holds this search. Raises RestoreError otherwise."""
        drop = lambda part: {k: v for k, v in part.items() if k not in configs.CIRCUMSTANCES}  # noqa: E731
        identity = json.loads(json.dumps(drop({**self.search, "rest": drop(self.search["rest"])})))
        manifest = self.folder / "config.json"
        if manifest.exists():
            found = disk.read_json(manifest)
            if not isinstance(found, dict):
                raise RestoreError(f"{manifest} is damaged; start the search again in another folder")
            changed = differences(found, identity)
            if changed:
                raise RestoreError(
                    f"{self.folder} holds another search ({format_differences(changed)}); give out=FOLDER for the new"
                    " one, or undo the change to go on"
                )
        elif self.folder.exists() and any(not path.match(benchmarks.LEFTOVER) for path in self.folder.iterdir()):
            raise RestoreError(f"{self.folder} is not empty and holds no search; give another out=FOLDER")
        disk.write_json(disk.make_folder(self.folder) / manifest.name, identity)

    def guided(self, chosen: Sequence[Any], title: str | None = None) -> dict[str, Any]:
        return {"guidance": guidance_on(self.search["guidance"], chosen), "title": title}

    def run(
        self, part: str, where: str, methods: Mapping[str, Any], only: Callable[[Batch], bool] | None = None
    ) -> dict[str, Any]:
        """One benchmark, or what is left of it: its checked configuration."""
        metrics = self.metrics if part == "test" else self.objective.metrics
        config = benchmark(self.search, part, methods, metrics, self.folder / where)
        report = None if self.progress is None else lambda state: self.progress({"phase": where, **state})
        benchmarks.bench(config, progress=report, only=only)
        return load_config(config)

    def cells(
        self, part: str, where: str, method: str, config: Mapping[str, Any], first: int | None = None
    ) -> list[Cell]:
        """Its cells, one of each task, of the first so many images."""
        ids = [(task, tuple(image_ids(config, task, self.images[part])[:first])) for task in config["tasks"]]
        return [Cell(self.folder / where, config, task, method, of) for task, of in ids]

    def score(self, part: str, where: str, method: str, config: Any, none: Any = None) -> dict[str, Any]:
        """cost of a method, over how many images, and its change against `none` (shares) with the interval."""
        value, shares = cost(self.objective, cells := self.cells(part, where, method, config))
        entry = {"cost": value, "images": min(len(cell.rows) for cell in cells)}
        if none is not None:
            entry["change"] = changed(value, shares, *none)
        return entry

    def round(self, number: int, chosen: Sequence[Head]) -> dict[str, Any]:
        """Every head of the pool that is not chosen yet, added to those that are: ranked, and which were taken."""
        pool = [head for head in self.pool if head not in chosen]
        where = f"round-{number:02d}"
        names = {f"{layer}-{head}": (layer, head) for layer, head in pool}
        methods = {"none": {"guidance": None}} if number == 1 else {}
        methods |= {name: self.guided([*chosen, head]) for name, head in names.items()}
        if number == 1:
            methods |= {f"layer-{layer}": self.guided([layer]) for layer in self.layers}
            methods |= {"all": self.guided(self.layers)}
        skipped: list[dict[str, Any]] = []
        if self.search["halving"]:
            config = self._halving(where, methods, names, skipped)
        else:
            config = self.run("calibration", where, methods)
        if number == 1:
            self.none = cost(self.objective, self.cells("calibration", where, "none", config))
        scored = {m: self.score("calibration", where, m, config, self.none) for m in methods}
        ranking = sorted(names, key=lambda n: (-scored[n]["images"], scored[n]["cost"]))
        result = {
            "ranking": [{"head": list(names[name]), **scored[name]} for name in ranking],
            "chosen": [list(names[name]) for name in ranking[: self.search["top"]]],
            "skipped": skipped,
        }
        if number == 1:
            result["none"] = {k: v for k, v in scored["none"].items() if k != "change"}
            result["layers"] = [{"name": layer, **scored[f"layer-{layer}"]} for layer in self.layers]
            result["all"] = scored["all"]
        return result

    def _halving(self, where: str, methods: Any, names: Mapping[str, Head], skipped: list[dict[str, Any]]) -> Any:
        """The methods on all images, but of the candidates the worse half after each doubling no further."""
        c = self.checked["calibration"]
        count = len(image_ids(c, next(iter(c["tasks"])), self.images["calibration"]))
        batches, limit, left = math.ceil(count / c["batch"]), 1, list(names)
        if batches < 2:
            raise RestoreError(f"halving needs several batches of images: give batch= less than {count}")
        while True:
            waits = {n: limit if n in left else 0 for n in names}
            config = self.run(
                "calibration", where, methods, lambda b, until=waits: b.index < until.get(b.method, batches)
            )
            if limit >= batches:
                return config
            seen = min(limit * c["batch"], count)
            # Of these images alone: a search that goes on finds more, and must choose as it did before.
            scored = {n: cost(self.objective, self.cells("calibration", where, n, config, seen))[0] for n in left}
            ranked = sorted(left, key=scored.__getitem__)
            keep = ranked[: max(self.search["top"], math.ceil(len(left) / 2))]
            dropped = [list(names[n]) for n in ranked[len(keep) :]]
            skipped.append({"images": seen, "of": count, "heads": dropped})
            left = [n for n in left if n in keep]
            limit *= 2

    def sizes(self, total: int) -> list[int]:
        """Of the curve over the number of heads: what each round ended with, and powers of two between them."""
        ends = range(self.search["top"], total + 1, self.search["top"])
        return sorted({*ends, *(2**i for i in range(total.bit_length()))} - {0})

    def curve(self, chosen: Sequence[Head]) -> list[dict[str, Any]]:
        """The first n of the chosen heads on the calibration images."""
        sizes = self.sizes(len(chosen))
        config = self.run("calibration", "curve", {f"heads-{n}": self.guided(chosen[:n]) for n in sizes})
        return [
            {"size": n, "heads": spelled(chosen[:n])}
            | self.score("calibration", "curve", f"heads-{n}", config, self.none)
            for n in sizes
        ]

    def test(self, chosen: Sequence[Head], curve: Sequence[Mapping[str, Any]], best: int, layer: str) -> dict[str, Any]:
        """none, sets of every size, the best layer and all layers on the test images: per method and task its metrics,
        each with its interval and its paired change against none."""
        methods = {"none": {"guidance": None, "title": "no guidance"}}
        for point in curve:
            n = point["size"]
            what = "best single head" if n == 1 else f"{n} heads"
            mark = " (chosen)" if n == best else ""
            methods[f"heads-{n}"] = self.guided(chosen[:n], f"{what}: {' '.join(point['heads'])}{mark}")
        methods["layer"] = self.guided([layer], f"best layer: {layer}")
        methods["all"] = self.guided(self.layers, f"all {len(self.layers)} layers")
        config = self.run("test", "test", methods)
        own = {name: f for name, f in self.objective.own.items() if name not in self.metrics}
        none_cost = cost(self.objective, self.cells("test", "test", "none", config))
        table: dict[str, Any] = {}
        for method in methods:
            entry = table[method] = {"title": methods[method]["title"], "tasks": {}}
            entry["objective"] = self.score("test", "test", method, config, none_cost)
            bare = {c.task: c for c in self.cells("test", "test", "none", config)}
            for cell in self.cells("test", "test", method, config):
                shown = entry["tasks"][cell.task] = {}
                for name in [*self.metrics, *own]:
                    value, shares = per_image(cell, name, own.get(name))
                    shown[name] = {"value": value} | (interval(shares) if shares is not None else {})
                    shown[name]["change"] = changed(value, shares, *per_image(bare[cell.task], name, own.get(name)))
        return table


def interval(shares: Any) -> dict[str, float | None]:
    estimate = bootstrap_mean(shares)
    return {key: finite(getattr(estimate, key)) for key in ("low", "high")}


def changed(value: float, shares: Any, none: float, none_shares: Any) -> dict[str, Any]:
    """value − none with the bootstrap interval of the paired differences over the images that both have."""
    if shares is None or none_shares is None:
        return {"mean": finite(value - none), "low": None, "high": None}
    estimate = bootstrap_mean(shares - none_shares[: len(shares)])
    return {key: finite(getattr(estimate, key)) for key in ("mean", "low", "high")}


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def plan(config: str | os.PathLike | Mapping[str, Any], overrides: Sequence[str] = (), *, measure: bool = True) -> Plan:
    """How many evaluations a search takes, without halving; with `measure` their cost, extrapolated from two steps
    without guidance and with the first and the last head."""
    hunt = Hunt(configs.load_config(config, overrides))
    search, pool, tasks = hunt.search, hunt.pool, len(hunt.checked["test"]["tasks"])
    taken = [search["top"] * r for r in range(search["rounds"])]
    sizes = len(hunt.sizes(search["top"] * search["rounds"]))
    calibration = sum(len(pool) - n for n in taken) + len(hunt.layers) + 1 + sizes
    test = sizes + 2
    images = tuple(len(image_ids(c, next(iter(c["tasks"])), hunt.images[part])) for part, c in hunt.checked.items())
    nfe = seconds = None
    if measure:
        methods = {"none": {"guidance": None}, "first": hunt.guided(pool[:1]), "last": hunt.guided(pool[-1:])}
        config = benchmark(search, "calibration", methods, ["psnr"] * bool(hunt.images["test"]), hunt.folder / "absent")
        lines = benchmarks.dry_run(config)
        if all(line.seconds is not None for line in lines):
            # How much a guided pass shares with the plain one depends on the layer: the mean of the first and the last.
            each = {m: [sum(x.nfe for x in lines if x.method == m), sum(x.seconds for x in lines if x.method == m)]
                    for m in methods}  # fmt: skip
            images_guided = calibration * images[0] + test * images[1]
            nfe = each["first"][0] * images_guided + each["none"][0] * sum(images)
            seconds = (each["first"][1] + each["last"][1]) / 2 * images_guided + each["none"][1] * sum(images)
            seconds /= images[0]
    return Plan(len(pool), (calibration + 1) * tasks, (test + 1) * tasks, images, nfe, seconds)
