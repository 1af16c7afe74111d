"""The batches of a run on a Ray cluster (extra `cluster`): one worker per GPU, or per share of the CPUs.

All workers share the run's folder (on several machines, a shared file system) and write results as the local engine
does, so that a run may be started with one engine and finished with the other.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from operators import RestoreError
from restore.bench.batches import Batch
from restore.bench.datasets import ImageSet

MAX_FAILURES = 3


def run_batches(
    batches: Sequence[Batch], config: Mapping[str, Any], run: Path, images: ImageSet | None, finish: Callable
) -> None:
    """Compute batches on several workers, each of which takes the next one when it is free.

    config.workers: their number; None: one per GPU of the cluster, or per `worker.cpus` CPUs if there is none.
    finish: called with every batch and its cost, in the order in which they end.
    A batch whose worker dies is given to another. Raises RestoreError at the third death over one batch, and if a
    worker does.
    """
    try:
        import ray
    except ImportError as error:
        raise RestoreError("engine=ray needs Ray; install restore-diffusion[cluster], or use engine=local") from error
    from restore.bench.worker import Worker

    started_here = not ray.is_initialized()
    if started_here:
        ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
    try:
        cluster = ray.cluster_resources()
        gpus = config["worker"]["gpus"]
        gpus = (1 if cluster.get("GPU", 0) else 0) if gpus is None else gpus
        cpus = config["worker"]["cpus"]
        fitting = int(cluster.get("GPU", 0) / gpus) if gpus else int(cluster.get("CPU", 1) / max(cpus, 1e-9))
        number = min(config["workers"] or max(fitting, 1), len(batches))
        if number > max(fitting, 1):
            raise RestoreError(f"workers={number} do not fit the cluster, which has room for {max(fitting, 1)}")
        actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(Worker)

        def start() -> Any:
            return actor.remote(config, run, images, "cuda" if gpus and config["device"] == "auto" else None)

        _distribute(ray, deque(batches), [start() for _ in range(number)], start, finish)
    finally:
        if started_here:
            ray.shutdown()


def _distribute(ray, waiting: deque, workers: list, start: Callable[[], Any], finish) -> None:
    failures, running = Counter(), {}

    def give(worker: Any) -> None:
        if waiting:
            batch = waiting.popleft()
            running[worker.run.remote(batch)] = (worker, batch)

    for worker in workers:
        give(worker)
    while running:
        (ready, *_), _ = ray.wait(list(running), num_returns=1)
        worker, batch = running.pop(ready)
        try:
            cost = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, RestoreError) else None
            raise RestoreError(str(cause) if cause else f"batch {batch.key} failed: {error}") from error
        except ray.exceptions.RayError as error:
            # The worker died (killed, out of memory, node lost): its batch goes to a new one.
            failures[batch.key] += 1
            if failures[batch.key] >= MAX_FAILURES:
                raise RestoreError(
                    f"{MAX_FAILURES} workers died over batch {batch.key}, the last with {type(error).__name__};"
                    " what is finished is kept: lower batch or give a worker more memory, and start again"
                ) from error
            waiting.appendleft(batch)
            give(start())
            continue
        finish(batch, cost)
        give(worker)
