"""Perturb or observe the attention of chosen layers within a `with` block, in any architecture.

The module runs unchanged, with its own processor; only what `scaled_dot_product_attention` returns inside it is
replaced, and only for the calling thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from operators import RestoreError
from restore.backbones.base import AttentionLayer
from restore.backbones.forwards import Part, RanLayers, replace_forward
from restore.backbones.graphs import CannotRecord, is_recording
from restore.guidance.targets import AttentionRecord, Draw, LinearRecord, SeededDraw, Target, index_tokens

# Whether a processor of joint attention, with image and text tokens in one sequence, puts the image first.
IMAGE_FIRST = {
    "JointAttnProcessor2_0": True,  # SD3
    "SD3IPAdapterJointAttnProcessor2_0": True,
    "FluxAttnProcessor": False,  # FLUX, Chroma
    "FluxIPAdapterAttnProcessor": False,
    "Flux2AttnProcessor": False,
    "Flux2ParallelSelfAttnProcessor": False,
    "QwenDoubleStreamAttnProcessor2_0": False,
    "AuraFlowAttnProcessor2_0": False,
}
IMAGE_ONLY = ("AttnProcessor2_0", "HunyuanAttnProcessor2_0")
LINEAR = "SanaLinearAttnProcessor2_0"  # without softmax: see LinearRecord


@dataclass(frozen=True)
class PerturbedLayer:
    """One layer to perturb: which heads (None: all), by which target and how strongly (u in [0, 1]).

    scope: in joint attention, "joint" perturbs the map of all tokens; "image" that of the image tokens among
        themselves: their outputs change, those of the text do not. ("cross" is for the caller: `layer` is one of
        cross-attention.)
    """

    layer: AttentionLayer
    target: Target
    strength: float = 1.0
    heads: tuple[int, ...] | None = None
    scope: str = "joint"


@contextmanager
def perturb_attention(
    layers: Sequence[PerturbedLayer],
    draw: Draw | None,
    network: nn.Module | None = None,
    *,
    key: Hashable = None,
) -> Iterator[set[str]]:
    """Within the block the layers attend with the map (1 − u) A + u A'; yield the paths of the layers that ran.

    draw: draw(kind, shape), noise of random targets, in order of execution; from a SeededDraw, the same in every call
    of the network. network: has the layers at their paths and gives the grid of tokens. key: determines, with the
    network's input, what the pass computes unless a target draws; None: it may be anything, and runs uncompiled. Enter
    it around the weak pass only.
    """
    ran: set[str] = set()
    part = None if key is None else RanLayers(("attention", key), ran)

    def attend(n: int, record: AttentionRecord, true: Callable[[], torch.Tensor]) -> torch.Tensor:
        ran.add(layers[n].layer.path)
        own = draw.at(n) if isinstance(draw, SeededDraw) else draw
        own = _refuse if is_recording() else own
        return _mix(layers[n], replace(record, draw=own), true)

    attends = [partial(attend, n) for n in range(len(layers))]
    with _replace_attention([item.layer for item in layers], attends, network, part):
        yield ran


def _refuse(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    raise CannotRecord


@contextmanager
def observe_attention(
    layers: Sequence[AttentionLayer],
    record: Callable[[AttentionLayer, AttentionRecord], None],
    network: nn.Module | None = None,
) -> Iterator[None]:
    """Within the block record(layer, a) is called, without gradients, whenever one of the layers attends."""

    def attend(layer: AttentionLayer, a: AttentionRecord, true: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            record(layer, replace(a, q=a.q.detach(), k=a.k.detach(), v=a.v.detach()))
        return true()

    with _replace_attention(layers, [partial(attend, layer) for layer in layers], network):
        yield


@contextmanager
def _replace_attention(
    layers: Sequence[AttentionLayer],
    attends: Sequence[Callable],
    network: nn.Module | None,
    part: Part | None = None,
):
    """Each layer's attention is attends[i](record, true), where true() computes it as the network would."""
    around: dict[nn.Module, list[nn.Module]] = {}  # the modules that enclose each layer, the innermost first
    for layer in layers if network is not None else ():
        parts = layer.path.split(".")
        around[layer.module] = [network.get_submodule(".".join(parts[:n])) for n in reversed(range(len(parts)))]
    # The last inputs of each module around a layer: sides of the feature map, and numbers of (image, text) tokens.
    sides: dict[nn.Module, tuple[int, int] | None] = {}
    tokens: dict[nn.Module, tuple[int, int] | None] = {}

    def note(module, forward):
        def run(*args, **kwargs):
            inputs = _name_inputs(args, kwargs)
            sides[module], tokens[module] = _find_sides(inputs), _count_tokens(inputs)
            return forward(*args, **kwargs)

        return run

    def intercept(layer, attend):
        def make(module, forward):
            def run(*args, **kwargs):
                inputs, outer = _name_inputs(args, kwargs), around.get(module, ())
                side = _find_sides(inputs) or next((sides[m] for m in outer if sides.get(m)), None)
                # A single block of FLUX gets image and text as one sequence: only what encloses it tells them apart.
                joint = [pair for pair in (_count_tokens(inputs), *(tokens.get(m) for m in outer)) if pair]
                if type(module.processor).__name__ == LINEAR:
                    with _replace_linear(module, attend, side):
                        return forward(*args, **kwargs)
                with _Intercept(layer, attend, side, joint) as mode:
                    out = forward(*args, **kwargs)
                if not mode.calls:
                    raise RestoreError(
                        f"processor of {layer.path} must use scaled_dot_product_attention, got "
                        f"{type(module.processor).__name__}; try network.set_default_attn_processor(), without slicing"
                    )
                return out

            return run

        return make

    with ExitStack() as stack:
        quiet = None if part is None else Part("notes")
        enclosing = dict.fromkeys(m for outer in around.values() for m in outer)
        stack.enter_context(replace_forward(enclosing, note, part=quiet))
        for n, (layer, attend) in enumerate(zip(layers, attends, strict=True)):
            own = quiet if n else part
            stack.enter_context(replace_forward([layer.module], intercept(layer, attend), part=own))
        yield


class _Intercept(TorchFunctionMode):
    """Replaces the result of scaled_dot_product_attention, in this thread only."""

    def __init__(self, layer, attend, side, joint):
        super().__init__()
        self.layer, self.attend, self.side, self.joint, self.calls = layer, attend, side, joint, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        q, k, v, mask, scale = _arguments(*args, **kwargs)
        if (
            self.calls > 1 and k.shape[-2] != q.shape[-2]
        ):  # attention to an image prompt (IP-Adapter), after the layer's
            return func(*args, **kwargs)
        if k.shape[1] != q.shape[1]:
            raise RestoreError(f"grouped queries are not supported: {self.layer.path} shares keys between heads")
        image = self._image(q.shape[-2])
        tokens = q.shape[-2] if image is None else image.stop - image.start
        record = AttentionRecord(q, k, v, mask, scale, None, _token_grid(self.side, tokens), image)
        return self.attend(record, lambda: F.scaled_dot_product_attention(*args, **kwargs))

    def _image(self, tokens: int) -> slice | None:
        image, text = next((pair for pair in self.joint if sum(pair) == tokens), (tokens, 0))
        name = type(self.layer.module.processor).__name__
        if not text and name == "AuraFlowAttnProcessor2_0" and self.side is not None:
            # Its single blocks get one sequence, with tokens of its own before the text.
            image = math.prod(side // self.layer.downsampling for side in self.side)
            text = tokens - image
        if not text:
            return None
        if name not in IMAGE_FIRST:
            known = ", ".join(IMAGE_FIRST)
            raise RestoreError(f"processor of joint attention {self.layer.path} must be one of {known}, got {name}")
        return slice(0, image) if IMAGE_FIRST[name] else slice(text, text + image)


@contextmanager
def _replace_linear(module: nn.Module, attend: Callable, side: tuple[int, int] | None) -> Iterator[None]:
    """Within the block linear attention (Sana) returns attend(record, true): what its last projection gets."""
    seen: dict[str, torch.Tensor] = {}

    def split(x):
        return x.unflatten(-1, (module.heads, -1)).transpose(1, 2)

    def note(name):
        def make(part, forward):
            def run(x):
                seen[name] = forward(x)
                return seen[name]

            return run

        return make

    def project(part, forward):
        def run(out):
            q, k, v = (split(seen[name]) for name in "qkv")
            record = LinearRecord(q, k, v, grid=_token_grid(side, q.shape[-2]))
            return forward(attend(record, lambda: split(out)).transpose(1, 2).flatten(2).to(out.dtype))

        return run

    parts = [(module.to_q, "q"), (module.norm_q, "q"), (module.to_k, "k"), (module.norm_k, "k"), (module.to_v, "v")]
    with ExitStack() as stack:
        for part, name in parts:
            if part is not None:
                stack.enter_context(replace_forward([part], note(name)))
        stack.enter_context(replace_forward([module.to_out[0]], project))
        yield


def _name_inputs(args: tuple, kwargs: dict) -> dict:
    return dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs


_SIDES = WeakIdKeyDictionary()  # (h, w) of positions: to read them makes the host wait for the device


def _find_sides(inputs: dict) -> tuple[int, int] | None:
    """(h, w) of the feature map among the inputs, or of a packed latent, from its positions (FLUX, Chroma, FLUX.2) or
    its shape (QwenImage)."""
    if isinstance(inputs.get("img_ids"), torch.Tensor):
        ids = inputs["img_ids"]
        if ids not in _SIDES:
            h, w = (ids.reshape(-1, ids.shape[-1])[:, 1:3].amax(0) + 1).tolist()
            _SIDES[ids] = int(h), int(w)
        return _SIDES[ids]
    if inputs.get("img_shapes"):
        shapes = inputs["img_shapes"][0]  # of the first image of the batch, and of those it is made from
        return tuple(shapes[0][-2:]) if len(shapes) == 1 else None
    x = inputs.get("hidden_states", inputs.get("sample"))  # other inputs of four dimensions are masks
    return tuple(x.shape[-2:]) if isinstance(x, torch.Tensor) and x.ndim == 4 else None


def _count_tokens(inputs: dict) -> tuple[int, int] | None:
    pair = [inputs.get(name) for name in ("hidden_states", "encoder_hidden_states")]
    if not all(isinstance(value, torch.Tensor) and value.ndim == 3 for value in pair):
        return None
    return pair[0].shape[1], pair[1].shape[1]


def _mix(item: PerturbedLayer, record: AttentionRecord, true: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The attention output under (1 − u) A + u A' on the chosen heads and tokens, under A elsewhere."""
    rows = record.image if item.scope == "image" else None
    if item.heads is None and rows is None:
        if item.strength == 1:
            return _under_target(item, record)
        out = true()
        return torch.lerp(out, _under_target(item, record).to(out.dtype), item.strength)
    place = index_tokens(item.heads, rows)
    mask = record.mask
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
        mask = mask[:, place[1] if mask.shape[1] > 1 else slice(None)]
        mask = mask[:, :, place[2] if mask.shape[2] > 1 else slice(None)]
        mask = mask[..., place[2] if mask.shape[3] > 1 else slice(None)]
    part = replace(record, q=record.q[place], k=record.k[place], v=record.v[place], mask=mask)
    out = true().clone()
    weak = _under_target(item, part if rows is None else replace(part, image=None))
    out[place] = torch.lerp(out[place], weak.to(out.dtype), item.strength)
    return out


def _under_target(item: PerturbedLayer, record: AttentionRecord) -> torch.Tensor:
    with torch.autocast(record.q.device.type, enabled=False):  # an explicit map is computed in fp32
        return item.target(record)


def _token_grid(side: tuple[int, int] | None, tokens: int) -> tuple[int, int] | None:
    """(h, w) of tokens that are the pixels, or the square patches, of a feature map; None if they are neither."""
    if side is None or side[0] * side[1] % tokens:
        return None
    patch = math.isqrt(side[0] * side[1] // tokens)
    h, w = side[0] // patch, side[1] // patch
    return (h, w) if h * w == tokens else None


def _arguments(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if is_causal:
        size = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()
    return query, key, value, attn_mask, scale
