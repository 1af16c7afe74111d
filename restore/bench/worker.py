"""Computes batches and writes what they give: one image and one row at a time, atomically."""

from __future__ import annotations

import hashlib
import io as bytes_io
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from restore import disk
from restore.bench import datasets, sampling
from restore.bench.baselines import BASELINES
from restore.bench.batches import Batch, read_prompts
from restore.bench.config import settings
from restore.bench.sampling import Estimates
from restore.images import io
from restore.images.folder import to_file_name
from restore.metrics import single
from restore.metrics.table import BASE_METRICS
from restore.restoration import choose_device

# Of a Restorer's protocol, what the configuration does not say but the numbers may hang on.
MEASURED_WITH = ("weights", "precision", "torch", "device", "threads")
SPREAD_WHITE = 0.5  # the spread that is white in a spread map, on [-1, 1]: fixed, so that maps can be compared


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """torch's number of CPU threads inside (None: unchanged); the caller's again afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Worker:
    """Runs the batches of one configuration on one device, holding the backbone between them.

    config: as `load_config` returns it. run: the run's folder, which several workers may share. device: torch's
    name or "auto", config["device"] when None.
    """

    def __init__(
        self, config: Mapping[str, Any], run: Path, images: datasets.ImageSet | None, device: str | None = None
    ) -> None:
        self.config, self.run_folder, self.images = config, Path(run), images
        self.device = choose_device(device or config["device"])
        self.index = {key: i for i, key in enumerate(images.ids)} if images is not None else {}
        self.loaded: tuple[str, Any] | None = None

    def run(self, batch: Batch) -> dict[str, Any]:
        """Compute and write one batch; returns its cost (also written, under `cost`)."""
        with cpu_threads(self.config["threads"]):
            return self._run(batch)

    def _run(self, batch: Batch) -> dict[str, Any]:
        method, task = settings(self.config, batch.method, batch.task), self.config["tasks"][batch.task]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        # Loading the backbone is not part of the cost of a batch.
        model = None if method["sampler"] in BASELINES else self._model(task["backbone"] or self.config["backbone"])
        started, started_cpu = time.perf_counter(), time.process_time()
        made = self._compute(batch, task, method, model)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        sampled, sampled_cpu = time.perf_counter(), time.process_time()
        self._write(batch, made)
        cost = {
            "images": len(batch.ids),
            "seconds": sampled - started,
            "cpu_seconds": sampled_cpu - started_cpu,
            "seconds_writing": time.perf_counter() - sampled,
            "nfe": made.nfe,
            "steps": method["steps"],
            "peak_memory_mb": memory if math.isfinite(memory := self._peak_memory()) else None,
            "memory_of": "CUDA allocations" if self.device.type == "cuda" else "resident process",
            "worker": f"{platform.node()}:{os.getpid()}",
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
        }
        cost |= {"protocol": {key: made.protocol[key] for key in MEASURED_WITH if key in made.protocol}}
        folder = disk.make_folder(self.run_folder / "cost" / batch.task / batch.method)
        disk.write_json(folder / f"{batch.index:06d}.json", cost)
        return cost

    def _model(self, name: str) -> Any:
        if self.loaded is None or self.loaded[0] != name:
            self.loaded = None  # let go of one backbone before loading the next
            c = self.config
            if c["kind"] == "text_to_image":
                options = {"device": self.device, "precision": c["precision"], "offline": c["offline"]}
                self.loaded = (name, sampling.load_pipeline(name, **options))
            else:
                from restore.restorer import load

                options = {"device": str(self.device), "precision": c["precision"], "offline": c["offline"]}
                self.loaded = (name, load(name, checkpointing=c["checkpointing"], **options))
        return self.loaded[1]

    def _compute(self, batch: Batch, task: Mapping[str, Any], method: Mapping[str, Any], model: Any) -> Estimates:
        seed = self.config["seed"]
        if self.config["kind"] == "restoration":
            x = torch.stack([self.images.tensor(self.index[i]) for i in batch.ids])
            options = {"seed": seed, "samples": self.config["samples"], "device": self.device}
            return sampling.restore_batch(model, x, batch.ids, task, method, **options)
        if self.config["kind"] == "generation":
            return sampling.generate_batch(model, batch.ids, task, method, seed=seed)
        return sampling.pipeline_batch(model, batch.ids, self._prompts(batch, task), task, method, seed=seed)

    def _prompts(self, batch: Batch, task: Mapping[str, Any]) -> list[str]:
        if not task["prompts"]:
            return [""] * len(batch.ids)
        prompts = read_prompts(task["prompts"])
        if self.config["metrics"]["group_by_prompt"]:
            return [prompts[int(i.split("-")[0])] for i in batch.ids]
        return [prompts[int(i) % len(prompts)] for i in batch.ids]

    def _peak_memory(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if sys.platform == "win32":
            return math.nan
        import resource

        # Kilobytes on Linux, bytes on macOS; the peak of the whole process so far.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    def _write(self, batch: Batch, made: Estimates) -> None:
        """Pictures first, the row last: an image counts as done when its row is there."""
        folder = batch.results(self.run_folder)
        for name in ("rows", "samples", "spread"):
            disk.make_folder(folder / name)
        pixels = io.to_uint8(made.samples.flatten(0, 1)).reshape(*made.samples.shape[:2], *made.samples.shape[-2:], 3)
        several = made.samples.shape[1] > 1
        spreads = single.spread(made.samples) if several else None
        for b, image_id in enumerate(batch.ids):
            name = to_file_name(image_id)
            row: dict[str, Any] = {"image": image_id, "nfe": made.nfe}
            if self.images is not None:
                truth = self.images.pixels(self.index[image_id])
                self._once(self.run_folder / "truth" / f"{name}.png", truth)
                self._once(self.run_folder / "measurements" / batch.task / f"{name}.png", measurement_picture(made, b))
                for key, metric in BASE_METRICS.items():
                    value = float(metric.function(made.samples[b, :1], io.to_tensor(truth)))
                    row[key] = value if math.isfinite(value) else None  # JSON has no infinity
            if made.residual_ratio is not None:
                row["residual_ratio"] = float(made.residual_ratio[b])
            if several:
                row["spread"] = float(spreads[b])
                if self.images is not None:
                    inside = single.coverage(made.samples[b : b + 1], self.images.tensor(self.index[image_id])[None])
                    row["coverage"] = float(inside[0])
                for k in range(1, pixels.shape[1]):
                    disk.write_bytes(folder / "samples" / f"{name}-{k}.png", png(pixels[b, k]))
                deviation = made.samples[b].float().std(dim=0).mean(dim=0)
                grey = (deviation / SPREAD_WHITE * 255).clamp(0, 255).round().byte().numpy()
                disk.write_bytes(folder / "spread" / f"{name}.png", png(grey))
            content = png(pixels[b, 0])
            row["sha256"] = hashlib.sha256(content).hexdigest()
            disk.write_bytes(folder / f"{name}.png", content)
            disk.write_json(folder / "rows" / f"{name}.json", row)

    def _once(self, path: Path, pixels: np.ndarray) -> None:
        """Written by whichever worker comes first; all would write the same bytes."""
        if not path.exists():
            disk.write_bytes(disk.make_folder(path.parent) / path.name, png(pixels))


def png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) or (H, W) as the bytes of a PNG file, the same for the same pixels."""
    buffer = bytes_io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def measurement_picture(made: Estimates, b: int) -> np.ndarray:
    """The measurement of image b as it can be shown: clamped, grey as grey, at its own size."""
    y = made.measurement[b : b + 1]
    return io.to_uint8(y if y.shape[1] == 3 else y.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1))[0]
