"""Passes of a network as one compiled graph each, with what guidance changes in it.

torch.compile sees a network's code; guidance replaces parts of it for one pass and one thread. So what is compiled here
is not code: the operations of a pass are recorded as it runs on tensors without data, perturbed attention and all, and
torch compiles that one graph, of fixed shapes. A guided step has two, of the strong and of the weak pass; what the
passes share (restore.backbones.prefix) leaves the first as outputs and enters the second as inputs.

A pass runs uncompiled where its graph could be wrong: if a replacement does not tell what it does
(restore.backbones.forwards.Part), if activations are computed again in the backward pass, under torch's modes. What was
recorded is dropped if the network's modules, weights or settings are other ones at the start of a run.
"""

from __future__ import annotations

import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_unflatten

from operators import RestoreError
from operators.naming import check_known
from restore.backbones.ambient import no_autocast
from restore.backbones.forwards import Part, find_parts
from restore.backbones.lean import keep_own_code
from restore.backbones.memory_options import is_checkpointed

# Modes of torch.compile that record CUDA graphs, and what they are without them.
CUDA_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
MODES = ("default", *CUDA_GRAPHS, "max-autotune-no-cudagraphs")
MOST = 16  # graphs of one module: images of many sizes would compile for ever
_THREAD = threading.local()


class CannotRecord(Exception):
    """A pass draws noise or reads values, so that its operations are others the next time."""


@contextmanager
def _mark(name: str) -> Iterator[None]:
    before = getattr(_THREAD, name, False)
    setattr(_THREAD, name, True)
    try:
        yield
    finally:
        setattr(_THREAD, name, before)


def run_eagerly():
    """Within the block networks of this thread run uncompiled."""
    return _mark("eager")


def is_recording() -> bool:
    """Return whether this thread records a graph: what it computes then holds for all later passes."""
    return getattr(_THREAD, "recording", False)


class Graphs:
    """The graphs of a backbone's network and autoencoder.

    mode, backend: of torch.compile. count: of graphs so far. trace, checked: what guidance has learned of the network
    (its first pass; prefixes whose outputs nothing changes), so that a later run need not learn it again.
    """

    def __init__(self, modules: Sequence[nn.Module], mode: str, backend: str) -> None:
        self.modules, self.backend, self.lock = modules, backend, threading.RLock()
        self.uses_cuda_graphs = mode in CUDA_GRAPHS and next(modules[0].parameters()).device.type == "cuda"
        # Of one step a CUDA graph remembers every call. An autoencoder may have many, which would be a graph each.
        self.mode, self.coder_mode = mode, CUDA_GRAPHS.get(mode, mode)
        for module in modules:
            module.forward = partial(self._run, module, module.forward)
            module.graphs = self
        self.drop()

    @property
    def count(self) -> int:
        return sum(isinstance(graph, _Graph) for graph in self.graphs.values())

    def drop(self) -> None:
        """Forget all graphs."""
        self.graphs: dict[Any, _Graph | None] = {}
        self.trace, self.checked, self.state = None, set(), _list_state(self.modules)

    def begin_run(self) -> None:
        """Forget all graphs if the modules have changed since they were recorded."""
        with self.lock:
            if not _is_same(self.state, _list_state(self.modules)):
                self.drop()

    def begin_step(self) -> None:
        """From here on the outputs of the passes before may be overwritten."""
        if self.uses_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def _run(self, module: nn.Module, forward: Callable, *args, **kwargs):
        parts = find_parts()
        if parts is None or _must_run_eagerly(module, tree_flatten((args, kwargs))[0]):
            return forward(*args, **kwargs)
        call = _Call(forward, parts, args, kwargs)
        key = (module, *call.key)
        with self.lock:
            if key not in self.graphs:
                self.graphs[key] = self._record(module, call)
            graph = self.graphs[key]
        copy = self.uses_cuda_graphs and module is self.modules[0]
        out, kept = call.run_plain() if graph is None else graph(call.tensors, copy)
        for part, own in zip(parts, kept, strict=True):
            part.store(own)
        return out

    def _record(self, module: nn.Module, call: _Call) -> _Graph | None:
        name = type(module).__name__
        if sum(key[0] is module for key in self.graphs) >= MOST:
            if sum(key[0] is module for key in self.graphs) == MOST:
                warnings.warn(f"{name} is compiled for {MOST} inputs; others run uncompiled", stacklevel=5)
            return None
        try:
            with _mark("recording"), keep_own_code():
                return _Graph(call, self.mode if module is self.modules[0] else self.coder_mode, self.backend)
        except (torch.OutOfMemoryError, RestoreError):
            raise
        except CannotRecord:
            return None
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"{name} runs uncompiled, as its operations cannot be recorded: {reason}", stacklevel=5)
            return None


class _Call:
    """One call of a module: its tensors, and how to make it again of others."""

    def __init__(self, forward: Callable, parts: Sequence[Part], args: tuple, kwargs: dict) -> None:
        self.forward, self.parts = forward, parts
        self.leaves, self.spec = tree_flatten((args, kwargs, [part.take() for part in parts]))
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]
        # Expanded inputs have memory of their own, which a CUDA graph needs; what lies channels last stays so.
        self.tensors = [x if _is_dense(x) else x.contiguous() for x in (self.leaves[i] for i in self.places)]
        kinds = [(x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in self.tensors]
        rest = [leaf for leaf in self.leaves if not isinstance(leaf, torch.Tensor)]
        self.device = self.tensors[0].device.type
        cast = torch.is_autocast_enabled(self.device) and torch.get_autocast_dtype(self.device)
        keys = tuple(part.key for part in parts)
        self.key = (keys, str(self.spec), tuple(kinds), repr(rest), torch.is_grad_enabled(), cast)

    def run(self, *tensors: torch.Tensor) -> tuple[Any, list]:
        """Return what the module returns for these tensors, and what each part has kept."""
        leaves = list(self.leaves)
        for i, tensor in zip(self.places, tensors, strict=True):
            leaves[i] = tensor
        args, kwargs, given = tree_unflatten(leaves, self.spec)
        with ExitStack() as stack:
            read = [stack.enter_context(part.lend(own)) for part, own in zip(self.parts, given, strict=True)]
            out = self.forward(*args, **kwargs)
            return out, [function() for function in read]

    def run_plain(self) -> tuple[Any, list]:
        return self.run(*self.tensors)


class _Graph:
    """One pass, recorded and compiled."""

    def __init__(self, call: _Call, mode: str, backend: str) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx

        needs_gradient: list[bool] = []

        def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
            out = call.run(*tensors)
            self.leaves, self.spec = tree_flatten(out)
            self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]
            self.own = len([leaf for leaf in tree_flatten(out[0])[0] if isinstance(leaf, torch.Tensor)])
            found = [self.leaves[i] for i in self.places]
            needs_gradient[:] = [tensor.requires_grad for tensor in found]
            self.leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
            return found

        recorded = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*call.tensors)
        self.device, options = call.device, {"mode": None if mode == "default" else mode, "backend": backend}
        detached = _Detached(recorded, needs_gradient)
        detached.forward = types.MethodType(_copy_code(_Detached.forward), detached)
        self.compiled = torch.compile(detached, dynamic=False, fullgraph=True, **options)
        self.ran = False

    def __call__(self, tensors: Sequence[torch.Tensor], copy: bool) -> tuple[Any, list]:
        """Return what _Call.run does. copy: the outputs are memory of a CUDA graph, which the next step overwrites; by
        then what the parts keep has been read."""
        with no_autocast(self.device):  # the casts are recorded
            try:
                found = self.compiled(*tensors)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:
                if self.ran:
                    raise
                reason = _explain(error)
                raise RestoreError(
                    f"networks must be left uncompiled where torch.compile fails, got: {reason}"
                ) from error
        self.ran, leaves = True, list(self.leaves)
        for n, (i, tensor) in enumerate(zip(self.places, found, strict=True)):
            leaves[i] = tensor.clone() if copy and n < self.own else tensor
        return tree_unflatten(leaves, self.spec)


class _Detached(nn.Module):
    """A recorded pass. Recording drops what detaches tensors; outputs that had no gradient get none."""

    def __init__(self, recorded: nn.Module, needs_gradient: Sequence[bool]) -> None:
        super().__init__()
        self.recorded, self.needs_gradient = recorded, list(needs_gradient)

    def forward(self, *tensors):
        found = self.recorded(*tensors)
        return [x if needed else x.detach() for x, needed in zip(found, self.needs_gradient, strict=True)]


def _copy_code(function: types.FunctionType) -> types.FunctionType:
    """Return the function with a code object of its own: of one, torch compiles eight versions at most, and looks
    through them in every call."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def compile_networks(prior: Any, mode: str = "default", backend: str = "inductor") -> Graphs:
    """Compile the passes of a prior's network and autoencoder, with guidance and without, when they first run.

    prior: a Restorer, or a backbone. mode: of torch.compile; "reduce-overhead" records CUDA graphs on a GPU, for one
    thread. backend: of torch.compile. Results are those of the uncompiled passes to rounding. Every size of image and
    batch is compiled by itself, which takes from seconds to minutes: for many images of one size. Raises RestoreError
    for an unknown mode, and for networks that are compiled already.
    """
    check_known([mode], MODES, "unknown mode of torch.compile")
    backbone = getattr(prior, "backbone", prior)
    modules = [backbone.network, *_list_coders(backbone)]
    if any(find_graphs(module) is not None for module in modules):
        raise RestoreError("compile must be called once: the networks are compiled already")
    return Graphs(modules, mode, backend)


def find_graphs(network: nn.Module) -> Graphs | None:
    """Return the Graphs of a network compiled by `compile_networks`."""
    return getattr(network, "graphs", None) if isinstance(getattr(network, "graphs", None), Graphs) else None


def _list_coders(backbone: Any) -> list[nn.Module]:
    vae = getattr(backbone, "vae", None)
    return [part for part in (getattr(vae, name, None) for name in ("encoder", "decoder")) if part is not None]


def _is_dense(x: torch.Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _must_run_eagerly(module: nn.Module, leaves: Sequence[Any]) -> bool:
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    modes = torch.overrides._get_current_function_mode_stack() if torch._C._len_torch_function_stack() else ()
    return (
        getattr(_THREAD, "eager", False)
        or is_recording()
        or torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or any(type(mode).__name__ != "DeviceContext" for mode in modes)
        or not tensors
        or any(type(x) not in (torch.Tensor, nn.Parameter) or x.is_inference() for x in tensors)
        or torch.is_inference_mode_enabled()
        or (torch.is_grad_enabled() and is_checkpointed(module))
    )


def _list_state(modules: Sequence[nn.Module]) -> list[tuple[str, Any]]:
    """Everything that the modules hold, but for the numbers of their weights and the hooks around the whole pass."""
    state: list[tuple[str, Any]] = []
    for outer, module in [(top, inner) for top in modules for inner in top.modules()]:
        for name, value in list(module.__dict__.items()):
            if name in ("forward", "graphs") or (module is outer and "hooks" in name):
                continue
            state.extend(value.items() if isinstance(value, dict) else [(name, value)])
    return state


def _is_same(before: Sequence[tuple[str, Any]], now: Sequence[tuple[str, Any]]) -> bool:
    plain = (bool, int, float, str, tuple, type(None))
    return len(before) == len(now) and all(
        a == b and (x is y or (isinstance(x, plain) and isinstance(y, plain) and x == y))
        for (a, x), (b, y) in zip(before, now, strict=True)
    )


def _explain(error: BaseException) -> str:
    """The first line of the innermost cause, which names what is missing (a compiler, say)."""
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
