"""Reuse the part of a second network pass that equals the first.

Two passes over the same input that differ only inside some modules agree in everything computed before the first of
those starts. `Trace` records the module calls of one pass and finds the largest modules of that prefix; a `Tape` keeps
their outputs during later strong passes and returns them in the weak ones, whose prefix is thus not computed again.
This works for any architecture, and nothing stays on the network outside the `with` blocks, so a backward pass that
recomputes checkpointed blocks runs the original network.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from operators import RestoreError
from restore.backbones.forwards import Part, replace_forward


class ChangedInPlace(RestoreError):
    """A recorded output is not what the module returned any more, so it cannot be used again."""


@dataclass
class ModuleCall:
    """One call of a module within a pass; start and end on a clock that ticks at every start and end."""

    module: nn.Module
    start: int
    end: int = -1


@dataclass
class Trace:
    """The calls of one forward pass of `network`, in order of their start."""

    network: nn.Module
    calls: list[ModuleCall] = field(default_factory=list)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the calls of the network's first pass within the block (windows take several passes)."""
        clock = count()

        def run(module, forward, *args, **kwargs):
            running = bool(self.calls) and self.calls[0].end < 0
            if not running and (self.calls or module is not self.network):
                return forward(*args, **kwargs)
            call = ModuleCall(module, next(clock))
            self.calls.append(call)
            output = forward(*args, **kwargs)
            call.end = next(clock)
            return output

        try:
            with replace_forward(self.network.modules(), partial(partial, run)):
                yield
        except BaseException:
            self.calls.clear()
            raise

    def prefix(self, changed: Iterable[nn.Module]) -> list[nn.Module]:
        """Return the largest modules that are finished before the first of `changed` starts.

        Modules that are called again later, or also inside another module of the prefix, are left out.
        """
        changed = set(changed)
        starts = [call.start for call in self.calls if call.module in changed]
        if not starts:
            return []
        last_end = {call.module: call.end for call in sorted(self.calls, key=lambda call: call.end)}
        early = {module for module, end in last_end.items() if end < min(starts)}
        outer, inner, outer_end = {}, set(), -1
        for call in self.calls:
            if call.module not in early:
                continue
            if call.end < outer_end:  # calls are nested, so it lies inside the last outer one
                inner.add(call.module)
            else:
                outer[call.module], outer_end = None, call.end
        return [module for module in outer if module not in inner]


class Tape:
    """Outputs of what is computed before the first of `changed`, recorded in one pass and replayed in the next.

    Each module's outputs form a queue, so a pass may call the network several times; the two passes must make the same
    calls in the same order.
    """

    def __init__(self, changed: Iterable[nn.Module]):
        self.changed = frozenset(changed)
        self.queues: dict[nn.Module, deque] = {}
        self.calls: Counter[nn.Module] = Counter()  # of each module in one call of the network
        self.followed, self.checked = False, False  # a trace; whether a first replay has found every output unchanged

    def follow(self, trace: Trace) -> None:
        """Use the prefix of `trace` from now on."""
        self.queues, self.followed = {module: deque() for module in trace.prefix(self.changed)}, True
        self.calls = Counter(call.module for call in trace.calls)

    @property
    def recorded(self) -> bool:
        """Whether there are outputs to replay."""
        return any(self.queues.values())

    @contextmanager
    def record(self) -> Iterator[None]:
        """Keep the outputs of the modules within the block (detached, not copied)."""
        self.clear()

        def run(module, forward, *args, **kwargs):
            output = forward(*args, **kwargs)
            self.queues[module].append(_Output(output, copy=not self.checked))
            return output

        with replace_forward(self.queues, partial(partial, run), part=_Recording(self) if self.checked else None):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Return the recorded outputs of the modules within the block instead of computing them.

        The recordings are dropped at the end. Raises ChangedInPlace if the network changed one of them, RuntimeError if
        the calls do not match.
        """

        def run(module, forward, *args, **kwargs):
            if not self.queues[module]:
                raise RuntimeError(f"{type(module).__name__} is called more often than when it was recorded")
            return self.queues[module].popleft().get()

        try:
            part = _Replaying(self) if self.checked and all(self.queues.values()) else None
            with replace_forward([m for m, queue in self.queues.items() if queue], partial(partial, run), part=part):
                yield
            if self.recorded:
                raise RuntimeError("the second pass called fewer modules than were recorded in the first")
            self.checked = True
        finally:
            self.clear()

    def cut(self, rows: slice, images: int) -> None:
        """Keep these rows of the outputs for a batch of so many images. Modules whose outputs do not have one row for
        each image are computed again."""

        def part(value):
            return value[rows] if isinstance(value, torch.Tensor) and value.ndim and len(value) == images else value

        for queue in self.queues.values():
            tensors = [leaf for output in queue for leaf in tree_leaves(output.value) if isinstance(leaf, torch.Tensor)]
            if any(tensor.ndim and len(tensor) not in (1, images) for tensor in tensors):
                queue.clear()
            for output in queue:
                output.value = tree_map(part, output.value)

    def stop(self) -> None:
        """Share nothing from now on."""
        self.changed, self.queues = frozenset(), {}

    def clear(self) -> None:
        """Drop all recordings."""
        for queue in self.queues.values():
            queue.clear()


class _Recording(Part):
    """Of a pass with graphs: the outputs of the prefix are outputs of the graph."""

    def __init__(self, tape: Tape) -> None:
        super().__init__((type(self), *tape.queues))
        self.tape = tape

    @contextmanager
    def lend(self, given: Any) -> Iterator[Callable[[], Any]]:
        before = self.tape.queues
        own = self.tape.queues = {module: deque() for module in before}
        try:
            yield lambda: [[output.value for output in queue] for queue in own.values()]
        finally:
            self.tape.queues = before

    def store(self, kept: list[list]) -> None:
        for queue, values in zip(self.tape.queues.values(), kept, strict=True):
            queue.extend(_Output(value, copy=False) for value in values)


class _Replaying(_Recording):
    """Of a pass with graphs: the outputs of the prefix are inputs of the graph."""

    def take(self) -> list[list]:
        try:
            queues = self.tape.queues.items()
            return [[queue.popleft().get() for _ in range(self.tape.calls[module])] for module, queue in queues]
        except IndexError:
            raise RuntimeError("a module is called more often than when it was recorded") from None

    @contextmanager
    def lend(self, given: list[list]) -> Iterator[Callable[[], Any]]:
        with super().lend(None):
            for queue, values in zip(self.tape.queues.values(), given, strict=True):
                queue.extend(_Output(value, copy=False) for value in values)
            yield lambda: None

    def store(self, kept: Any) -> None:
        pass


class _Output:
    """A detached output, and what tells whether it was changed in place since."""

    def __init__(self, output, copy: bool):
        self.versions, self.copies, self.copy = [], [], copy
        self.value = tree_map(self._detach, output)

    def _detach(self, value):
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach()
        if not value.is_inference():
            self.versions.append((value, value._version))
        elif self.copy:  # inference tensors have no version
            self.copies.append((value, value.clone()))
        return value

    def get(self):
        same = all(tensor._version == version for tensor, version in self.versions)
        if not (same and all(torch.equal(tensor, copy) for tensor, copy in self.copies)):
            raise ChangedInPlace("outputs of a prefix must not be changed in place; try estimator(share_prefix=False)")
        return self.value
