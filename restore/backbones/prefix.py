"""The part of a second network pass that equals the first is taken from the first.

Two passes over the same input that differ only inside some modules agree in everything computed before the
first of those starts. `Trace` listens to one pass and finds the largest modules of that prefix; a `Tape` keeps
their outputs during later strong passes and hands them out in the weak ones, whose prefix is thus not computed
again. Nothing here knows an architecture, and nothing stays on the network outside the `with` blocks, so a
backward that recomputes checkpointed blocks runs the true network.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._pytree import tree_map

from operators import RestoreError
from restore.backbones.forwards import replace_forward


@dataclass
class ModuleCall:
    """One call of a module within a pass; start and end on a clock that ticks at every start and end."""

    module: nn.Module
    parent: int  # index of the enclosing call, -1 for the network itself
    start: int
    end: int = -1


@dataclass
class Trace:
    """The calls of one forward pass of `network`, in order of their start."""

    network: nn.Module
    calls: list[ModuleCall] = field(default_factory=list)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the calls of the network's first pass within the block (it is called several times for windows)."""
        stack, clock, passes = [], 0, 0

        def listen(module, forward):
            def run(*args, **kwargs):
                nonlocal clock, passes
                passes += module is self.network
                if passes > 1 or not (stack or module is self.network):
                    return forward(*args, **kwargs)
                index = len(self.calls)
                self.calls.append(ModuleCall(module, stack[-1] if stack else -1, clock))
                stack.append(index)
                clock += 1
                output = forward(*args, **kwargs)
                stack.pop()
                self.calls[index].end = clock
                clock += 1
                return output

            return run

        try:
            with replace_forward(self.network.modules(), listen):
                yield
        except BaseException:
            self.calls.clear()
            raise

    def prefix(self, changed: Iterable[nn.Module]) -> list[nn.Module]:
        """The largest modules that are finished before the first of `changed` starts.

        A module that is called again later, or also inside another module of the prefix, is not taken.
        """
        changed = set(changed)
        starts = [call.start for call in self.calls if call.module in changed]
        if not starts:
            return []
        last_end: dict[nn.Module, int] = {}
        for call in self.calls:
            last_end[call.module] = max(call.end, last_end.get(call.module, -1))
        early = {module for module, end in last_end.items() if end < min(starts)}
        outer, inner = {}, set()
        for call in self.calls:
            if call.module in early and self._inside(call, early):
                inner.add(call.module)
            elif call.module in early:
                outer[call.module] = None
        return [module for module in outer if module not in inner]

    def _inside(self, call: ModuleCall, modules: set[nn.Module]) -> bool:
        while call.parent >= 0:
            call = self.calls[call.parent]
            if call.module in modules:
                return True
        return False


class Tape:
    """Outputs of what is computed before the first of `changed`, recorded in one pass and replayed in the next.

    Each module's outputs form a queue, so a pass may call the network several times; the two passes must
    make the same calls in the same order.
    """

    def __init__(self, changed: Iterable[nn.Module]):
        self.changed = frozenset(changed)
        self.queues: dict[nn.Module, deque] = {}

    def follow(self, trace: Trace) -> None:
        """Record, from now on, the prefix that `trace` gives."""
        self.queues = {module: deque() for module in trace.prefix(self.changed)}

    @property
    def recorded(self) -> bool:
        return any(self.queues.values())

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within the block, keep what the modules return (detached; no copy is made)."""
        self.clear()

        def record(module, forward):
            def run(*args, **kwargs):
                output = forward(*args, **kwargs)
                self.queues[module].append(_Kept(output))
                return output

            return run

        with replace_forward(self.queues, record):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Within the block, the modules return what was recorded instead of computing it.

        Everything still kept is dropped at the end. Raises RuntimeError when the calls do not match.
        """

        def replay(module, forward):
            def run(*args, **kwargs):
                if not self.queues[module]:
                    raise RuntimeError(f"{type(module).__name__} is called more often than when it was recorded")
                return self.queues[module].popleft().output()

            return run

        try:
            with replace_forward(self.queues, replay):
                yield
            if self.recorded:
                raise RuntimeError("the second pass called fewer modules than were recorded in the first")
        finally:
            self.clear()

    def map(self, function) -> None:
        """Replace every recorded tensor x by function(x), say its part for some images of the batch."""
        for queue in self.queues.values():
            for kept in queue:
                kept.value = tree_map(function, kept.value)

    def clear(self) -> None:
        """Drop every recording."""
        for queue in self.queues.values():
            queue.clear()


class _Kept:
    """A detached output, and the versions of its tensors to notice a change in place."""

    def __init__(self, output):
        self.tensors = []
        self.value = tree_map(self._detach, output)

    def _detach(self, value):
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach()
        self.tensors.append((value, None if value.is_inference() else value._version))
        return value

    def output(self):
        if any(version is not None and tensor._version != version for tensor, version in self.tensors):
            raise RestoreError(
                "this network changes a recorded tensor in place, so its two passes cannot share their prefix; "
                "use estimator(..., share_prefix=False)"
            )
        return self.value
