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

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from restore.backbones.stable_diffusion import StableDiffusion
from restore.guidance import PAG, estimator

SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768}  # otherwise UNet2DConditionModel's defaults
SD15_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}


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
) -> StepCost:
    """Cost of a step of PSLD with the backbone's architecture (None: Stable Diffusion 1.5).

    size: side of the image in pixels, by default the trained one. layers: PAG's. dtype: of the U-Net and,
    unless vae_dtype says otherwise, the autoencoder. tokens: length of the prompt. The operator's own
    cost is left out. Raises RestoreError for unknown layers.
    """
    configs = (SD15_UNET, SD15_VAE) if backbone is None else (backbone.network.config, backbone.vae.config)
    vae_dtype = vae_dtype or dtype
    guidance = PAG(1.0, layers=layers)
    with FakeTensorMode():
        model = _fake_model(*configs, dtype, vae_dtype, tokens)
        side = model.resolution if size is None else size // model.downscale
        z = torch.randn(batch, model.channels, side, side, requires_grad=True)
        guided, plain = _flops(model, z, guidance), _flops(model, z, None)
        weak_unshared = _weak_unshared(model, z, guidance)
        peak, peak_pag = _peak(model, z, None), _peak(model, z, guidance)
        model = _fake_model(*configs, dtype, vae_dtype, tokens, checkpointing=True)
        peak_checkpointing = _peak(model, z, guidance)
    return StepCost(
        unet=plain["score"],
        decoder=plain["decoder"],
        encoder=plain["encoder"],
        backward=plain["backward"],
        weak=guided["weak"],
        weak_unshared=weak_unshared,
        parameters=sum(p.numel() * p.element_size() for p in _weights(model)),
        peak=peak,
        peak_pag=peak_pag,
        peak_checkpointing=peak_checkpointing,
    )


def _fake_model(unet_config, vae_config, dtype, vae_dtype, tokens: int, checkpointing=False) -> StableDiffusion:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with _default_dtype(dtype):
        unet = UNet2DConditionModel.from_config(dict(unet_config))
    with _default_dtype(vae_dtype):
        vae = AutoencoderKL.from_config(dict(vae_config))
    text = torch.randn(1, tokens, unet.config.cross_attention_dim)
    return StableDiffusion(unet, vae, torch.ones(1000), text, checkpointing=checkpointing)


def _step(model: StableDiffusion, z: torch.Tensor, guidance, score, decoder, encoder, backward, weak) -> None:
    """psld's second step without the operator and the update, each part within its context manager."""
    vae = model.vae
    with estimator(model, guidance) as estimate:
        if guidance is not None:
            with torch.no_grad():
                estimate(z, 1)  # the first step learns what the two passes share
        with score:
            strong = estimate.strong(z, 1)
        with decoder:
            z0_hat = z - strong.eps
            x0_hat = vae.decode(z0_hat.to(vae.dtype), return_dict=False)[0].to(z.dtype)
        with encoder:
            encoded = vae.encode(x0_hat.to(vae.dtype)).latent_dist.mean.to(z.dtype)
        with backward:
            torch.autograd.grad(x0_hat.norm() + (z0_hat - encoded).norm(), z)
        with weak:
            estimate.guided(strong, z, 1)


def _flops(model: StableDiffusion, z: torch.Tensor, guidance) -> dict[str, int]:
    counters = {name: _counter() for name in ("score", "decoder", "encoder", "backward", "weak")}
    _step(model, z, guidance, **counters)
    return {name: counter.get_total_flops() for name, counter in counters.items()}


def _peak(model: StableDiffusion, z: torch.Tensor, guidance) -> int:
    # Not in one run with _flops: its counter keeps tensors of recomputed blocks alive.
    with LiveBytes(known=[*_weights(model), z]) as live:
        _step(model, z, guidance, *[nullcontext()] * 5)
    return live.peak


def _weights(model: StableDiffusion) -> list[nn.Parameter]:
    return [*model.network.parameters(), *model.vae.parameters()]


def _weak_unshared(model: StableDiffusion, z: torch.Tensor, guidance) -> int:
    with _counter() as both, torch.no_grad(), estimator(model, guidance, share_prefix=False) as estimate:
        estimate(z, 1)
    with _counter() as one, torch.no_grad():
        model.predict(z, 1)
    return both.get_total_flops() - one.get_total_flops()


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
