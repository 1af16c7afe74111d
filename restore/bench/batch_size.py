"""`batch: auto`: the images that memory allows together, decided once for a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from operators import RestoreError
from restore.backbones.ambient import neutral_state
from restore.bench import sampling
from restore.bench.baselines import BASELINES
from restore.bench.batches import Batch, check_operators
from restore.bench.config import list_cells
from restore.bench.datasets import ImageSet
from restore.bench.worker import Worker
from restore.memory import choose_batch_size
from restore.restoration import prepare_measurement

LARGEST = 64  # images


def choose_batch(config: Mapping[str, Any], images: ImageSet) -> int:
    """Return the largest batch of a restoration benchmark that the free memory of this machine's device allows for
    each of its methods and tasks; 1 where images cannot share a batch."""
    if len(set(images.shapes)) > 1 or not _can_share(config, images):
        return 1
    batch, worker = min(len(images), LARGEST), Worker({**config, "compile": None}, Path(), images)
    for task, method in list_cells(config):
        if batch > 1 and worker.method(task, method).sampler not in BASELINES:
            batch = min(batch, _measure(worker, Batch(task, method, 0, tuple(images.ids[:1])), batch))
    worker.unload()  # the run loads its own
    return batch


def _can_share(config: Mapping[str, Any], images: ImageSet) -> bool:
    try:
        check_operators(config, images, 2)
    except RestoreError:
        return False
    return True


def _measure(worker: Worker, first: Batch, count: int) -> int:
    """Return how many images fit, of `count`; first: a batch of one image."""
    config, restorer = worker.config, worker.load_for(first.task)
    with neutral_state(worker.device), torch.enable_grad():
        x, task = worker.stack_images(first), config["tasks"][first.task]
        operator, y, size, _ = sampling.degrade_batch(x, first.ids, task, config["seed"])
        method = worker.method(first.task, first.method)
        method = sampling.complete_method(restorer, operator, method, size, config["samples"])
        y, shape = prepare_measurement(y, operator, restorer.device, restorer.channels, restorer.per_channel)
        samples = count * config["samples"]
        return choose_batch_size(restorer, operator, y, tuple(shape[-2:]), method, samples) // config["samples"] or 1
