"""Which precision a machine computes fast, and gradients in half of it."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable

import torch

from operators import RestoreError
from operators.naming import AUTO
from restore.backbones.weights import DTYPES, as_dtype

# The data term's gradient, spread over the activations, falls below float16's smallest normal number, 6e-5.
HALF_SCALE = 2.0**10


def has_native_bf16(device: torch.device | str | None = None) -> bool:
    """Return whether bf16 convolutions are faster than fp32 ones on a device (None: CUDA, else the CPU), rather than
    emulated. oneDNN calls every AVX-512 processor capable of bf16, also those that convert it to fp32 and back."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return bool(torch.cpu._is_avx512_bf16_supported() if is_x86 else torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_precision(precision: torch.dtype | str | None, device: torch.device | str) -> torch.dtype:
    """Return the dtype of a precision on a device; "auto" is bf16 where that is native, else fp32.

    Warns once of bf16 by name on a processor that emulates it. Raises RestoreError for an unknown one.
    """
    if precision == AUTO:
        return torch.bfloat16 if has_native_bf16(device) else torch.float32
    if isinstance(precision, str) and precision not in DTYPES:
        raise RestoreError(f"precision must be one of {AUTO}, {', '.join(DTYPES)}, got {precision!r}")
    if precision == "bf16" and torch.device(device).type == "cpu" and not has_native_bf16(device):
        warnings.warn(
            "this processor emulates bf16, which is several times slower than fp32; try precision='auto'", stacklevel=3
        )
    return as_dtype(precision)


def name_precision(dtype: torch.dtype) -> str:
    """Return the short name of a dtype, as precision= takes it."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def keep_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return function(x), computed in `dtype`; in float16 the gradient is larger within it, and as it is outside."""
    if dtype != torch.float16:
        return function(x)
    return _scale_gradient(function(_scale_gradient(x, 1 / HALF_SCALE)), HALF_SCALE)


def _scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    x = x.view_as(x)  # the hook is not for the caller's tensor
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient * factor)
    return x
