"""Cost of a PSLD step, counted without running it: `python -m benchmarks.psld_cost`.

The networks are fake tensors (shapes and dtypes, no storage), so that Stable Diffusion 1.5 at 512 pixels is analysed
in seconds on any machine. Counted: every convolution and matrix product, and every tensor alive, with fused
attention (no attention map in memory). Not counted: workspaces of the convolution library, fragmentation and the
device's context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import operators
from benchmarks.measure import run_command
from benchmarks.networks import SD15_UNET, SD15_VAE
from restore.backbones.memory_options import enable_block_checkpointing
from restore.backbones.schedule import Schedule
from restore.backbones.sizes import Sized
from restore.backbones.stable_diffusion import StableDiffusion
from restore.guidance import PAG
from restore.memory.count import LiveBytes, list_weights, use_fake_tensors
from restore.samplers.psld import psld

TAESD = {"num_decoder_blocks": (3, 3, 3, 1)}  # AutoencoderTiny's defaults
PARTS = ("unet", "decoder", "encoder", "backward")


@dataclass(frozen=True)
class StepCost:
    """One step of PSLD for one batch.

    unet, decoder, encoder: forward passes; backward: the gradient with respect to z_t through all three (without
        recomputation); weak: PAG's second pass as run, sharing what precedes the perturbed layers;
        weak_unshared: as two full passes. All in FLOP, a multiply-add counting as two.
    parameters: bytes of the weights. peak: largest sum of bytes of other tensors alive during the step;
        peak_pag: the same with PAG; peak_checkpointing: with PAG and gradient checkpointing.
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
        return sum(getattr(self, name) for name in PARTS)

    @property
    def shares(self) -> dict[str, float]:
        """Fractions of a step without PAG."""
        return {name: getattr(self, name) / self.total for name in PARTS}

    @property
    def overhead(self) -> float:
        """Cost with PAG over cost without."""
        return 1 + self.weak / self.total

    @property
    def overhead_unshared(self) -> float:
        """The same with two full passes."""
        return 1 + self.weak_unshared / self.total


def count_psld(
    backbone: StableDiffusion | None = None,
    *,
    size: int | None = None,
    layers: str | list[str] = "i8",
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 77,
    tiny_vae: bool = False,
) -> StepCost:
    """Return the cost of a PSLD step with the backbone's architecture (None: Stable Diffusion 1.5).

    size: side of the image in pixels, by default the trained one. layers: PAG's. tokens: length of the prompt.
    tiny_vae: with TAESD in place of the autoencoder. The operator's own cost is left out. Raises RestoreError for
    unknown layers.
    """
    configs = (SD15_UNET, SD15_VAE) if backbone is None else (backbone.network.config, backbone.vae.config)
    if tiny_vae:
        configs = (configs[0], TAESD)
    schedule, guidance = Schedule.from_config({}), PAG(1.0, layers=layers)
    with use_fake_tensors():
        model = _make_model(*configs, dtype, tokens, schedule)
        side = size or model.resolution * model.downscale
        (_, plain), (first, guided) = _count_flops(model, side, batch, None), _count_flops(model, side, batch, guidance)
        peak, peak_pag = _count_peak(model, side, batch, None), _count_peak(model, side, batch, guidance)
        model = _make_model(*configs, dtype, tokens, schedule)
        enable_block_checkpointing(model)
        peak_checkpointing = _count_peak(model, side, batch, guidance)
    return StepCost(
        **{name: plain[name] for name in PARTS},
        weak=guided["weak"],
        weak_unshared=first["weak"],  # the sampler's first step learns what the passes share
        parameters=sum(p.numel() * p.element_size() for p in list_weights(model)),
        peak=peak,
        peak_pag=peak_pag,
        peak_checkpointing=peak_checkpointing,
    )


def _make_model(unet_config, vae_config, dtype, tokens: int, schedule) -> StableDiffusion:
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

    with _default_dtype(dtype):
        unet = UNet2DConditionModel.from_config(dict(unet_config))
        vae = (AutoencoderTiny if "num_decoder_blocks" in vae_config else AutoencoderKL).from_config(dict(vae_config))
    text = torch.randn(1, tokens, unet.config.cross_attention_dim)
    return StableDiffusion(unet, vae, schedule, text)


def _run_two_steps(prior: Sized, batch: int, guidance, callback=None) -> None:
    y = torch.randn(batch, 3, prior.height, prior.width)
    options = {"steps": [501, 500], "eta": 1.0, "gamma": 0.1, "guidance": guidance, "callback": callback}
    psld(prior, operators.Denoising(), y, noise=lambda k, shape, kind: torch.randn(shape), **options)


def _count_flops(model: StableDiffusion, side: int, batch: int, guidance) -> list[dict[str, int]]:
    """Return the FLOP of the parts of psld's first two steps; backward is the rest."""
    prior, counts, steps = Sized(model, side, side), {}, []
    start = 0

    def count(name: str, function):
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
        setattr(prior, method, count(name, getattr(prior, method)))
    with make_counter() as counter:
        _run_two_steps(prior, batch, guidance, end)
    return steps


def _count_peak(model: StableDiffusion, side: int, batch: int, guidance) -> int:
    # Not in one run with _count_flops: its counter keeps tensors of recomputed blocks alive.
    with LiveBytes(list_weights(model)) as live:
        _run_two_steps(Sized(model, side, side), batch, guidance)
    return live.peak


def make_counter() -> FlopCounterMode:
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


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules built within the block have weights of `dtype`; fake ones cannot be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def format_cost(tiny_vae: bool = False) -> str:
    """Return Markdown: shares of a step of SD 1.5 at 512 pixels in bf16, PAG's overhead, peak memory."""
    cost = count_psld(tiny_vae=tiny_vae)
    lines = ["PSLD step, SD 1.5 configuration, 512 px, bf16, computed from FLOPs and tensor sizes", ""]
    lines += ["phase | share of a step without PAG", "---|---"]
    lines += [f"{name} | {100 * share:.1f} %" for name, share in cost.shares.items()]
    lines += ["", f"PAG with the shared prefix: x {cost.overhead:.3f}; with two passes: x {cost.overhead_unshared:.3f}"]
    parts = {"weights": cost.parameters, "step with PAG": cost.peak_pag, "with checkpointing": cost.peak_checkpointing}
    return "\n".join([*lines, "memory: " + ", ".join(f"{name} {n / 1e9:.2f} GB" for name, n in parts.items())])


if __name__ == "__main__":
    run_command(format_cost)
