"""Reading and writing weights: without running code, in a chosen precision, in aligned memory."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode

from operators import RestoreError
from operators.naming import check_known
from restore import disk

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Classes that training programs pickle beside the weights (latent-diffusion's own files have the first): read as an
# empty object, so that none of their code runs.
HARMLESS = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)


class Placeholder:
    """Stands for an object of HARMLESS."""


def allow_harmless() -> AbstractContextManager:
    """Within the block torch.load reads objects of HARMLESS."""
    return torch.serialization.safe_globals([(Placeholder, name) for name in HARMLESS])


def as_dtype(value: torch.dtype | str | None) -> torch.dtype:
    """Return a dtype of DTYPES by itself or its short name, float32 for None. Raises RestoreError for others."""
    dtype = DTYPES.get(value, value) if isinstance(value, str) else value or torch.float32
    if dtype not in DTYPES.values():
        raise RestoreError(f"precision must be one of {', '.join(DTYPES)}, got {value!r}")
    return dtype


class _WithoutInitialisation(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextmanager
def build_without_weights() -> Iterator[None]:
    """Within the block, new modules are on the meta device, and are not initialised: some of torch.nn.init would import
    sympy and torch._dynamo for it, which takes seconds."""
    with torch.device("meta"), _WithoutInitialisation():
        yield


def align_memory(module: nn.Module) -> nn.Module:
    """Copy every parameter and buffer of `module` to memory of its own, which torch's allocator aligns to 64 bytes.

    Tensors of a safetensors file start at any byte; a matrix-vector product (a linear layer at batch 1) then rounds
    differently on some CPUs, and a result would depend on the length of the file's header. Returns `module`.
    """
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.clone()
    return module


def read_weights(path: Path, device: str = "cpu") -> Any:
    """Return the content of a .safetensors, .pt, .pth or .ckpt file; the format is recognised by its first bytes.

    device: "meta" for shapes without values (pickles; safetensors are mapped and cost nothing either way).
    Raises RestoreError if the file is missing, truncated or corrupt, and for a pickle with code, which is never run.
    """
    if not path.is_file():
        raise RestoreError(f"there is no file {path}")
    unreadable = f"{path} is not a readable checkpoint: truncated, corrupt or of another format"
    try:
        with path.open("rb") as handle:
            if handle.read(9)[8:] == b"{":
                return load_file(path)
            handle.seek(0)
            with allow_harmless():
                return torch.load(handle, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "reduce" in str(error):
            raise RestoreError(
                f"{path} is refused: it is a pickle that asks to run code; try the .safetensors version of this "
                "checkpoint or a plain state dict of tensors"
            ) from None
        raise RestoreError(unreadable) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError):
        raise RestoreError(unreadable) from None


# Parts of names that training programs put before those of the network: DataParallel and torch.compile.
WRAPPERS = ("module", "_orig_mod")


def unwrap_state(content: Any, anchor: str, path: Path, key: str | None = None) -> dict[str, torch.Tensor] | None:
    """Return the weights in the content of a checkpoint, the names without what training programs put before them.

    They are the mapping of tensors, at any depth (`state_dict`, `model`, `ema`, ...), that has the name `anchor`, alone
    or behind a prefix (`module.`, `_orig_mod.`, `model.`, ...). key: which one, if there are several. path: for errors.
    Returns None if there is none. Raises RestoreError, with the keys, for several without a key and an unknown key.
    """
    states = dict(_list_states(content, anchor))
    if key is not None:
        check_known([key], states, f"{path} has no weights_key")
        return states[key]
    if len(states) > 1:
        best = next((name for name in states if "ema" in name), next(iter(states)))
        raise RestoreError(
            f"{path} must hold one network, got {', '.join(states)}; choose one, as by weights_key={best}"
        )
    return next(iter(states.values()), None)


def _list_states(content: Any, anchor: str, place: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """Yield (key, weights by name) of every network in the content of a checkpoint."""
    if not isinstance(content, Mapping):
        return
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    prefixes = [name[: -len(anchor)] for name in tensors if name == anchor or name.endswith("." + anchor)]
    for prefix in prefixes:
        inner = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        state = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix) and not n.startswith(inner)}
        yield ".".join(part for part in (*place, *prefix.split(".")) if part and part not in WRAPPERS), state
    for name, value in content.items():
        yield from _list_states(value, anchor, (*place, str(name)))


def load_part(
    cls,
    folder: Path,
    part: str,
    dtype: torch.dtype = torch.float32,
    pickles: bool = False,
    variant: str | None = None,
    device_map: Any = None,
):
    """Load one network of a diffusers or transformers folder, from its subfolder `part` or, if "", the folder itself.

    Every weight must be in the file: a missing one would be random. pickles: accept a .bin if there are no
    safetensors; its code is never run. variant: of the files' names, such as "fp16". device_map: accelerate's, of a
    diffusers network. Raises RestoreError.
    """
    from diffusers.utils import is_accelerate_available

    name, where = part or "network", {"subfolder": part} if part else {}
    where |= {"variant": variant} if variant else {}
    where |= {"device_map": device_map} if device_map else {}
    if cls.__module__.startswith("diffusers"):
        where["torch_dtype"] = dtype  # not by way of float32, which would take twice the memory
        where["low_cpu_mem_usage"] = is_accelerate_available()  # diffusers' default, without its warning
    try:
        model, info = cls.from_pretrained(
            folder, **where, use_safetensors=None if pickles else True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise RestoreError(f"the {name} in {folder} cannot be loaded: {first_line(error)}") from error
    bad = [k for k in info["missing_keys"] if "position_ids" not in k] + [str(k) for k in info["mismatched_keys"]]
    if bad:
        raise RestoreError(
            f"the {name} in {folder} does not fit its configuration: {len(bad)} weights are missing or of another "
            f"shape, first {sorted(bad)[0]}"
        )
    model = model.eval().requires_grad_(False)
    return model if device_map else align_memory(nn.Module.to(model, dtype))


def load_state(network: nn.Module, state: Mapping[str, torch.Tensor], what: str) -> None:
    """Give a network on the meta device its weights. Raises RestoreError unless names and shapes are all its own."""
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise RestoreError(f"{what} must be exactly those of a {type(network).__name__}, got {first[:200]}") from None


def save_network(network: nn.Module, folder: str | Path, dtype: torch.dtype | str | None = None) -> None:
    """Write a diffusers network as config.json and safetensors weights, in fp32 or `dtype`."""
    folder = disk.make_folder(folder)
    disk.write_json(folder / CONFIG, json.loads(network.to_json_string()))
    dtype, state = as_dtype(dtype), network.state_dict()
    weights = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in state.items()}
    # Last, so that a folder whose writing was interrupted has no weights under the final name.
    disk.write_safetensors(folder / WEIGHTS, weights, {"format": "pt"})


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Keep diffusers and transformers from drawing progress bars on stderr within the block."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
