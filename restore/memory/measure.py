"""Bytes and seconds of single passes of a network: counted, on tensors without data if it is large, and timed."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from operators import RestoreError
from restore.backbones.base import count_image_channels
from restore.backbones.graphs import run_eagerly
from restore.backbones.memory_options import checkpoint_units
from restore.backbones.sizes import Sized
from restore.guidance import Guidance, describe_guidance, estimator
from restore.guidance.autoguidance import list_autoguidance
from restore.memory.count import LiveBytes, count_bytes, list_weights
from restore.memory.trace import SamplerTrace
from restore.method import Method

TIMED_WINDOWS = 4  # at most, in the call that is timed
# Parameters times pixels of a window up to which a pass is simply run to count its bytes: less than a second. Others
# are run without data, whose machinery takes three seconds to import.
QUICK_WORK = 3e11


@dataclass(frozen=True)
class MemoryOptions:
    """What saves memory and costs time.

    max_windows: windows in one call of the network. recompute_windows: each of these calls is computed again in the
    backward pass. checkpoint_units: so is every unit of the network (backbones.memory_options.checkpoint_units).
    """

    max_windows: int
    recompute_windows: bool = False
    checkpoint_units: bool = False


@dataclass(frozen=True)
class Workload:
    """`batch` samples of one image, computed together.

    prior: of the image's size. trace: of the method's sampler. window: (h, w), of the network's input; windows: number
    of them in an image.
    """

    prior: Sized
    method: Method
    trace: SamplerTrace
    batch: int
    window: tuple[int, int]
    windows: int

    def windows_per_call(self, options: MemoryOptions) -> int:
        """Return the number of windows, over the whole batch, in one call of the network."""
        return min(self.windows * self.batch, max(1, options.max_windows // self.batch) * self.batch)

    def recomputes_windows(self, options: MemoryOptions) -> bool:
        """Return whether windows are computed again, and so share nothing with the weak passes."""
        return options.recompute_windows and self.windows > 1


class PassMeter:
    """Measures the passes of a Restorer's networks; a repeated question is answered from memory."""

    def __init__(self, restorer: Any) -> None:
        self.restorer, self.device = restorer, restorer.device
        self.results: dict[str, Any] = {}
        self.waited = self.worked = 0.0  # seconds of what was timed: by the clock, and of this thread on a processor

    @property
    def busy(self) -> float:
        """How many times longer what was timed took because other programs ran, as far as this thread tells."""
        return max(1.0, self.waited / self.worked) if self.worked and self.device.type == "cpu" else 1.0

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return what `compute` returns, called only for a new key."""
        key = json.dumps(key, default=str)
        if key not in self.results:
            self.results[key] = compute()
        return self.results[key]

    def window_bytes(self, work: Workload, options: MemoryOptions) -> tuple[int, int]:
        """Return the bytes that the strong pass of one window retains for its backward pass, and the peak of both and
        of the weak passes."""

        def count(guidance: Guidance | None) -> tuple[int, int]:
            # Loaded here, since weights cannot be read into tensors without data.
            weaker = [term.load(self.restorer.backbone) for term in list_autoguidance(guidance)]
            weights = sum(w.numel() for b in (self.restorer.backbone, *weaker) for w in list_weights(b))
            real = weights * math.prod(work.window) <= QUICK_WORK
            run = lambda live: self._run_window(work, options, 1, guidance, live)[0]  # noqa: E731
            return self._count(options, run, weaker, real)

        def measure() -> tuple[int, int]:
            try:
                return count(work.method.guidance)
            except RestoreError:
                raise
            except Exception:
                # A guidance of the user's own may look at values, which tensors without data do not have.
                return count(None)

        return self.once(["bytes", *self._window_key(work, options)], measure)

    def window_seconds(self, work: Workload, options: MemoryOptions) -> tuple[float, float]:
        """Return the seconds of one window: of the strong pass with its backward pass, and of all weak passes."""
        n = min(work.windows_per_call(options), TIMED_WINDOWS)

        def measure() -> tuple[float, float]:
            for _ in range(2):  # the first call takes longer
                with checkpoint_networks(self.restorer, options.checkpoint_units):
                    _, strong, weak = self._run_window(work, options, n, work.method.guidance)
                if strong > 1:
                    break
            if work.trace.gradient and work.recomputes_windows(options):
                x = torch.randn(n, work.prior.channels, *work.window, device=self.device, dtype=torch.float32)
                with torch.no_grad():
                    strong += self._time(lambda: work.prior.inner.predict(x, work.trace.busiest))[0]
            return strong / n, weak / n

        return self.once(["seconds", n, *self._window_key(work, options)], measure)

    def coder_bytes(self, prior: Sized, name: str, gradient: bool, options: MemoryOptions) -> tuple[int, int]:
        """Return the bytes that "decode" or "encode" of one whole image retains for its backward pass, and the peak."""
        key = ["bytes", name, prior.shape, gradient, options.checkpoint_units]
        return self.once(key, lambda: self._count(options, lambda live: self._run_coder(prior, name, gradient, live)))

    def coder_seconds(self, prior: Sized, name: str, gradient: bool, options: MemoryOptions) -> float:
        """Return the seconds of "decode" or "encode" of one image, scaled from one of the trained resolution."""
        side = min(prior.resolution * prior.downscale, max(prior.height, prior.width))
        small = self.restorer.prior(min(side, prior.height), min(side, prior.width))

        def measure() -> float:
            with checkpoint_networks(self.restorer, options.checkpoint_units):
                return self._time(lambda: self._run_coder(small, name, gradient))[0]

        seconds = self.once(["seconds", name, small.shape, gradient, options.checkpoint_units], measure)
        return seconds * math.prod(prior.shape) / math.prod(small.shape)

    def _window_key(self, work: Workload, options: MemoryOptions) -> list[Any]:
        flags = (work.trace.gradient, options.checkpoint_units, work.recomputes_windows(options))
        return [work.window, describe_guidance(work.method.guidance), *flags]

    def _count(
        self, options: MemoryOptions, run: Callable[[LiveBytes], int], weaker: Sequence[Any] = (), real: bool = False
    ) -> tuple[int, int]:
        counting = count_bytes(self.restorer.backbone, *weaker, real=real)
        with checkpoint_networks(self.restorer, options.checkpoint_units), counting as live:
            return run(live), live.peak

    def _run_window(
        self, work: Workload, options: MemoryOptions, n: int, guidance: Guidance | None, live: LiveBytes | None = None
    ) -> tuple[int, float, float]:
        """Evaluate n windows as a sampler does: return the bytes retained after the strong pass, the seconds of the
        strong pass with its backward pass and those of the weak passes."""
        t, gradient, retained = work.trace.busiest, work.trace.gradient, 0
        share = not work.recomputes_windows(options)
        prior = self.restorer.prior(*(side * work.prior.downscale for side in work.window))

        def run_strong(x: torch.Tensor) -> Any:
            nonlocal retained
            prediction = estimate.strong(x, t)
            retained = live.now if live is not None else 0
            if gradient:
                torch.autograd.grad(prediction.eps.sum(), x)
            return prediction

        with estimator(prior, guidance, share_prefix=share) as estimate, torch.set_grad_enabled(gradient):
            # The first evaluation learns what the passes share.
            for _ in range(2 if share and count_weak_passes(guidance) else 1):
                x = torch.randn(n, prior.channels, *work.window, device=self.device, dtype=torch.float32)
                x.requires_grad_(gradient)
                strong, prediction = self._time(lambda x=x: run_strong(x))
                weak, _ = self._time(lambda x=x, p=prediction: estimate.guided(p, x, t))
        return retained, strong, weak

    def _run_coder(self, prior: Sized, name: str, gradient: bool, live: LiveBytes | None = None) -> int:
        image = (count_image_channels(prior.inner), prior.height, prior.width)
        shape = prior.shape if name == "decode" else image
        x = torch.randn(1, *shape, device=self.device, dtype=torch.float32, requires_grad=gradient)
        with torch.set_grad_enabled(gradient):
            out = getattr(prior, name)(x)
        retained = live.now if live is not None and gradient else 0
        if gradient:
            torch.autograd.grad(out.sum(), x)
        return retained

    def _time(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """Return the seconds that `run` takes, and what it returns."""
        wait = partial(torch.cuda.synchronize, self.device) if self.device.type == "cuda" else lambda: None
        wait()
        started, worked = time.perf_counter(), time.thread_time()
        with run_eagerly():  # to compile a size for one timing would take longer than most restorations
            result = run()
        wait()
        seconds = time.perf_counter() - started
        self.waited += seconds
        self.worked += time.thread_time() - worked
        return seconds, result


def count_weak_passes(guidance: Guidance | None) -> int:
    """Return the number of weak passes of a guided step."""
    return sum(term.has_weak_pass and term.scale != 0 for term in guidance.terms) if guidance is not None else 0


_LOCK = threading.Lock()
_CHECKPOINTED: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # network to the number of blocks that are entered


@contextmanager
def checkpoint_networks(restorer: Any, on: bool) -> Iterator[None]:
    """Within the block, checkpoint every block of the restorer's networks, unless they were loaded so.

    Several threads may do so at once, and blocks may be nested: the last one that is left switches it off.
    """
    networks = [restorer.backbone.network, getattr(restorer.backbone, "vae", None)]
    networks = [network for network in networks if network] if on and not restorer.windows["recompute_windows"] else []
    _count_blocks(networks, 1)
    try:
        yield
    finally:
        _count_blocks(networks, -1)


def _count_blocks(networks: Sequence[Any], change: int) -> None:
    with _LOCK:
        for network in networks:
            _CHECKPOINTED[network] = count = _CHECKPOINTED.get(network, 0) + change
            checkpoint_units(network, count > 0)
