"""Pixel networks as a CPU runs them without gradients: the functions of diffusers in fewer operations and copies.

Features lie channels last, as oneDNN's convolutions and the projections of attention read them; 1 x 1 convolutions are
matrix products, 3 x 3 ones take fewer products (restore.backbones.convolution); sums, activations and the scale and
shift of the noise level happen in place or within the normalisation. Where autocast asks for bf16, weights are
converted once a run. Results equal those of the blocks' own code to rounding, and are the same bytes in every run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from restore.backbones import convolution
from restore.backbones.diffusers_parts import Attention, ResnetBlock2D, UNet2DModel, Upsample2D

PLAIN = (nn.Conv2d, nn.GroupNorm, nn.Linear, nn.SiLU, nn.Dropout, Upsample2D)
FEW = 1024  # pixels of a batch below which a convolution's time is a good part that of reading its weights
COPIED = 2**27  # bytes of weights that a run may hold a second time
_THREAD = threading.local()


class Lean:
    """What one run keeps: the weights of convolutions as they are read, and the last noise level's activation. Made
    anew for every run, because weights may change in between."""

    def __init__(self) -> None:
        self.weights: dict[tuple[nn.Module, Callable], torch.Tensor | None] = {}
        self.bytes, self.level = 0, (None, None)

    def order(self, layer: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
        """Return make(the weight of `layer`), made once, or None if there is no room for copies."""
        key = (layer, make)
        if key not in self.weights:
            made = make(layer.weight.detach()) if self.bytes < COPIED else None
            self.bytes += 0 if made is None else made.nbytes
            self.weights[key] = made if self.bytes <= COPIED else None
        return self.weights[key]

    def activate(self, level: torch.Tensor) -> torch.Tensor:
        """Return silu(level), computed once for all blocks of a pass."""
        if self.level[0] is not level:
            self.level = (level, F.silu(level))
        return self.level[1]


@contextmanager
def run_lean() -> Iterator[None]:
    """Within the block, networks prepared by `prepare_lean` run that way in this thread: one run of a sampler."""
    with _set(Lean()):
        yield


def keep_own_code(on: bool = True) -> AbstractContextManager:
    """Within the block, networks run their own code in this thread, if `on`."""
    return _set(None) if on else nullcontext()


@contextmanager
def _set(lean: Lean | None) -> Iterator[None]:
    before = getattr(_THREAD, "lean", None)
    _THREAD.lean = lean
    try:
        yield
    finally:
        _THREAD.lean = before


def find_lean(x: torch.Tensor) -> Lean | None:
    """Return what this thread runs with if x can run lean: on a CPU, in fp32 or where autocast asks for bf16, without
    gradients, not compiled."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    known = (torch.float32, torch.bfloat16) if is_low() else (torch.float32,)
    return getattr(_THREAD, "lean", None) if x.device.type == "cpu" and x.dtype in known else None


def is_low() -> bool:
    """Whether autocast asks for bf16 on the CPU."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def count_copies(network: nn.Module, low: bool = False) -> int:
    """Return the most bytes of weights that a run may hold a second time. low: in bf16."""
    modules = list(network.modules())
    enlarged = {block.conv1 for block in modules if type(block) is ResnetBlock2D and block.upsample is not None}
    enlarged |= {
        layer.conv for layer in modules if type(layer) is Upsample2D and layer.use_conv and layer.name == "conv"
    }
    total = 0.0
    for conv in modules:
        if low and isinstance(conv, nn.Conv2d | nn.Linear):
            total += conv.weight.nbytes / 2 * (16 / 9 if conv in enlarged else 1)
        elif isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            is_tiled = convolution.is_wide(conv.in_channels, conv.out_channels) and conv not in enlarged
            total += conv.weight.nbytes * (4 if is_tiled else 16 / 9 if conv in enlarged else 1)
    return min(COPIED, int(total))


def prepare_lean(network: nn.Module) -> None:
    """Let a network of diffusers and its layers run lean where `run_lean` asks for it."""
    for module in network.modules():
        run = RUNS.get(type(module))
        if run is not None and "forward" not in module.__dict__:
            module.forward = partial(_choose, run, module, module.forward)


def _choose(run, module, forward, *args, **kwargs):
    lean = find_lean(args[0]) if args else None
    out = None if lean is None else run(lean, module, *args, **kwargs)
    return forward(*args, **kwargs) if out is None else out


def _is_plain(module: nn.Module | None) -> bool:
    """Whether a module does what its class does: no subclass, hooks, or forward of its own (the temporary ones of
    restore.backbones.forwards only watch)."""
    if module is None:
        return True
    forward = module.__dict__.get("forward")
    return (
        type(module) in PLAIN
        and not (module._forward_hooks or module._forward_pre_hooks or module.training)
        and getattr(module, "padding_mode", "zeros") == "zeros"
        and (forward is None or hasattr(forward, "dispatcher") or getattr(forward, "func", None) is _choose)
    )


class _KnownType:
    """A network that need not look through all its modules for its dtype, as it does twice an evaluation (4 ms)."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        self.network, self.dtype = network, dtype

    def __getattr__(self, name: str):
        return getattr(self.network, name)


def run_unet(lean: Lean, network: UNet2DModel, *args, **kwargs):
    """Return what the network's own forward does."""
    return UNet2DModel.forward(_KnownType(network, network.conv_in.weight.dtype), *args, **kwargs)


def run_resnet(lean: Lean, block: ResnetBlock2D, x: torch.Tensor, temb: torch.Tensor | None = None, *args, **kwargs):
    """Return what the block does, None for a block of another kind."""
    parts = (block.norm1, block.conv1, block.norm2, block.conv2, block.nonlinearity, block.dropout)
    if args or kwargs or not all(map(_is_plain, (*parts, block.time_emb_proj, block.conv_shortcut))):
        return None
    is_shifted = block.time_embedding_norm == "scale_shift"
    if not is_shifted and block.time_embedding_norm != "default" or type(block.nonlinearity) is not nn.SiLU:
        return None
    h = F.silu(_normalise(block.norm1, x), inplace=True)
    resample = block.upsample or block.downsample
    if resample is not None and _only_enlarges(resample):
        x, h = resample(x), _convolve_enlarged(lean, block.conv1, h)
    else:
        x, h = (x, h) if resample is None else (resample(x), resample(h))
        h = _convolve(lean, block.conv1, h)
    weight, bias = block.norm2.weight, block.norm2.bias
    if temb is not None and block.time_emb_proj is not None:
        level = temb if block.skip_time_act else lean.activate(temb)
        level = _project(lean, block.time_emb_proj, level)
        if not is_shifted:
            h += level[:, :, None, None]
        elif len(x) == 1:  # within the normalisation: its own weights, scaled and shifted
            scale, shift = level[0].chunk(2)
            weight, bias = weight * (1 + scale), torch.addcmul(shift, bias, 1 + scale)
    elif is_shifted:
        return None
    h = F.group_norm(h, block.norm2.num_groups, weight, bias, block.norm2.eps)
    if is_shifted and len(x) > 1:
        scale, shift = level[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, h, 1 + scale)
    h = _convolve(lean, block.conv2, F.silu(h, inplace=True))
    h += x if block.conv_shortcut is None else _convolve(lean, block.conv_shortcut, x)
    return h if block.output_scale_factor == 1 else h.div_(block.output_scale_factor)


def run_upsample(lean: Lean, layer: Upsample2D, x: torch.Tensor, output_size=None, *args, **kwargs):
    """Return what an enlargement to nearest neighbours does, with a convolution or without; None for another kind."""
    if output_size is not None or args or kwargs or not layer.interpolate or layer.norm is not None:
        return None
    if _only_enlarges(layer):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    conv = getattr(layer, "conv", None) if layer.use_conv else None
    return _convolve_enlarged(lean, conv, x) if conv is not None and _is_plain(conv) else None


def _only_enlarges(layer: nn.Module) -> bool:
    plain = type(layer) is Upsample2D and _is_plain(layer) and layer.interpolate and layer.norm is None
    return plain and not (layer.use_conv or layer.use_conv_transpose)


def run_attention(
    lean: Lean, layer: Attention, x: torch.Tensor, encoder_hidden_states=None, attention_mask=None, **kwargs
):
    """Return what a self-attention layer of a feature map does, None for a layer of another kind."""
    parts = (layer.group_norm, layer.to_q, layer.to_k, layer.to_v, *layer.to_out)
    if (
        x.ndim != 4
        or encoder_hidden_states is not None
        or attention_mask is not None
        or type(layer.processor).__name__ != "AttnProcessor2_0"
        or not (layer.spatial_norm is layer.norm_q is layer.norm_k is None)
        or set(kwargs) - {"temb"}
        or not all(map(_is_plain, parts))
    ):
        return None
    batch, channels, height, width = x.shape
    h = x if layer.group_norm is None else _normalise(layer.group_norm, x)
    tokens = h.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    q, k, v = (
        _project(lean, part, tokens).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for part in (layer.to_q, layer.to_k, layer.to_v)
    )
    del h, tokens
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, height, width, -1)
    del q, k, v
    out = _project(lean, layer.to_out[0], out).permute(0, 3, 1, 2)
    if layer.residual_connection:
        out += x
    return out if layer.rescale_output_factor == 1 else out.div_(layer.rescale_output_factor)


def _normalise(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _convolve(lean: Lean, conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    low, weight = is_low(), None
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1:
        weight = lean.order(conv, _lower) if low else None
        weight = conv.weight if weight is None else weight
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), conv.bias).permute(0, 3, 1, 2)
    if not low and _is_usual(conv) and convolution.can_tile(x, conv.out_channels):
        weight = lean.order(conv, convolution.order_tiles)
        if weight is not None:
            return convolution.convolve_tiles(x, weight, conv.bias)
    if low or x.shape[0] * x.shape[2] * x.shape[3] <= FEW:
        weight = lean.order(conv, _lower if low else _order_last)
    weight = conv.weight if weight is None else weight
    return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _project(lean: Lean, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    weight = lean.order(layer, _lower) if is_low() else None
    return F.linear(x, layer.weight if weight is None else weight, layer.bias)


def _convolve_enlarged(lean: Lean, conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    make = _lower_enlarged if is_low() else convolution.order_enlarged
    weight = lean.order(conv, make) if _is_usual(conv) else None
    if weight is not None:
        return convolution.convolve_enlarged(x, weight, conv.bias)
    return _convolve(lean, conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _is_usual(conv: nn.Conv2d) -> bool:
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1)


def _order_last(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def _lower(weight: torch.Tensor) -> torch.Tensor:
    return weight.bfloat16() if weight.ndim < 4 else _order_last(weight.bfloat16())


def _lower_enlarged(weight: torch.Tensor) -> torch.Tensor:
    return _order_last(convolution.order_enlarged(weight).bfloat16())


RUNS = {UNet2DModel: run_unet, ResnetBlock2D: run_resnet, Upsample2D: run_upsample, Attention: run_attention}
