"""Pixel networks as a CPU runs them without gradients: the functions of diffusers in fewer operations and copies.

Features lie channels last, as oneDNN's convolutions and the projections of attention read them; 1 x 1 convolutions are
matrix products; sums, activations and the scale and shift of the noise level happen in place or within the
normalisation. Results equal those of the blocks' own code to rounding, and are the same bytes in every run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from restore.backbones.diffusers_parts import Attention, ResnetBlock2D, UNet2DModel

PLAIN = (nn.Conv2d, nn.GroupNorm, nn.Linear, nn.SiLU, nn.Dropout)
FEW = 1024  # pixels of a batch below which a convolution's time is a good part that of reading its weights
COPIED = 2**26  # bytes of weights that a run may hold a second time
_THREAD = threading.local()


class Lean:
    """What one run keeps: the weights of convolutions on few pixels in the order in which they are read, and the last
    noise level's activation. Made anew for every run, because weights may change in between."""

    def __init__(self) -> None:
        self.weights: dict[nn.Module, torch.Tensor] = {}
        self.bytes, self.level = 0, (None, None)

    def order(self, conv: nn.Conv2d) -> torch.Tensor:
        """Return the weight of `conv` channels last, as long as there is room for copies."""
        if conv not in self.weights:
            self.bytes += conv.weight.nbytes
            if self.bytes > COPIED:
                self.weights[conv] = conv.weight
            else:
                self.weights[conv] = conv.weight.contiguous(memory_format=torch.channels_last)
        return self.weights[conv]

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
    """Return what this thread runs with if x can run lean: on a CPU, in fp32, without gradients, not compiled."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    return getattr(_THREAD, "lean", None) if x.device.type == "cpu" and x.dtype == torch.float32 else None


def count_copies(network: nn.Module) -> int:
    """Return the most bytes of weights that a run may hold a second time."""
    blocks = [block for block in network.modules() if type(block) is ResnetBlock2D]
    return min(COPIED, sum(conv.weight.nbytes for block in blocks for conv in (block.conv1, block.conv2)))


def prepare_lean(network: nn.Module) -> None:
    """Let the residual blocks and attention layers of a network of diffusers run lean where `run_lean` asks for it."""
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
        and (forward is None or hasattr(forward, "dispatcher"))
    )


def run_unet(lean: Lean, network: UNet2DModel, x, t, class_labels=None, return_dict=True):
    """Return (output,) of a network, whose own forward asks all its modules for their dtype twice; None for another."""
    classes, blocks = network.class_embedding, (*network.down_blocks, *network.up_blocks)
    known = network.config.time_embedding_type == "positional" and network.config.class_embed_type is None
    if return_dict or not known or network.config.center_input_sample or (classes is None) != (class_labels is None):
        return None
    if network.mid_block is None or any(hasattr(block, "skip_conv") for block in blocks) or t.shape != x.shape[:1]:
        return None
    level = network.time_embedding(network.time_proj(t))
    level = level if classes is None else level + classes(class_labels)
    x = network.conv_in(x)
    kept = [x]
    for block in network.down_blocks:
        x, more = block(hidden_states=x, temb=level)
        kept.extend(more)
    x = network.mid_block(x, level)
    for block in network.up_blocks:
        first = len(kept) - len(block.resnets)
        x = block(x, tuple(kept[first:]), level)
        del kept[first:]
    return (network.conv_out(network.conv_act(network.conv_norm_out(x))),)


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
    if resample is not None:
        x, h = resample(x), resample(h)
    h = _convolve(lean, block.conv1, h)
    weight, bias = block.norm2.weight, block.norm2.bias
    if temb is not None and block.time_emb_proj is not None:
        level = temb if block.skip_time_act else lean.activate(temb)
        level = F.linear(level, block.time_emb_proj.weight, block.time_emb_proj.bias)
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
        F.linear(tokens, part.weight, part.bias).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for part in (layer.to_q, layer.to_k, layer.to_v)
    )
    del h, tokens
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, height, width, -1)
    del q, k, v
    out = F.linear(out, layer.to_out[0].weight, layer.to_out[0].bias).permute(0, 3, 1, 2)
    if layer.residual_connection:
        out += x
    return out if layer.rescale_output_factor == 1 else out.div_(layer.rescale_output_factor)


def _normalise(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _convolve(lean: Lean, conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1:
        return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)
    weight = lean.order(conv) if x.shape[0] * x.shape[2] * x.shape[3] <= FEW else conv.weight
    return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


RUNS = {UNet2DModel: run_unet, ResnetBlock2D: run_resnet, Attention: run_attention}
