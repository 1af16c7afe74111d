"""`sim`, a pretended accelerator: values are computed on the CPU, placement is as strict as on CUDA, and what makes a
small model slow on a GPU is counted.

`register()` makes the device known to torch, once in a process. After it `module.to("sim")` and `torch.randn(3,
device="sim")` work inside of `with watch() as counts:`, and what fails on a GPU fails here: operands on two devices,
`.numpy()` of a device tensor, a host tensor indexed by device indices, a host generator for noise of the device.

It knows nothing of speed, memory or the rounding of CUDA's kernels: equal operations give equal bits on `sim` and the
CPU, so that a difference is a bug.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

NAME = "sim"
ROOT = Path(__file__).parents[1]
# Whether generators of the host stand for the device's own, which Python cannot make; they draw the same.
HOST_GENERATORS = False
_HELD: list = []  # what must live as long as the registration
_ACTIVE: list[Counts] = []
# What copies between devices, or takes indices of the host.
LOOSE = {"aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::set_", "aten::index", "aten::index_put_"}
LOOSE |= {"aten::_index_put_impl_", "aten::_copy_from_and_resize"}
# Kernels whose result the host waits for: values, sizes that depend on values, and checks for failure.
SYNCS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
SYNCS |= {"unique_dim", "bincount", "_linalg_svd", "_linalg_eigh", "linalg_lstsq"}
SYNCS = {f"aten::{name}" for name in SYNCS}
# What the CPU does by a bit of the tensor, which a wrapper does not have.
PHYSICAL = {"aten::_conj": torch.conj_physical, "aten::_neg_view": torch.neg}
KERNELS = ("silu_backward", "mish_backward")  # of CPU and CUDA, which torch composes of others elsewhere
GET_HELD = attrgetter("held")
EMPTY = ("aten::empty", "aten::new_empty", "aten::resize_", "aten::set_", "aten::lift_fresh")  # no kernel


class Counts:
    """Launches, host synchronisations and uploads, with the lines of the project that made them.

    launches: kernels; views and empty tensors are none. syncs: the host waits for the device: `.item()`, `if tensor:`,
    copies to the host, boolean indices. uploads: copies to the device for which the host waits, so not those of pinned
    memory with non_blocking=True, which are `queued`.
    """

    def __init__(self) -> None:
        self.launches = self.syncs = self.uploads = self.queued = 0
        self.places: dict[str, Counter[str]] = {"launches": Counter(), "syncs": Counter(), "uploads": Counter()}
        self.trace: tuple[str, ...] = ("syncs", "uploads")  # of which events places are noted

    def add(self, kind: str, name: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        if kind in self.trace:
            self.places[kind][f"{_line()} ({name})"] += 1

    def snapshot(self) -> tuple[int, int, int]:
        """Return (launches, syncs, uploads) so far."""
        return self.launches, self.syncs, self.uploads


def missing() -> str | None:
    """Return why the device cannot be made, None if it can."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9):
        return f"torch {torch.__version__} cannot register a device made in Python (2.9 can)"
    return None


def _line() -> str:
    """The innermost line of the project that is not a test's, else a test's."""
    found, frame = None, sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(ROOT)) and path != __file__ and "site-packages" not in path:
            found = found or f"{path[len(str(ROOT)) + 1 :]}:{frame.f_lineno}"
            if not path.startswith(str(ROOT / "tests")):
                return f"{path[len(str(ROOT)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return found or "elsewhere"


def _note(kind: str, name: str) -> None:
    for counts in _ACTIVE:
        counts.add(kind, name)


class SimTensor(torch.Tensor):
    """A tensor of the pretended device around one of the CPU, `held`."""

    @staticmethod
    def __new__(cls, real: torch.Tensor):
        layout = {"dtype": real.dtype, "layout": real.layout, "device": torch.device(NAME, 0)}
        place = {"strides": real.stride(), "storage_offset": real.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(cls, real.size(), **place, **layout)
        tensor.held = real
        return tensor

    def __init__(self, real):
        pass

    def __repr__(self):
        return f"SimTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, *args, **(kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl


class Kernel(NamedTuple):
    """What an operator's schema says, read once: asking torch again for each launch takes longer than the kernel."""

    name: str
    writes: tuple[tuple[int, str], ...]  # the arguments that it changes in place
    is_launch: bool  # views and empty tensors are none

    @classmethod
    @cache
    def of(cls, func) -> Kernel:
        schema = func._schema
        writes = [
            (i, argument.name)
            for i, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        returns = [value.alias_info for value in schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returns)
        return cls(schema.name, tuple(writes), not is_view and not schema.name.startswith(EMPTY))


def _find_tensors(value, found: list) -> list:
    """Append the tensors in an operator's arguments to `found`."""
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _find_tensors(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _find_tensors(item, found)
    return found


def _map(change, kind: type, value):
    """Return a structure of an operator's arguments or results with `change` applied to what is of a kind."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_map(change, kind, item) for item in value])
    return {key: _map(change, kind, item) for key, item in value.items()} if isinstance(value, dict) else value


def _run(func, *args, **kwargs):
    """Run an operator on what sim tensors hold; check where its operands are, and count."""
    kernel = Kernel.of(func)
    name, tensors = kernel.name, _find_tensors(kwargs, _find_tensors(args, []))
    ours = any(isinstance(item, SimTensor) for item in tensors)
    host = [tuple(item.shape) for item in tensors if not isinstance(item, SimTensor) and item.dim() > 0]
    if ours and host and name not in LOOSE:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and cpu "
            f"({name}; on the cpu: {host})"
        )
    is_index = name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_")
    if is_index and ours and not isinstance(args[0], SimTensor):
        raise RuntimeError(f"indices should be on the device of the indexed tensor, which is on the cpu ({name})")
    inner, here = dict(kwargs), ours
    if kwargs.get("device") is not None:
        here = torch.device(kwargs["device"]).type == NAME
        inner["device"] = torch.device("cpu")
    if kwargs.get("generator") is not None and here and not HOST_GENERATORS:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu' ({name})")
    _count(kernel, args, kwargs, tensors, ours, here)
    inner_args, inner = _map(GET_HELD, SimTensor, args), _map(GET_HELD, SimTensor, inner)
    if name == "aten::_copy_from":
        inner_args[1].copy_(inner_args[0])
        return args[1]
    out = PHYSICAL.get(name, func)(*inner_args, **inner)
    for i, argument in kernel.writes:  # in place: the argument itself is returned
        given = args[i] if i < len(args) else kwargs.get(argument)
        if out is (given.held if isinstance(given, SimTensor) else given) and given is not None:
            return given
    return _map(SimTensor, torch.Tensor, out) if here else out


def _count(kernel: Kernel, args, kwargs, tensors, ours: bool, here: bool) -> None:
    name = kernel.name
    if name in ("aten::copy_", "aten::_to_copy", "aten::_copy_from"):
        source, target, queued = ours, here, kwargs.get("non_blocking", False)
        if name != "aten::_to_copy":
            pair = args[:2] if name == "aten::_copy_from" else (args[1], args[0])
            source, target = (isinstance(item, SimTensor) for item in pair)
            queued = args[2] if len(args) > 2 else queued
        if source != target:
            waits = source or not (queued and any(id(tensor) in _PINNED for tensor in tensors))
            _note("syncs" if source else "uploads" if waits else "queued", name)
            return
    if not (ours or here):
        return
    if name in SYNCS:
        _note("syncs", name)
        return
    if name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_"):
        for index in args[1]:
            if index is not None and not isinstance(index, SimTensor):
                _note("uploads", name)
            elif index is not None and index.dtype in (torch.bool, torch.uint8):
                filled = name != "aten::index" and args[2].numel() == 1  # is masked_fill_
                _note("launches" if filled else "syncs", name)
    if kernel.is_launch:
        _note("launches", name)


_PINNED: dict[int, torch.Tensor] = {}  # tensors that pretend to lie in pinned memory, for one copy


class _Functions(TorchFunctionMode):
    """What torch decides in C++ by the kind of device before any dispatch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            if torch.device(kwargs["device"]).type == NAME:
                device = kwargs.pop("device")
                return func(*args, **kwargs).to(device)
        if func in (torch.arange, torch.eye) and kwargs.get("device") is not None:  # made empty, then resized
            if torch.device(kwargs["device"]).type == NAME:
                _note("launches", func.__name__)
                return SimTensor(func(*args, **{**kwargs, "device": "cpu"}))
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], SimTensor):
            args = (args[0], _index(args[1]), *args[2:])
        if func is F.scaled_dot_product_attention and isinstance(args[0] if args else kwargs["query"], SimTensor):
            return _attend(*args, **kwargs)
        if func is torch.Tensor.tolist and isinstance(args[0], SimTensor):
            _note("syncs", "tolist")
            return args[0].held.tolist()
        if func is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            _PINNED.clear()
            _PINNED[id(pinned)] = pinned
            return pinned
        return func(*args, **kwargs)


def _index(index):
    """Lists of numbers become tensors of the host, as C++ makes them."""
    if isinstance(index, list):
        return torch.tensor(index)
    return tuple(_index(item) for item in index) if isinstance(index, tuple) else index


def _attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention by the kernel that the CPU would choose for what the tensors hold."""
    held = [item.held if isinstance(item, SimTensor) else item for item in (query, key, value, attn_mask)]
    with_grad = [
        part.detach().requires_grad_(own.requires_grad) for part, own in zip(held, (query, key, value), strict=False)
    ]
    options = {"is_causal": is_causal, "scale": scale}
    chosen = torch._fused_sdp_choice(*with_grad, held[3], dropout_p, enable_gqa=enable_gqa, **options)
    if chosen == 1:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mask = attn_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        return flash(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]
    math = torch.ops.aten._scaled_dot_product_attention_math
    return math(query, key, value, attn_mask, dropout_p, is_causal, None, enable_gqa=enable_gqa, scale=scale)[0]


def register() -> torch.device:
    """Make the device known to torch, once in a process, and return it."""
    if not _HELD:
        from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

        class Module(_DummyBackendModule):
            @staticmethod
            def get_amp_supported_dtype():
                return [torch.float16, torch.bfloat16]

            @staticmethod
            def empty_cache():
                pass

        _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
        library = torch.library.Library("_", "IMPL")
        library.fallback(_run, dispatch_key="PrivateUse1")
        own = torch.library.Library("aten", "IMPL")
        for name in KERNELS:
            own.impl(name, partial(_run, getattr(torch.ops.aten, name).default), "PrivateUse1")
        _HELD.extend((library, own))
    return torch.device(NAME, 0)


@contextmanager
def watch(*trace: str) -> Iterator[Counts]:
    """Yield the Counts of what happens inside; trace: the events whose lines are noted, all but launches by default."""
    counts = Counts()
    counts.trace = trace or counts.trace
    _ACTIVE.append(counts)
    try:
        with _Functions():
            yield counts
    finally:
        _ACTIVE.remove(counts)
