"""Temporary replacement of modules' forward methods, seen by one thread.

Guidance runs a network twice, the second time with modified attention and with outputs reused from the first. The
network object is shared: another thread may run it without guidance at the same time, and the recomputation of
checkpointed blocks in a backward pass must run the original modules. So a replacement is visible only to the thread
that made it (on a GPU, the backward pass runs in autograd's own threads), and once the last one is removed, the
modules are as before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_LOCK = threading.Lock()  # held while dispatchers are installed or removed, not while modules run
_PARTS: dict[int | None, list[Part | None]] = {}  # of the replacements that each thread sees (None: every thread)


class Part:
    """What a replacement does to a pass, for a network that keeps its passes as graphs (restore.backbones.graphs).

    key: determines, with those of the other replacements and with the network's input, what a pass computes.
    """

    def __init__(self, key: Hashable) -> None:
        self.key = key

    def take(self) -> Any:
        """Remove and return what the network's next call uses of this replacement: inputs of the graph."""

    @contextmanager
    def lend(self, given: Any) -> Iterator[Callable[[], Any]]:
        """Within the block work on what `take` returned alone; yield a function that returns what the call kept:
        outputs of the graph, and what is the same in every call."""
        yield lambda: None

    def store(self, kept: Any) -> None:
        """Take in what a call has kept."""


class RanLayers(Part):
    """A replacement that notes in `ran` the paths of the layers that ran."""

    def __init__(self, key: Hashable, ran: set[str]) -> None:
        super().__init__((type(self), key))
        self.ran = ran

    @contextmanager
    def lend(self, given: Any) -> Iterator[Callable[[], list[str]]]:
        yield lambda: sorted(self.ran)

    def store(self, kept: list[str]) -> None:
        self.ran.update(kept)


def find_parts() -> list[Part] | None:
    """Return the parts of all replacements that this thread sees; None if one of them has not told what it does."""
    parts = [*_PARTS.get(None, ()), *_PARTS.get(threading.get_ident(), ())]
    return None if None in parts else parts


@contextmanager
def replace_forward(
    modules: Iterable[nn.Module], make: Callable, *, everywhere: bool = False, part: Part | None = None
) -> Iterator[None]:
    """Give each module make(module, its forward) as its forward within the block, in this thread.

    Blocks may be nested; the innermost is called first and gets the next one as `forward`. everywhere: replace it for
    all threads that have no replacement of their own. Modules compiled by torch.compile run uncompiled while they are
    replaced; networks that keep graphs, if no `part` tells what the replacement does.
    """
    thread = None if everywhere else threading.get_ident()
    modules, replaced = list(modules), []
    if not modules:
        yield
        return
    try:
        with _LOCK:
            _PARTS.setdefault(thread, []).append(part)
        for module in modules:
            with _LOCK:
                dispatcher = _find_dispatcher(module) or _Dispatcher(module)
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
        with _LOCK:
            _PARTS[thread].pop()
            if not _PARTS[thread]:
                del _PARTS[thread]


def find_own_forward(module: nn.Module) -> Callable | None:
    """Return the forward that was set on a module itself, beneath all replacements; None if it has its class's."""
    forward, dispatcher = module.__dict__.get("forward"), _find_dispatcher(module)
    return forward if dispatcher is None or dispatcher.forward is not forward else dispatcher.instance_forward


def set_own_forward(module: nn.Module, forward: Callable | None) -> None:
    """Set it, None for the class's. Replacements stay; those made before call what there was until they end."""
    with _LOCK:
        dispatcher = _find_dispatcher(module)
        if dispatcher is not None and module.__dict__.get("forward") is dispatcher.forward:
            original = type(module).forward.__get__(module) if forward is None else forward
            dispatcher.set_original(module, forward, original)
        elif forward is not None:
            module.forward = forward
        else:
            module.__dict__.pop("forward", None)


def find_compiled(network: nn.Module) -> list[nn.Module]:
    """Return the modules of `network` compiled by torch.compile (wrapped) or module.compile() (in place)."""
    return [module for module in network.modules() if module._compiled_call_impl or "_orig_mod" in module._modules]


def run_uncompiled(modules: Iterable[nn.Module]):
    """Run compiled modules uncompiled within the block, in this thread.

    Replacements inside a compiled network would be traced anew at every change, or refused (fullgraph=True).
    """
    return replace_forward(modules, lambda module, forward: forward)


def _find_dispatcher(module: nn.Module) -> _Dispatcher | None:
    """Return the dispatcher in a module's place, whose attributes a hook's own forward may have copied."""
    for name in ("_old_forward", "forward"):
        dispatcher = getattr(module.__dict__.get(name), "dispatcher", None)
        if dispatcher is not None and dispatcher.forward is module.__dict__[name]:
            return dispatcher
    return None


class _Dispatcher:
    """Replacements of one module's forward by thread (None: every thread without its own), the innermost last.

    It stands beneath accelerate's hooks (`_old_forward`), which diffusers' pipelines take away and set again at the end
    of every call if they offload.
    """

    def __init__(self, module: nn.Module):
        hooked = module.__dict__.get("_old_forward")
        if hooked is None:
            self.set_original(module, module.__dict__.get("forward"), module.forward)
        else:
            own = hooked != type(module).forward.__get__(module)
            self.set_original(module, hooked if own else None, hooked)
        self.compiled_call = module._compiled_call_impl  # of module.compile()
        self.stacks: dict[int | None, list[Callable]] = {}

        @torch.compiler.disable
        def forward(*args, **kwargs):
            return self.find(threading.get_ident(), self.original)(*args, **kwargs)

        def call(*args, **kwargs):
            replaced = self.find(threading.get_ident(), None) is not None
            return (module._call_impl if replaced else self.compiled_call)(*args, **kwargs)

        forward.dispatcher, self.forward = self, forward
        setattr(module, "forward" if hooked is None else "_old_forward", forward)
        if self.compiled_call is not None:
            module._compiled_call_impl = call

    def set_original(self, module: nn.Module, instance_forward: Callable | None, original: Callable) -> None:
        self.instance_forward = instance_forward  # set on the instance, e.g. by an offloading library
        self.original = original
        self.uncompiled = module._modules.get("_orig_mod", self.original)  # inside the wrapper of torch.compile

    def find(self, thread: int | None, default: Callable | None) -> Callable | None:
        """Return the innermost replacement visible to `thread`."""
        stack = self.stacks.get(thread) or self.stacks.get(None)
        return stack[-1] if stack else default

    def remove(self, module: nn.Module) -> None:
        if self.compiled_call is not None:
            module._compiled_call_impl = self.compiled_call
        if module.__dict__.get("_old_forward") is self.forward:
            module._old_forward = self.original
        elif module.__dict__.get("forward") is not self.forward:
            return  # another library has set its own meanwhile
        elif self.instance_forward is None:
            del module.forward
        else:
            module.forward = self.instance_forward
