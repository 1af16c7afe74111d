"""Runs that grow: more images, methods and tasks in the folder of a run, without computing anything twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from restore.bench.datasets import ImageSet


def restrict_identity(
    identity: Mapping[str, Any], images: ImageSet | None, existing: Mapping[str, Any], count: int | None, grouped: bool
) -> dict[str, Any]:
    """Return the part of a run's identity that an existing run has: its methods, tasks and first images.

    The existing run can grow to this one if that part is the existing identity, as its results are then those of the
    first batches of the same cells: an image's noise and starting point depend on its id, and a batch that the
    existing run ended with, before it was full, is computed again in whole.

    images: of this run, None for generation. count: of the existing run's images. grouped: generated images are
    ordered by prompt, so that more of them are other batches.
    """
    config, before = dict(identity["config"]), existing["config"]
    config["methods"] = {
        name: _restrict_tasks(method, before["methods"][name], before["tasks"])
        for name, method in config["methods"].items()
        if name in before["methods"]
    }
    config["tasks"] = {
        name: task if grouped else _restrict_count(task, before["tasks"][name])
        for name, task in config["tasks"].items()
        if name in before["tasks"]
    }
    restricted = {**identity, "config": config}
    if images is not None and count is not None and count < len(images):
        config["data"] = {**config["data"], "limit": before["data"]["limit"]}
        restricted["images"] = images.first(count).digest
    parts = {"backbone": existing["backbone"], "prompts": before["tasks"], "code": existing.get("code", {})}
    for key, names in parts.items():
        restricted[key] = {name: value for name, value in identity.get(key, {}).items() if name in names}
    for name, files in restricted["backbone"].items():
        recorded = existing["backbone"][name]
        if not any(file.endswith(".json") for file in recorded):  # earlier versions recorded weights alone
            restricted["backbone"][name] = {file: files[file] for file in files if file in recorded}
    if not restricted["code"]:  # runs without any have no such entry
        del restricted["code"]
    return restricted


def _restrict_tasks(method: Mapping[str, Any], before: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """A method on the tasks that it has run on; it has no results on the others, so their settings may change.

    tasks: of the existing run, all of which a method runs on whose `only` is None."""
    ran = [task for task in tasks if before["only"] is None or task in before["only"]]
    left = [task for task in ran if method["only"] is None or task in method["only"]]
    changes = {task: entry for task, entry in before["per_task"].items() if task not in ran}
    changes |= {task: entry for task, entry in method["per_task"].items() if task in ran}
    return {**method, "only": before["only"] if left == ran else left, "per_task": changes}


def _restrict_count(task: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Generated images are numbered from 0 on, so that the first ones are the same."""
    counts = before.get("count"), task.get("count")
    return {**task, "count": min(counts) if all(counts) else task.get("count")}
