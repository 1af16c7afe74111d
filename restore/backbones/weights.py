"""Weights as they come from files: read without running code, in which precision, in whose memory."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from operators import RestoreError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What training programs leave beside the weights (latent-diffusion's own files have the first): read as an empty
# object, so that nothing of it runs.
HARMLESS = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)


class Named:
    """Stands for an object of HARMLESS."""


def as_dtype(value: torch.dtype | str | None) -> torch.dtype:
    """A dtype or its short name, float32 for None. Raises RestoreError for any other than DTYPES."""
    dtype = DTYPES.get(value, value) if isinstance(value, str) else value or torch.float32
    if dtype not in DTYPES.values():
        raise RestoreError(f"the precision must be one of {', '.join(DTYPES)}, not {value!r}")
    return dtype


def own_memory(module: nn.Module) -> nn.Module:
    """`module` with every parameter and buffer copied to memory of its own, where torch's allocator aligns to 64 bytes.

    Tensors of a safetensors file lie where the file has them, at any byte; a matrix-vector product (a linear
    layer at batch 1) then rounds differently on some CPUs, and a result would depend on the header's length.
    """
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.clone()
    return module


def read(path: Path, device: str = "cpu") -> Any:
    """What a .safetensors, .pt, .pth or .ckpt file holds; which of them it is, its first bytes tell.

    device: "meta" for shapes without the values (pickles; safetensors are mapped and cost nothing either way).
    Raises RestoreError for a missing, truncated or corrupt file and for a pickle with code, which is never run.
    """
    if not path.is_file():
        raise RestoreError(f"there is no file {path}")
    unreadable = f"{path} is not a readable checkpoint: truncated, corrupt or of another format"
    try:
        with path.open("rb") as handle:
            if handle.read(9)[8:] == b"{":
                return load_file(path)
            handle.seek(0)
            with torch.serialization.safe_globals([(Named, name) for name in HARMLESS]):
                return torch.load(handle, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "reduce" in str(error):
            raise RestoreError(
                f"{path} is refused: it is a pickle that asks to run code; use the .safetensors version of this "
                "checkpoint or a plain state dict of tensors"
            ) from None
        raise RestoreError(unreadable) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError):
        raise RestoreError(unreadable) from None


def first_line(error: BaseException) -> str:
    """What a library's exception says, in short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
