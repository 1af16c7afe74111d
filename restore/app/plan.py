"""Before a photo is restored: the memory and the time it will take here, and how to stay under the memory there is.

Bytes of the network are counted on tensors without data (restore.bench.cost), its seconds measured on one evaluation
of as many windows as a call has; the sampler's and the operator's share comes from a rehearsal.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from operators import RestoreError
from restore import samplers
from restore.app.machine import available_memory
from restore.app.rehearsal import Demand, rehearse
from restore.backbones.checkpointing import set_checkpointing
from restore.backbones.sizes import Sized
from restore.bench.cost import counting
from restore.guidance import describe_guidance, estimator
from restore.images.resampling import Resampling
from restore.method import Method
from restore.task import Task

# What LiveBytes does not see: the convolution library's copies and the allocator's fragments.
OVERHEAD, FIXED = 1.25, 100e6
FLOAT = 4  # bytes; samplers work in single precision
TIMED = 4  # windows of the evaluation whose time is taken, at most
WRITING = 90  # bytes per pixel while the file is made


@dataclass(frozen=True)
class Plan:
    """What one photo takes and how it will be restored.

    size: (H, W) of the result. windows: that the network sees of it. evaluations: of the network per sample.
    seconds: of all samples, None where it does not fit. memory: bytes beyond what is in use now; available: bytes there
    are, None where nobody knows. max_windows, checkpointing: see Sized; blocks: every block of the network is
    checkpointed too.
    """

    size: tuple[int, int]
    method: str
    samples: int
    windows: int
    evaluations: int
    seconds: float | None
    memory: int
    available: int | None
    max_windows: int
    checkpointing: bool
    blocks: bool

    @property
    def fits(self) -> bool:
        return self.available is None or self.memory <= self.available

    def line(self) -> str:
        """In one line for a person."""
        parts = [f"{self.size[1]} x {self.size[0]}, {self.method}, {self.evaluations} evaluations"]
        parts += [f"{self.windows} windows"] * (self.windows > 1) + [f"{self.samples} samples"] * (self.samples > 1)
        free = "" if self.available is None else f" (free: {_gigabytes(self.available)})"
        parts += [] if self.seconds is None else [f"about {duration(self.seconds)}"]
        parts += [f"{_gigabytes(self.memory)} of memory{free}"]
        return ", ".join(parts + ["checkpointing"] * (self.checkpointing or self.blocks))

    def refusal(self, name: str) -> str:
        return (
            f"{name} would take {_gigabytes(self.memory)} of memory even with checkpointing and one window at a time, "
            f"and {_gigabytes(self.available)} are free: make the photo smaller, take a sampler without gradients, or "
            "give force=True to try it"
        )

    def describe(self) -> dict[str, Any]:
        """For the side-car."""
        return dataclasses.asdict(self)


class Planner:
    """Plans for the photos of one Restorer; what they have in common is measured once.

    memory: the bytes that may be used, None for those that are free. Not for several threads.
    """

    def __init__(self, restorer: Any, memory: float | None = None) -> None:
        self.restorer, self.memory = restorer, memory
        self.kept: dict[str, Any] = {}

    def plan(
        self,
        task: Task,
        size: tuple[int, int],
        method: Method,
        *,
        samples: int = 1,
        batch_size: int = 1,
        resampled: Resampling | None = None,
    ) -> Plan:
        """For a restored image of this size (H, W). The options are changed only where the memory needs it, those
        first that leave the result's bytes as they are: checkpointing, then fewer windows at a time.

        Raises RestoreError where the restoration itself would, before anything is computed.
        """
        size = (resampled.side, resampled.side) if resampled else size
        key = [task.describe(), size, method.describe()]
        demand = self._once(key, lambda: rehearse(self.restorer, task, size, method))
        prior, batch = self.restorer.sized(*size), min(samples, batch_size)
        h, w, tops, lefts = prior.cuts(*prior.shape[1:])
        windows = len(tops) * len(lefts)
        available = available_memory(self.restorer.device) if self.memory is None else int(self.memory)
        for way in self._ways(windows, demand):
            memory = self._memory(prior, demand, method, batch, samples, *way)
            if available is None or memory <= available:
                seconds = self._seconds(prior, demand, method, batch, *way) * math.ceil(samples / batch)
                break
        else:
            seconds = None
        sampler, steps = samplers.sampler_name(method.sampler), method.steps
        name = f"{sampler} in {steps} steps" if isinstance(steps, int) else f"{sampler} {steps}"
        return Plan(size, name, samples, windows, demand.evaluations, seconds, int(memory), available, *way)

    @contextmanager
    def followed(self, plan: Plan) -> Iterator[Any]:
        """The Restorer that restores as planned."""
        restorer = copy.copy(self.restorer)
        restorer.windows = self.restorer.windows | {
            "checkpointing": plan.checkpointing,
            "max_windows": plan.max_windows,
        }
        with self._blocks(plan.blocks):
            yield restorer

    def _ways(self, windows: int, demand: Demand) -> Iterator[tuple[int, bool, bool]]:
        """(max_windows, checkpointing, blocks), the fastest first."""
        most, kept = self.restorer.windows["max_windows"], self.restorer.windows["checkpointing"]
        yield most, kept, kept
        if not kept and windows > 1:
            yield most, True, False
        blocks = kept or demand.gradient
        if not kept and blocks:
            yield most, windows > 1, True
        while windows > 1 and most > 1:
            most //= 2
            yield most, True, blocks

    def _memory(
        self,
        prior: Sized,
        demand: Demand,
        method: Method,
        batch: int,
        samples: int,
        most: int,
        kept: bool,
        blocks: bool,
    ) -> float:
        """Bytes beyond those in use: of the sampler's own tensors, what the network keeps until the backward, and the
        most that it needs for a moment."""
        h, w, tops, lefts = prior.cuts(*prior.shape[1:])
        windows = len(tops) * len(lefts) * batch
        at_once = min(windows, max(1, most // batch) * batch)
        again = kept and len(tops) * len(lefts) > 1  # windows are computed again in the backward
        pixels = prior.height * prior.width
        one, peak = self._bytes(prior, (h, w), method, demand, blocks, not again)
        if again:
            one = FLOAT * h * w * prior.channels if demand.gradient else 0  # what was cut out
        elif not demand.gradient and not _guided(method):
            one = 0
        held, moment = one * windows, max(peak - one, 0) * at_once
        for (what, gradient), _ in demand.calls.items():
            if what in ("decode", "encode"):
                more, most_of_it = self._code_bytes(prior, what, gradient, blocks)
                held += more * batch
                moment = max(moment, (most_of_it - more) * batch)
        network = OVERHEAD * (held + moment) + batch * demand.state * pixels
        return FIXED + max(network, WRITING * pixels) + 2 * FLOAT * 3 * samples * pixels

    def _bytes(self, prior, window, method, demand, blocks: bool, share: bool) -> tuple[int, int]:
        """(kept after the strong pass, peak) of one window."""

        def count(method: Method = method) -> tuple[int, int]:
            try:
                with self._blocks(blocks), counting(prior.inner) as live:
                    kept, _, _ = self._pass(prior, window, 1, method, demand, share, live)
            except Exception as error:
                # A guidance of the user's own may look at values, which tensors without data do not have.
                if method.guidance is None or isinstance(error, RestoreError):
                    raise
                return count(dataclasses.replace(method, guidance=None))
            return kept, live.peak

        return self._once(["bytes", window, describe_guidance(method.guidance), demand.gradient, blocks, share], count)

    def _code_bytes(self, prior: Sized, what: str, gradient: bool, blocks: bool) -> tuple[int, int]:
        """The same of the autoencoder for the whole image."""

        def count() -> tuple[int, int]:
            with self._blocks(blocks), counting(prior.inner) as live:
                x, out = _coded(prior, what, gradient)
                kept = live.now if gradient else 0
                if gradient:
                    torch.autograd.grad(out.sum(), x)
            return kept, live.peak

        return self._once([what, "bytes", prior.shape, gradient, blocks], count)

    def _seconds(
        self, prior: Sized, demand: Demand, method: Method, batch: int, most: int, kept: bool, blocks: bool
    ) -> float:
        """Of one batch: evaluations times their measured time, and what the rehearsal took."""
        h, w, tops, lefts = prior.cuts(*prior.shape[1:])
        windows = len(tops) * len(lefts) * batch
        at_once = min(windows, max(1, most // batch) * batch)
        again = kept and len(tops) * len(lefts) > 1

        timed = min(at_once, TIMED)

        def measure() -> tuple[float, float]:
            for _ in range(2):  # a first call takes longer
                with self._blocks(blocks):
                    _, strong, weak = self._pass(prior, (h, w), timed, method, demand, not again)
                if strong > 1:
                    break
            if again and demand.gradient:
                with torch.no_grad():
                    x = torch.randn(timed, prior.channels, h, w, device=self.restorer.device)
                    strong += _timed(lambda: prior.inner.predict(x, demand.busiest), self.restorer.device)[0]
            return strong / timed, weak / timed

        key = ["seconds", (h, w), timed, describe_guidance(method.guidance), demand.gradient, again, blocks]
        strong, weak = self._once(key, measure)
        calls = {"predict": 0.0, "weak": 0.0}
        seconds = batch * demand.seconds * prior.height * prior.width
        for (what, gradient), n in demand.calls.items():
            if what in calls:
                calls[what] += n
            else:
                seconds += n * batch * self._code_seconds(prior, what, gradient, blocks)
        busy = max(1, _guided(method))
        return seconds + (calls["predict"] * strong + calls["weak"] / busy * weak) * windows

    def _code_seconds(self, prior: Sized, what: str, gradient: bool, blocks: bool) -> float:
        side = min(prior.resolution * prior.downscale, max(prior.height, prior.width))
        small = self.restorer.sized(min(side, prior.height), min(side, prior.width))

        def measure() -> float:
            def run() -> None:
                x, out = _coded(small, what, gradient)
                if gradient:
                    torch.autograd.grad(out.sum(), x)

            with self._blocks(blocks):
                return _timed(run, self.restorer.device)[0]

        seconds = self._once([what, "seconds", small.shape, gradient, blocks], measure)
        return seconds * math.prod(prior.shape) / math.prod(small.shape)

    def _pass(
        self,
        prior: Sized,
        window: tuple[int, int],
        n: int,
        method: Method,
        demand: Demand,
        share: bool,
        live: Any = None,
    ) -> tuple[int, float, float]:
        """Evaluations of n windows as a sampler makes them: bytes kept after the strong pass, seconds of the strong
        pass with its backward and of the weak ones. Twice where the first learns what the passes share."""
        device, kept = self.restorer.device, 0
        sides = [side * prior.downscale for side in window]
        alone = self.restorer.sized(*sides)
        with estimator(alone, method.guidance, share_prefix=share) as estimate, torch.set_grad_enabled(demand.gradient):
            for _ in range(2 if _guided(method) and share else 1):
                x = torch.randn(n, prior.channels, *window, device=device, requires_grad=demand.gradient)

                def forward(x: torch.Tensor = x) -> Any:
                    nonlocal kept
                    found = estimate.strong(x, demand.busiest)
                    kept = live.now if live is not None else 0
                    if demand.gradient:
                        torch.autograd.grad(found.eps.sum(), x)
                    return found

                strong, found = _timed(forward, device)
                weak, _ = _timed(lambda x=x, found=found: estimate.guided(found, x, demand.busiest), device)
        return kept, strong, weak

    @contextmanager
    def _blocks(self, on: bool) -> Iterator[None]:
        """Within the block, whether the network's blocks are computed again in a backward."""
        networks = [self.restorer.backbone.network, getattr(self.restorer.backbone, "vae", None)]
        on = on and not self.restorer.windows["checkpointing"]  # as it was loaded
        for network in filter(None, networks if on else ()):
            set_checkpointing(network, True)
        try:
            yield
        finally:
            for network in filter(None, networks if on else ()):
                set_checkpointing(network, False)

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        key = json.dumps(key, default=str)
        if key not in self.kept:
            self.kept[key] = compute()
        return self.kept[key]


def duration(seconds: float) -> str:
    """ "12 s", "3.4 min", "2.1 h"."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _gigabytes(n: float) -> str:
    return f"{max(n, 0) / 1e9:.1f} GB"


def _guided(method: Method) -> int:
    """How many weak passes a guided step has."""
    return sum(term.scale != 0 for term in method.guidance.terms) if method.guidance is not None else 0


def _coded(prior: Sized, what: str, gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
    device = next(prior.network.parameters()).device
    shape = prior.shape if what == "decode" else (3, prior.height, prior.width)
    x = torch.randn(1, *shape, device=device, requires_grad=gradient)
    with torch.set_grad_enabled(gradient):
        return x, getattr(prior, what)(x)


def _timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """(seconds, what it returned)."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - started, result
