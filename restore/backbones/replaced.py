"""Modules that behave differently for one thread, for the duration of a `with` block.

Guidance runs a network twice, the second time with other attention and with outputs taken from the first. The
network object is shared: another thread may run it unguided at that moment, and blocks recomputed by a
checkpointed backward must be the true ones. So a replacement is seen by the thread that asked for it alone (a
backward on a GPU runs in autograd's own threads), and nothing stays on the network when the last one is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

Make = Callable[[nn.Module, Callable], Callable]

_CHANGING = threading.Lock()  # held while modules are given or rid of their dispatching forward, not while they run


@contextmanager
def replaced(modules: Iterable[nn.Module], make: Make, *, everywhere: bool = False) -> Iterator[None]:
    """Give each module make(module, its forward) as forward for the duration of the block, in this thread.

    Blocks may be nested; the innermost is called first and finds the next in its `forward`. everywhere: for
    all threads that have no replacement of their own. A module that torch.compile has been at is run as it was
    written while it is replaced.
    """
    who = None if everywhere else threading.get_ident()
    done = []
    try:
        for module in modules:
            with _CHANGING:
                layers = _Layers.of(module)
                forward = (layers.stacks.get(who) or layers.stacks.get(None) or [layers.uncompiled])[-1]
                layers.stacks.setdefault(who, []).append(forward)
            done.append((module, layers))
            layers.stacks[who][-1] = make(module, forward)
        yield
    finally:
        for module, layers in reversed(done):
            with _CHANGING:
                layers.stacks[who].pop()
                if not layers.stacks[who]:
                    del layers.stacks[who]
                if not layers.stacks:
                    layers.remove(module)


def compiled(network: nn.Module) -> list[nn.Module]:
    """The modules that torch.compile has been at: wrapped, or compiled in place, as a whole or block by block."""
    return [module for module in network.modules() if module._compiled_call_impl or "_orig_mod" in module._modules]


def uncompiled(modules: Iterable[nn.Module]):
    """Within the block this thread runs compiled modules as they were written.

    What is changed inside a compiled network would be traced anew at every change, or refused (fullgraph=True).
    """
    return replaced(modules, lambda module, forward: forward)


class _Layers:
    """The replacements of one module's forward, by thread (None: every thread without its own)."""

    def __init__(self, module: nn.Module):
        self.own = module.__dict__.get("forward")  # set on the instance, by an offloading library, say
        self.plain = module.forward
        self.uncompiled = module._modules.get("_orig_mod", self.plain)  # of the wrapper that torch.compile returns
        self.compiled = module._compiled_call_impl  # of module.compile()
        self.stacks: dict[int | None, list[Callable]] = {}

        @torch.compiler.disable
        def forward(*args, **kwargs):
            stack = self.stack()
            return (stack[-1] if stack else self.plain)(*args, **kwargs)

        def call(*args, **kwargs):
            return (module._call_impl if self.stack() else self.compiled)(*args, **kwargs)

        forward.layers = self
        module.forward = forward
        if self.compiled is not None:
            module._compiled_call_impl = call

    @classmethod
    def of(cls, module: nn.Module) -> _Layers:
        return getattr(module.__dict__.get("forward"), "layers", None) or cls(module)

    def stack(self) -> list[Callable] | None:
        """The replacements that the calling thread sees."""
        return self.stacks.get(threading.get_ident()) or self.stacks.get(None)

    def remove(self, module: nn.Module) -> None:
        if self.compiled is not None:
            module._compiled_call_impl = self.compiled
        if self.own is None:
            del module.forward
        else:
            module.forward = self.own
