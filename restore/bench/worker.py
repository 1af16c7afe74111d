"""Computes batches and writes their results: one image and one row at a time, atomically."""

from __future__ import annotations

import hashlib
import io as bytes_io
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from operators import RestoreError
from restore import disk
from restore.backbones.graphs import compile_networks
from restore.backbones.memory_options import free_memory
from restore.backbones.text_to_image import PipelineOptions
from restore.bench import sampling
from restore.bench.baselines import BASELINES
from restore.bench.batches import Batch, list_image_ids, list_prompts
from restore.bench.config import build_method
from restore.bench.datasets import ImageSet
from restore.bench.sampling import Estimates
from restore.images import io
from restore.images.folder import to_file_name
from restore.method import Method
from restore.metrics import single
from restore.metrics.table import BASE_METRICS
from restore.restoration import choose_device

# Parts of a Restorer's protocol that the configuration does not state but the numbers may depend on.
MEASURED_WITH = ("weights", "precision", "compiled", "torch", "device", "threads", "arithmetic")
SPREAD_WHITE = 0.5  # the spread that is white in a spread map, on [-1, 1]: fixed, so that maps can be compared


@contextmanager
def set_cpu_threads(number: int | None) -> Iterator[None]:
    """Within the block, set torch's number of CPU threads (None: unchanged)."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Worker:
    """Runs the batches of one configuration on one device; the backbone stays loaded between them.

    config: from `load_config`. run: the run's folder, which several workers may share. device: torch's name or
    "auto", by default config["device"].
    """

    def __init__(
        self, config: Mapping[str, Any], run: Path, images: ImageSet | None, device: str | None = None
    ) -> None:
        self.config, self.run_folder, self.images = config, Path(run), images
        self.device = choose_device(device or config["device"])
        self.index = {key: i for i, key in enumerate(images.ids)} if images is not None else {}
        self.loaded: tuple[Any, Any] | None = None
        self.method = cache(partial(build_method, config))

    def run(self, batch: Batch) -> dict[str, Any]:
        """Compute and write one batch; return its cost, which is also written, under `cost`."""
        with set_cpu_threads(self.config["threads"]):
            return self._run(batch)

    def run_all(self, batches: Iterable[Batch], overlap: bool | None = None) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Compute batches; yield each, with its cost, when it is on disk.

        overlap: write a batch while the next one is computed; None: where the processor is not what computes. An error,
        of computing or of writing, is raised when all that was computed before it is written.
        """
        if not (self.device.type != "cpu" if overlap is None else overlap):
            yield from ((batch, self.run(batch)) for batch in batches)
            return
        written: Future | None = None
        with ThreadPoolExecutor(1) as pool:
            for batch in batches:
                try:
                    with set_cpu_threads(self.config["threads"]):
                        computed = self._sample(batch, time.thread_time)
                except RestoreError as error:
                    if written is not None and (other := written.exception()) is not None:
                        raise RestoreError(f"{error}; nor was the batch before written: {other}") from error
                    raise
                before, written = written, pool.submit(self._record_later, batch, *computed)
                if before is not None:
                    yield before.result()
            if written is not None:
                yield written.result()

    def _record_later(self, batch: Batch, *computed: Any) -> tuple[Batch, dict[str, Any]]:
        with set_cpu_threads(self.config["threads"]):
            return batch, self._record(batch, *computed)

    def _run(self, batch: Batch) -> dict[str, Any]:
        cost, estimates = self._sample(batch, time.process_time)
        return self._record(batch, cost, estimates)

    def _sample(self, batch: Batch, clock: Callable[[], float]) -> tuple[dict[str, Any], Estimates]:
        """Compute a batch; return its cost so far, and its images. clock: seconds of the processor."""
        method, is_cuda = self.method(batch.task, batch.method), self.device.type == "cuda"
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        # Loading the backbone is not part of the cost of a batch.
        model = None if method.sampler in BASELINES else self.load_for(batch.task)
        started, started_cpu = time.perf_counter(), clock()
        estimates = self._compute(batch, method, model)
        if is_cuda:
            torch.cuda.synchronize(self.device)
        sampled, sampled_cpu = time.perf_counter(), clock()
        cost = {
            "images": len(batch.ids),
            "seconds": sampled - started - estimates.loading_seconds,
            "cpu_seconds": sampled_cpu - started_cpu,
            "seconds_writing": None,
            "nfe": estimates.nfe,
            "steps": method.steps,
            "peak_memory_mb": self._peak_memory(),
            "process_memory_mb": self._process_memory(),
            "seconds_loop": estimates.loop_seconds,
            "memory_of": "CUDA allocations" if is_cuda else "resident process",
            "worker": f"{platform.node()}:{os.getpid()}",
            "device": torch.cuda.get_device_name(self.device) if is_cuda else platform.machine(),
            "protocol": {key: estimates.protocol[key] for key in MEASURED_WITH if key in estimates.protocol},
        }
        return cost, estimates

    def _record(self, batch: Batch, cost: dict[str, Any], estimates: Estimates) -> dict[str, Any]:
        """Write a batch and its cost; return the cost."""
        started = time.perf_counter()
        self._write(batch, estimates)
        cost["seconds_writing"] = time.perf_counter() - started
        folder = disk.make_folder(self.run_folder / "cost" / batch.task / batch.method)
        disk.write_json(folder / f"{batch.index:06d}.json", cost)
        return cost

    def unload(self) -> None:
        """Free the backbone: it makes room for the next one, or for the networks of metrics."""
        if self.loaded is not None:
            self.loaded = None
            free_memory(self.device)

    def load_for(self, task: str) -> Any:
        """Return the Restorer or pipeline of a task."""
        own = self.config["tasks"][task]
        named = own if own["backbone"] else self.config
        return self._load(named["backbone"], named["model_options"])

    def _knows_grey(self, task: str) -> bool:
        """Return whether the prior of a task takes grey images alone; baselines beside it then get them too."""
        if all(method["sampler"] in BASELINES for method in self.config["methods"].values()):
            return False
        restorer = self.load_for(task)
        return restorer.channels == 1 and not restorer.per_channel

    def _load(self, name: str, given: Mapping[str, Any]) -> Any:
        """Return the Restorer, with the options of restore.load, or, for text_to_image, the pipeline of this name."""
        key = (name, dict(given))
        if self.loaded is None or self.loaded[0] != key:
            self.unload()
            options = {"precision": self.config["precision"], "offline": self.config["offline"]}
            if self.config["kind"] == "text_to_image":
                options |= {"options": PipelineOptions(**self.config["pipeline"]), "upcoming": self._all_prompts()}
                options["negatives"] = {task["negative_prompt"] for task in self.config["tasks"].values()}
                self.loaded = (key, sampling.load_pipeline(name, device=self.device, **options))
            else:
                from restore.restorer import load

                options["checkpointing"] = self.config["checkpointing"]
                self.loaded = (key, load(name, device=str(self.device), **options, **given))
                if self.config["compile"] is not None:
                    compile_networks(self.loaded[1], self.config["compile"])
        return self.loaded[1]

    def _all_prompts(self) -> list[str]:
        """Return the prompts of the run in the order of its batches, which go from task to task."""
        ids = {task: list_image_ids(self.config, task, None) for task in self.config["tasks"]}
        size, longest = self.config["batch"], max(map(len, ids.values()))
        parts = [(task, of[i : i + size]) for i in range(0, longest, size) for task, of in ids.items()]
        return [prompt for task, part in parts for prompt in list_prompts(self.config, task, part)]

    def _compute(self, batch: Batch, method: Method, model: Any) -> Estimates:
        task, seed = self.config["tasks"][batch.task], self.config["seed"]
        if self.config["kind"] == "restoration":
            options = {"seed": seed, "samples": self.config["samples"], "device": self.device}
            return sampling.restore_batch(model, self.stack_images(batch), batch.ids, task, method, **options)
        if self.config["kind"] == "generation":
            return sampling.generate_batch(model, batch.ids, task, method, seed=seed)
        prompts = list_prompts(self.config, batch.task, batch.ids)
        return sampling.run_pipeline(model, batch.ids, prompts, task, method, seed=seed)

    def stack_images(self, batch: Batch) -> torch.Tensor:
        """Return the images of a batch, (B, 3, H, W), or (B, 1, H, W) if they are grey and so is the prior."""
        x = torch.stack([self.images.tensor(self.index[i]) for i in batch.ids])
        return x[:, :1] if bool((x == x[:, :1]).all()) and self._knows_grey(batch.task) else x

    def _peak_memory(self) -> float | None:
        """Return the MiB of the device with CUDA, else of the whole process so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if sys.platform == "win32":
            return None
        import resource

        # Kilobytes on Linux, bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    def _process_memory(self) -> float | None:
        """Return the MiB in use on the whole device with CUDA, as nvidia-smi shows them, else those of the process."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return (total - free) / 2**20
        return self._peak_memory()

    def _write(self, batch: Batch, estimates: Estimates) -> None:
        """Write pictures first and the row last: an image counts as done if its row exists."""
        folder, samples = batch.folder(self.run_folder), estimates.samples
        for name in ("rows", "samples", "spread"):
            disk.make_folder(folder / name)
        pixels = io.to_uint8(samples.flatten(0, 1)).reshape(*samples.shape[:2], *samples.shape[-2:], 3)
        spreads = single.spread(samples) if samples.shape[1] > 1 else None
        for b, image_id in enumerate(batch.ids):
            name, i = to_file_name(image_id), self.index.get(image_id)
            row: dict[str, Any] = {"image": image_id, "nfe": estimates.nfe}
            files: dict[Path, np.ndarray] = {}  # beside the result
            if self.images is not None:
                truth = self.images.pixels(i, estimates.margin)
                y = estimates.measurement[b : b + 1]  # drawn in grey if it does not have three channels
                y = io.to_uint8(y if y.shape[1] == 3 else y.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1))[0]
                own = f"truth/{batch.task}" if any(estimates.margin) else "truth"
                for place, picture in ((own, truth), (f"measurements/{batch.task}", y)):
                    files[disk.make_folder(self.run_folder / place) / f"{name}.png"] = picture
                for key, metric in BASE_METRICS.items():
                    value = float(metric.function(samples[b, :1], io.to_tensor(truth)))
                    row[key] = value if math.isfinite(value) else None  # JSON has no infinity
            if estimates.residual_ratio is not None:
                row["residual_ratio"] = float(estimates.residual_ratio[b])
            if spreads is not None:
                row["spread"] = float(spreads[b])
                if self.images is not None:
                    exact = self.images.tensor(i, estimates.margin)[None]
                    row["coverage"] = float(single.coverage(samples[b : b + 1], exact)[0])
                for k in range(1, pixels.shape[1]):
                    files[folder / "samples" / f"{name}-{k}.png"] = pixels[b, k]
                deviation = samples[b].float().std(dim=0).mean(dim=0)
                grey = (deviation / SPREAD_WHITE * 255).clamp(0, 255).round().byte().numpy()
                files[folder / "spread" / f"{name}.png"] = grey
            for path, picture in files.items():
                digest = write_png(path, picture)
                row.setdefault("files", {})[path.relative_to(self.run_folder).as_posix()] = digest
            row["sha256"] = write_png(folder / f"{name}.png", pixels[b, 0])
            disk.write_json(folder / "rows" / f"{name}.json", row)


def write_png(path: Path, pixels: np.ndarray) -> str:
    """Write uint8 (H, W, 3) or (H, W) as a PNG file and return its SHA-256."""
    content = encode_png(pixels)
    digest = hashlib.sha256(content).hexdigest()
    if not disk.has_hash(path, digest):  # all workers write the same truth and measurements
        disk.write_bytes(path, content)
    return digest


def encode_png(pixels: np.ndarray) -> bytes:
    """Return uint8 (H, W, 3) or (H, W) as the bytes of a PNG file, the same for the same pixels."""
    buffer = bytes_io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
