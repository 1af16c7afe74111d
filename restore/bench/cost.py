"""What a step of PSLD costs, counted without running it: arithmetic and memory on tensors without data.

The networks are built as fake tensors (shapes and types, no storage), so that Stable Diffusion 1.5 at 512
pixels is analysed in seconds on any machine. Counted: every convolution and matrix product, and every
tensor alive, with fused attention (no attention map in memory). Not counted: the convolution library's
workspaces, the allocator's fragmentation and the device's context.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import operators
from restore.backbones.schedule import Schedule
from restore.backbones.sizes import Sized
from restore.backbones.stable_diffusion import StableDiffusion
from restore.guidance import PAG
from restore.samplers.psld import psld

SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768}  # otherwise UNet2DConditionModel's defaults
SD15_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}

TAESD = {"num_decoder_blocks": (3, 3, 3, 1)}  # AutoencoderTiny's defaults


@dataclass(frozen=True)
class StepCost:
    """One step of PSLD for one batch.

    unet, decoder, encoder: forward passes; backward: the gradient to z_t through all three (without
        recomputation); weak: PAG's second pass as run, sharing what precedes the perturbed layers;
        weak_unshared: as two full passes. All in FLOP, a multiply-add counting as two.
    parameters: bytes of the weights. peak: greatest sum of bytes of other tensors alive during the step;
        peak_pag: the same with PAG; peak_checkpointing: with PAG and activations recomputed in backward.
    """

    unet: int
    decoder: int
    encoder: int
    backward: int
    weak: int
    weak_unshared: int
    parameters: int
    peak: int
    peak_pag: int
    peak_checkpointing: int

    @property
    def total(self) -> int:
        """FLOP of a step without PAG."""
        return self.unet + self.decoder + self.encoder + self.backward

    @property
    def shares(self) -> dict[str, float]:
        """Fractions of a step without PAG."""
        parts = ("unet", "decoder", "encoder", "backward")
        return {name: getattr(self, name) / self.total for name in parts}

    @property
    def overhead(self) -> float:
        """Cost with PAG over cost without."""
        return 1 + self.weak / self.total

    @property
    def overhead_unshared(self) -> float:
        """The same with two full passes."""
        return 1 + self.weak_unshared / self.total


def psld_cost(
    backbone: StableDiffusion | None = None,
    *,
    size: int | None = None,
    layers: str | list[str] = "i8",
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    vae_dtype: torch.dtype | None = None,
    tokens: int = 77,
    tiny_vae: bool = False,
) -> StepCost:
    """Cost of a step of PSLD with the backbone's architecture (None: Stable Diffusion 1.5).

    size: side of the image in pixels, by default the trained one. layers: PAG's. dtype: of the U-Net and,
    unless vae_dtype says otherwise, the autoencoder. tokens: length of the prompt. tiny_vae: with
    TAESD in place of the autoencoder. The operator's own cost is left out. Raises RestoreError for unknown layers.
    """
    configs = (SD15_UNET, SD15_VAE) if backbone is None else (backbone.network.config, backbone.vae.config)
    if tiny_vae:
        configs = (configs[0], TAESD)
    dtypes = (dtype, vae_dtype or dtype)
    schedule, guidance = Schedule.from_config({}), PAG(1.0, layers=layers)
    with FakeTensorMode(allow_non_fake_inputs=True), _OnlyShapes():
        model = _fake_model(*configs, *dtypes, tokens, schedule)
        side = size or model.resolution * model.downscale
        (_, plain), (first, guided) = _flops(model, side, batch, None), _flops(model, side, batch, guidance)
        peak, peak_pag = _peak(model, side, batch, None), _peak(model, side, batch, guidance)
        model = _fake_model(*configs, *dtypes, tokens, schedule, checkpointing=True)
        peak_checkpointing = _peak(model, side, batch, guidance)
    return StepCost(
        **{name: plain[name] for name in ("unet", "decoder", "encoder", "backward")},
        weak=guided["weak"],
        weak_unshared=first["weak"],  # the sampler's first step learns what the passes have in common
        parameters=sum(p.numel() * p.element_size() for p in _weights(model)),
        peak=peak,
        peak_pag=peak_pag,
        peak_checkpointing=peak_checkpointing,
    )


class _OnlyShapes(TorchFunctionMode):
    """Among fake tensors: real ones (a schedule's) stay real, and a question about values is answered with yes."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        fake = any(isinstance(v, FakeTensor) for v in tensors)
        if function is torch.Tensor.__bool__ and fake:
            return True
        with unset_fake_temporarily() if (tensors and not fake) or function is torch.tensor else nullcontext():
            return function(*args, **(kwargs or {}))


def _fake_model(unet_config, vae_config, dtype, vae_dtype, tokens: int, schedule, checkpointing=False):
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

    with _default_dtype(dtype):
        unet = UNet2DConditionModel.from_config(dict(unet_config))
    with _default_dtype(vae_dtype):
        tiny = "num_decoder_blocks" in vae_config
        vae = (AutoencoderTiny if tiny else AutoencoderKL).from_config(dict(vae_config))
    text = torch.randn(1, tokens, unet.config.cross_attention_dim)
    return StableDiffusion(unet, vae, schedule, text, checkpointing=checkpointing)


def _two_steps(prior: Sized, batch: int, guidance, callback=None) -> None:
    y = torch.randn(batch, 3, prior.height, prior.width)
    options = {"steps": [501, 500], "eta": 1.0, "gamma": 0.1, "guidance": guidance, "callback": callback}
    psld(prior, operators.Denoising(), y, noise=lambda k, shape, kind: torch.randn(shape), **options)


def _flops(model: StableDiffusion, side: int, batch: int, guidance) -> list[dict[str, int]]:
    """FLOP of the parts of psld's first two steps; backward is what is left."""
    prior, counts, steps = Sized(model, side, side), {}, []
    start = 0

    def counted(name: str, function):
        def call(x, *args):
            before = counter.get_total_flops()
            out = function(x.view_as(x), *args)  # the counter's hooks want no leaf as a module's input
            part = "weak" if name == "unet" and not torch.is_grad_enabled() else name
            counts[part] = counts.get(part, 0) + counter.get_total_flops() - before
            return out

        return call

    def end(step: dict) -> None:
        nonlocal start
        total = counter.get_total_flops()
        steps.append({**counts, "backward": total - start - sum(counts.values())})
        counts.clear()
        start = total

    for name, method in (("unet", "predict"), ("decoder", "decode"), ("encoder", "encode")):
        setattr(prior, method, counted(name, getattr(prior, method)))
    with _counter() as counter:
        _two_steps(prior, batch, guidance, end)
    return steps


def _peak(model: StableDiffusion, side: int, batch: int, guidance) -> int:
    # Not in one run with _flops: its counter keeps tensors of recomputed blocks alive.
    with LiveBytes(known=_weights(model)) as live:
        _two_steps(Sized(model, side, side), batch, guidance)
    return live.peak


def _weights(model: Any) -> list[nn.Parameter]:
    vae = getattr(model, "vae", None)
    return [*model.network.parameters(), *(vae.parameters() if vae is not None else ())]


@contextmanager
def counting(backbone: Any) -> Iterator[LiveBytes]:
    """Within the block new tensors have no data, a real `backbone` runs on them, and their bytes are counted."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _OnlyShapes():
        with LiveBytes(known=[mode.from_tensor(weight) for weight in _weights(backbone)]) as live:
            yield live


def _counter() -> FlopCounterMode:
    aten = torch.ops.aten

    def forward(q, k, v, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad, q, k, v, *args, out_shape=None, **kwargs) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


class LiveBytes(TorchDispatchMode):
    """Within the block, counts the bytes of tensors that operations made and that are still alive.

    known: tensors whose storage is not counted, though operations may return views of it.
    now, peak: the present and the greatest count.
    """

    def __init__(self, known: list[torch.Tensor] | tuple = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in known)}
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self.known or (key in self.alive and self.alive[key]() is storage):
            return
        size = storage.nbytes()

        def gone(_) -> None:
            self.alive.pop(key, None)
            self.now -= size

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules built within the block have weights of `dtype`; fake ones cannot be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
