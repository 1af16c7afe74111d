"""Counting the bytes of the tensors that a computation keeps alive, with or without their data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within the block, count the bytes of the tensors that operations allocate and that are still alive.

    known: tensors whose storage is not counted, although operations may return views of it.
    now, peak: the current and the largest count.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in known)}
        self.alive: dict[int, weakref.ref] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not wrapped against torch.compile, under which nothing is counted: it would import torch._dynamo, seconds."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self.known or (key in self.alive and self.alive[key]() is storage):
            return
        size = storage.nbytes()

        def release(_) -> None:
            self.alive.pop(key, None)
            self.now -= size

        self.alive[key] = weakref.ref(storage, release)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def use_fake_tensors() -> Iterator[Any]:
    """Within the block, new tensors have a shape and a dtype but no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # with torch._dynamo, which takes seconds

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _ShapesOnly():
        yield mode


@contextmanager
def count_bytes(*backbones: Any, real: bool = False) -> Iterator[LiveBytes]:
    """Within the block, the bytes of the backbones' tensors are counted; they have no data unless `real`."""
    weights = [weight for backbone in backbones for weight in list_weights(backbone)]
    if real:
        with LiveBytes(weights) as live:
            yield live
        return
    with use_fake_tensors() as mode, LiveBytes([mode.from_tensor(weight) for weight in weights]) as live:
        yield live


def list_weights(backbone: Any) -> list[torch.nn.Parameter]:
    """The parameters of a backbone's network and, if it has one, of its autoencoder."""
    vae = getattr(backbone, "vae", None)
    return [*backbone.network.parameters(), *(vae.parameters() if vae is not None else ())]


class _ShapesOnly(TorchFunctionMode):
    """Among fake tensors, keep real ones (a schedule's) real, and take every condition on a value as true."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        fake = any(isinstance(v, FakeTensor) for v in tensors)
        if function is torch.Tensor.__bool__ and fake:
            return True
        with unset_fake_temporarily() if (tensors and not fake) or function is torch.tensor else nullcontext():
            return function(*args, **(kwargs or {}))
