"""The same batches on a Ray cluster (extra `cluster`): one worker per GPU or per share of the CPUs.

All workers see the run's folder (a shared file system on several machines) and write results as the local engine
does, so a run may be started with one engine and finished with the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from operators import RestoreError
from restore.bench import datasets
from restore.bench.batches import Batch

MAX_FAILURES = 3


def run_batches(
    batches: Sequence[Batch],
    config: Mapping[str, Any],
    run: Path,
    images: datasets.ImageSet | None,
    finished: Callable[[Batch, dict[str, Any]], None],
) -> None:
    """Compute `batches` on every worker there is, each taking the next one when it is free.

    config.workers: how many; None: one per GPU of the cluster, or per `worker.cpus` CPUs where there is none.
    A batch whose worker dies is given to another; the third death over the same one raises RestoreError, as does
    a mistake that the worker itself reports. finished: called with every batch and its cost, in the order they end.
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

        _distribute(ray, deque(batches), [start() for _ in range(number)], start, finished)
    finally:
        if started_here:
            ray.shutdown()


def _distribute(ray, waiting: deque, workers: list, start: Callable[[], Any], finished) -> None:
    failures: dict[str, int] = {}
    running = {}

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
            failures[batch.key] = failures.get(batch.key, 0) + 1
            if failures[batch.key] >= MAX_FAILURES:
                raise RestoreError(
                    f"{MAX_FAILURES} workers died over batch {batch.key}, the last with {type(error).__name__};"
                    " what is finished is kept: lower batch or give a worker more memory, and start again"
                ) from error
            waiting.appendleft(batch)
            give(start())
            continue
        finished(batch, cost)
        give(worker)
