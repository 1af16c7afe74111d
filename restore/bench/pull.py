"""The models that a benchmark needs, and their download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from restore import zoo
from restore.bench.config import build_method, list_cells
from restore.bench.results import metric_options
from restore.guidance import describe_guidance
from restore.metrics import scores, table


def list_needed_models(config: Mapping[str, Any]) -> list[str]:
    """Return the names of a complete configuration's priors, autoencoders, weak models and networks of metrics, each
    once; what is given as a file or a folder is left out."""
    cells = [(config["tasks"][task], build_method(config, task, method)) for task, method in list_cells(config)]
    priors = [task if task["backbone"] else config for task, _ in cells]
    names = [prior["backbone"] for prior in priors]
    given = [(prior["backbone"], prior["model_options"].get("vae")) for prior in priors]
    names += [zoo.find_autoencoder(zoo.locate(name), vae) for name, vae in given if vae is not None]
    terms = [term for _, method in cells for term in describe_guidance(method.guidance) or []]
    names += [term["autoguidance"]["model"] for term in terms if "autoguidance" in term]
    options = metric_options(config)
    metrics = table.select_metrics(config["metrics"]["names"]).values()
    networks = [row.network(options)[0] for row in metrics if row.network is not None]
    names += [name for name in networks if name not in options.weights]
    found = [zoo.locate(name) for name in dict.fromkeys(map(str, names))]
    return [each.name for each in found if each.entry is not None or each.hub is not None]


def pull_needed_models(config: Mapping[str, Any]) -> Iterator[str]:
    """Download the models that a benchmark needs, yielding a line before and after each: its size and licence, then
    where it is. Raises RestoreError for one that cannot be fetched."""
    names = list_needed_models(config)
    missing = [name for name in names if zoo.locate(name).path is None]
    for name in names:
        yield f"{name}: {zoo.describe_download(name)}" if name in missing else f"{name}: on this machine"
    given = metric_options(config)
    of_prompts = table.select_metrics(config["metrics"]["names"], "prompt")
    models = dict.fromkeys(model for row in of_prompts.values() for model in row.models if model not in given.models)
    for name in models:
        yield f"{name}: {scores.describe_download(name)}"
    for name in missing:
        where = {"offline": config["offline"] or None, "variant": config["pipeline"]["variant"]}
        yield f"{name} is at {zoo.pull(name, **where)}"
    if models:
        for name, row in of_prompts.items():
            table.load_scores({name: row}, given)  # its client fetches what is missing
        yield f"{', '.join(models)}: on this machine"
