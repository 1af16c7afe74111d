"""What a photo will take, and how to restore it within the memory there is."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from operators.naming import AUTO
from restore import samplers
from restore.backbones.lean import count_copies
from restore.images.resampling import Resampling
from restore.memory.available import available_memory
from restore.memory.duration import format_range, widen
from restore.memory.measure import MemoryOptions, PassMeter, Workload, checkpoint_networks, count_weak_passes
from restore.memory.trace import SamplerTrace, run_dry, trace_sampler
from restore.method import Method
from restore.task import Task

# What LiveBytes does not see: the convolution library's copies and the allocator's fragments.
OVERHEAD, FIXED = 1.25, 100e6
FLOAT = 4  # bytes; samplers work in single precision
WRITING = 90  # bytes per pixel while the file is written
# Samples of a batch chosen by memory: at most so many (of a CPU: more do not fill it better), within so much of what is
# free, because the estimate is one.
LARGEST, LARGEST_ON_CPU, SHARE = 64, 8, 0.8
DRY_STEPS = 3  # of the sampler, to see its memory


@dataclass(frozen=True)
class Plan:
    """What one photo takes and how it will be restored.

    size: (H, W) of the result. windows: of the network, in one image. evaluations: of the network, per sample.
    seconds: of all samples as fast as this machine was when it was asked, None if it does not fit. busy: how many
    times faster it would be without the other programs that ran then. memory: bytes beyond those in use now;
    available: bytes that are free, None if unknown. batch: samples computed together.
    """

    size: tuple[int, int]
    method: str
    samples: int
    windows: int
    evaluations: int
    seconds: float | None
    memory: int
    available: int | None
    options: MemoryOptions
    busy: float = 1.0
    batch: int = 1

    @property
    def fits(self) -> bool:
        """Whether the memory suffices, as far as is known."""
        return self.available is None or self.memory <= self.available

    @property
    def checkpointing(self) -> bool:
        """Whether anything is computed again in the backward pass."""
        return self.options.recompute_windows or self.options.checkpoint_units

    def format(self) -> str:
        """Return the plan in one line."""
        parts = [f"{self.size[1]} x {self.size[0]}, {self.method}, {self.evaluations} evaluations"]
        parts += [f"{self.windows} windows"] * (self.windows > 1) + [f"{self.samples} samples"] * (self.samples > 1)
        free = "" if self.available is None else f" (free: {_format_bytes(self.available)})"
        parts += [] if self.seconds is None else [f"about {format_range(*widen(self.seconds, self.busy))}"]
        parts += [f"{_format_bytes(self.memory)} of memory{free}"]
        return ", ".join(parts + ["checkpointing"] * self.checkpointing)

    def explain_refusal(self, name: str) -> str:
        """Return why the photo of this name is not restored, as a message of RestoreError."""
        return (
            f"{name} would take {_format_bytes(self.memory)} of memory even with checkpointing and one window at a "
            f"time, and {_format_bytes(self.available)} are free; make the photo smaller, choose a sampler without "
            "gradients, or try it with force=True"
        )

    def describe(self) -> dict[str, Any]:
        """Return the plan for the side-car, ready for JSON."""
        described, options = dict(vars(self)), self.options
        del described["options"]
        names = {"max_windows": options.max_windows, "checkpointing": options.recompute_windows}
        return described | names | {"blocks": options.checkpoint_units}


class Planner:
    """Plans the restoration of photos by one Restorer; what they have in common is measured once.

    memory: bytes that may be used, None for those that are free. Not thread-safe.
    """

    def __init__(self, restorer: Any, memory: float | None = None) -> None:
        self.restorer, self.memory, self.meter = restorer, memory, PassMeter(restorer)

    def plan(
        self,
        task: Task,
        size: tuple[int, int],
        method: Method,
        *,
        samples: int = 1,
        batch_size: int | str = 1,
        resampled: Resampling | None = None,
        singly: int = 1,
    ) -> Plan:
        """Plan a restored image of this size (H, W). singly: number of channels that are restored by themselves.
        batch_size: of samples, or AUTO.

        The Restorer's options change only if memory requires it, first those that leave the result's bytes as they
        are: checkpointing, then fewer windows at a time. Raises RestoreError if the restoration itself would, before
        anything is computed.
        """
        size = (resampled.side, resampled.side) if resampled else size
        key = [task.describe(), size, method.describe()]
        trace = self.meter.once(key, lambda: trace_sampler(self.restorer, task, size, method))
        available, seconds = self._find_free(), None
        if batch_size == AUTO:
            batch = self._find_batch(size, method, trace, samples * singly, available)
        else:
            batch = min(samples * singly, int(batch_size))
        work = self._make_workload(size, method, trace, batch)
        for options in self._options(work):
            memory = self._memory(work, options, samples)
            if available is None or memory <= available:
                seconds = self._seconds(work, options) * math.ceil(samples * singly / batch)
                break
        sampler, steps = samplers.sampler_name(method.sampler), method.steps
        steps = steps if isinstance(steps, (int, str)) else len(steps)
        name = f"{sampler} in {steps} steps" if isinstance(steps, int) else f"{sampler} {steps}"
        evaluations = singly * trace.evaluations
        cost = (evaluations, seconds, int(memory), available, options, self.meter.busy, batch)
        return Plan(size, name, samples, work.windows, *cost)

    def choose_batch_size(
        self, operator: Any, y: torch.Tensor, size: tuple[int, int], method: Method, count: int
    ) -> int:
        """Return how many of `count` samples fit into memory at once: the count, or the most that a batch may have,
        halved until they fit. operator, y: of one image of this size (H, W)."""
        trace = run_dry(self.restorer, operator, y, size, method, DRY_STEPS)
        return self._find_batch(size, method, trace, count, self._find_free())

    def _find_free(self) -> int | None:
        return available_memory(self.restorer.device) if self.memory is None else int(self.memory)

    def _make_workload(self, size: tuple[int, int], method: Method, trace: SamplerTrace, batch: int) -> Workload:
        prior = self.restorer.prior(*size)
        h, w, tops, lefts = prior.window_grid(*prior.shape[1:])
        return Workload(prior, method, trace, batch, (h, w), len(tops) * len(lefts))

    def _find_batch(
        self, size: tuple[int, int], method: Method, trace: SamplerTrace, count: int, free: int | None
    ) -> int:
        batch = min(count, LARGEST_ON_CPU if self.restorer.device.type == "cpu" else LARGEST)
        while batch > 1 and free is not None:
            work = self._make_workload(size, method, trace, batch)
            if self._memory(work, next(self._options(work)), count) <= SHARE * free:
                break
            batch = math.ceil(batch / 2)
        return batch

    @contextmanager
    def apply(self, plan: Plan) -> Iterator[Any]:
        """Within the block, yield a Restorer with the plan's options."""
        restorer, options = copy.copy(self.restorer), plan.options
        changes = {"recompute_windows": options.recompute_windows, "max_windows": options.max_windows}
        restorer.windows = self.restorer.windows | changes
        with checkpoint_networks(self.restorer, options.checkpoint_units):
            yield restorer

    def _options(self, work: Workload) -> Iterator[MemoryOptions]:
        """Yield the options to try, the fastest first."""
        most, loaded = self.restorer.windows["max_windows"], self.restorer.windows["recompute_windows"]
        yield MemoryOptions(most, loaded, loaded)
        if not loaded and work.windows > 1:
            yield MemoryOptions(most, True, False)
        blocks = loaded or work.trace.gradient
        if not loaded and blocks:
            yield MemoryOptions(most, work.windows > 1, True)
        while work.windows > 1 and most > 1:
            most //= 2
            yield MemoryOptions(most, True, blocks)

    def _memory(self, work: Workload, options: MemoryOptions, samples: int) -> float:
        """Return the bytes beyond those in use: of the sampler's own tensors, of what the network retains for the
        backward pass, and the largest that it needs for a moment."""
        prior, trace = work.prior, work.trace
        pixels = prior.height * prior.width
        one, peak = self.meter.window_bytes(work, options)
        if work.recomputes_windows(options):
            one = FLOAT * math.prod(work.window) * prior.channels if trace.gradient else 0  # the input
        elif not trace.gradient and not count_weak_passes(work.method.guidance):
            one = 0
        retained = one * work.windows * work.batch
        transient = max(peak - one, 0) * work.windows_per_call(options)
        for name, gradient in trace.calls:
            if name in ("decode", "encode"):
                more, peak = self.meter.coder_bytes(prior, name, gradient, options)
                retained += more * work.batch
                transient = max(transient, (peak - more) * work.batch)
        network = OVERHEAD * (retained + transient) + work.batch * trace.bytes_per_pixel * pixels
        differentiates = any(gradient for _, gradient in trace.calls)  # then no pass runs lean
        backbone = self.restorer.backbone
        low = getattr(backbone, "dtype", None) == torch.bfloat16
        copied = 0 if differentiates else count_copies(backbone.network, low)
        return FIXED + copied + max(network, WRITING * pixels) + 2 * FLOAT * 3 * samples * pixels

    def _seconds(self, work: Workload, options: MemoryOptions) -> float:
        """Return the seconds of one batch: evaluations times the seconds of one, and those of the dry run."""
        prior, trace = work.prior, work.trace
        strong, weak = self.meter.window_seconds(work, options)
        seconds = work.batch * trace.seconds_per_pixel * prior.height * prior.width
        for (name, gradient), n in trace.calls.items():
            if name in ("decode", "encode"):
                seconds += n * work.batch * self.meter.coder_seconds(prior, name, gradient, options)
        weak /= max(1, count_weak_passes(work.method.guidance))
        return seconds + (trace.count("predict") * strong + trace.count("weak") * weak) * work.windows * work.batch


def _format_bytes(n: float) -> str:
    return f"{max(n, 0) / 1e9:.1f} GB"


def choose_batch_size(
    restorer: Any,
    operator: Any,
    y: torch.Tensor,
    size: tuple[int, int],
    method: Method,
    count: int,
    memory: float | None = None,
) -> int:
    """Return how many of `count` samples a Restorer computes at once for batch_size="auto".

    operator, y: of one image of this size (H, W). memory: bytes that may be used, None for those that are free now.
    Raises RestoreError if the restoration would.
    """
    return 1 if count == 1 else Planner(restorer, memory).choose_batch_size(operator, y, size, method, count)
