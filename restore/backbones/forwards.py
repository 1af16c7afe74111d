"""Temporary replacement of modules' forward methods, seen by one thread.

Guidance runs a network twice, the second time with modified attention and with outputs reused from the first. The
network object is shared: another thread may run it without guidance at the same time, and the recomputation of
checkpointed blocks in a backward pass must run the original modules. So a replacement is visible only to the thread
that made it (on a GPU, the backward pass runs in autograd's own threads), and once the last one is removed, the
modules are as before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_LOCK = threading.Lock()  # held while dispatchers are installed or removed, not while modules run


@contextmanager
def replace_forward(modules: Iterable[nn.Module], make: Callable, *, everywhere: bool = False) -> Iterator[None]:
    """Give each module make(module, its forward) as its forward within the block, in this thread.

    Blocks may be nested; the innermost is called first and gets the next one as `forward`. everywhere: replace it for
    all threads that have no replacement of their own. Modules compiled by torch.compile run uncompiled while they are
    replaced.
    """
    thread = None if everywhere else threading.get_ident()
    replaced = []
    try:
        for module in modules:
            with _LOCK:
                dispatcher = getattr(module.__dict__.get("forward"), "dispatcher", None) or _Dispatcher(module)
                forward = dispatcher.find(thread, dispatcher.uncompiled)
                dispatcher.stacks.setdefault(thread, []).append(forward)
            replaced.append((module, dispatcher))
            dispatcher.stacks[thread][-1] = make(module, forward)
        yield
    finally:
        for module, dispatcher in reversed(replaced):
            with _LOCK:
                dispatcher.stacks[thread].pop()
                if not dispatcher.stacks[thread]:
                    del dispatcher.stacks[thread]
                if not dispatcher.stacks:
                    dispatcher.remove(module)


def find_compiled(network: nn.Module) -> list[nn.Module]:
    """Return the modules of `network` compiled by torch.compile (wrapped) or module.compile() (in place)."""
    return [module for module in network.modules() if module._compiled_call_impl or "_orig_mod" in module._modules]


def run_uncompiled(modules: Iterable[nn.Module]):
    """Run compiled modules uncompiled within the block, in this thread.

    Replacements inside a compiled network would be traced anew at every change, or refused (fullgraph=True).
    """
    return replace_forward(modules, lambda module, forward: forward)


class _Dispatcher:
    """Replacements of one module's forward by thread (None: every thread without its own), the innermost last."""

    def __init__(self, module: nn.Module):
        self.instance_forward = module.__dict__.get("forward")  # set on the instance, e.g. by an offloading library
        self.original = module.forward
        self.uncompiled = module._modules.get("_orig_mod", self.original)  # inside the wrapper of torch.compile
        self.compiled_call = module._compiled_call_impl  # of module.compile()
        self.stacks: dict[int | None, list[Callable]] = {}

        @torch.compiler.disable
        def forward(*args, **kwargs):
            return self.find(threading.get_ident(), self.original)(*args, **kwargs)

        def call(*args, **kwargs):
            replaced = self.find(threading.get_ident(), None) is not None
            return (module._call_impl if replaced else self.compiled_call)(*args, **kwargs)

        forward.dispatcher = self
        module.forward = forward
        if self.compiled_call is not None:
            module._compiled_call_impl = call

    def find(self, thread: int | None, default: Callable | None) -> Callable | None:
        """Return the innermost replacement visible to `thread`."""
        stack = self.stacks.get(thread) or self.stacks.get(None)
        return stack[-1] if stack else default

    def remove(self, module: nn.Module) -> None:
        if self.compiled_call is not None:
            module._compiled_call_impl = self.compiled_call
        if self.instance_forward is None:
            del module.forward
        else:
            module.forward = self.instance_forward
