"""What a step costs: `restore profile`. Every figure is a ratio of medians measured alternately in one run.

Times depend on the machine, ratios hardly do. The network has the FFHQ configuration of DPS with
random weights, which cost the same as trained ones.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch.overrides import TorchFunctionMode

import operators
from operators import RestoreError
from restore.backbones.adm import ADM
from restore.bench.cost import psld_cost
from restore.guidance import PAG, estimator
from restore.samplers.dps import dps
from restore.samplers.steps import Diffusion, respace

FFHQ = {
    "sample_size": 256,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "layers_per_block": 1,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 4 + ["AttnDownBlock2D", "ResnetDownsampleBlock2D"],
    "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"] + ["ResnetUpsampleBlock2D"] * 4,
    "attention_head_dim": 64,
    "norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
}
LAYER = "input_blocks.9.1"
ZETA, T, PAG_SCALE = 1.0, 500, 1.0


def ffhq_backbone(device: str = "cpu", checkpointing: bool = False) -> ADM:
    torch.manual_seed(0)
    return ADM(UNet2DModel(**FFHQ), device=device, checkpointing=checkpointing)


class Bench:
    """One DPS step at t = 500 on a random problem (SR x8), in the variants that are compared."""

    def __init__(self, backbone: ADM, size: int, batch: int) -> None:
        g = torch.Generator().manual_seed(0)
        device = backbone.device
        self.backbone, self.operator = backbone, operators.SuperResolution(8)
        self.x_t = torch.randn(batch, 3, size, size, generator=g).to(device)
        self.y = self.operator.A(torch.randn(batch, 3, size, size, generator=g).to(device).tanh())
        self.n = torch.randn(batch, 3, size, size, generator=g).to(device)
        self.diffusion = Diffusion(backbone.alphas_cumprod, respace(1000, 1000))

    def sampler(self, guidance) -> float:
        """One step of the package's own loop."""
        started = time.perf_counter()
        dps(
            self.backbone,
            self.operator,
            self.y,
            x_T=self.x_t,
            timesteps=[T],
            zeta=ZETA,
            guidance=guidance,
            noise=lambda k, shape, kind: self.n,
        )
        synchronize(self.x_t.device)
        return time.perf_counter() - started

    def package(self) -> float:
        return self.sampler(None)

    def shared(self) -> float:
        return self.sampler(PAG(PAG_SCALE, layers=LAYER))

    def written_out(self, weak: Callable | None = None) -> float:
        """The same step as a script would write it around the same network: no class, no protocol."""
        started = time.perf_counter()
        x_t = self.x_t.detach().requires_grad_()
        eps, v = self.backbone.network(x_t, T, return_dict=False)[0].chunk(2, dim=1)
        eps_guided = eps.detach()
        if weak is not None:
            eps_guided = eps_guided + PAG_SCALE * (eps_guided - weak(x_t.detach()))
        self._finish(x_t, eps, v, eps_guided)
        return time.perf_counter() - started

    def two_passes(self) -> float:
        """PAG with two full passes."""
        with IdentityAttention(self.backbone, LAYER) as identity:

            def weak(x_t):
                with torch.no_grad(), identity:
                    return self.backbone.network(x_t, T, return_dict=False)[0].chunk(2, dim=1)[0]

            return self.written_out(weak)

    def batched(self) -> float:
        """PAG with both branches in one batch, which drags the weak one through the graph."""
        started = time.perf_counter()
        x_t = self.x_t.detach().requires_grad_()
        with IdentityAttention(self.backbone, LAYER, second_half_only=True) as identity, identity:
            out = self.backbone.network(torch.cat([x_t, x_t]), T, return_dict=False)[0]
        strong, weak = out.chunk(2)
        eps, v = strong.chunk(2, dim=1)
        eps_guided = eps.detach() + PAG_SCALE * (eps - weak[:, :3]).detach()
        self._finish(x_t, eps, v, eps_guided)
        return time.perf_counter() - started

    def _finish(self, x_t, eps, v, eps_guided) -> None:
        x0_hat = self.diffusion.x0(x_t, eps, T)
        norm = torch.linalg.vector_norm(self.y - self.operator.A(x0_hat))
        (grad,) = torch.autograd.grad(norm, x_t)
        with torch.no_grad():
            self.diffusion.step(x_t.detach(), eps_guided, v.detach(), T, self.n) - ZETA * grad
        synchronize(self.x_t.device)

    def phases(self) -> dict[str, float]:
        """Seconds of the parts of a DPS+PAG step."""
        marks = [time.perf_counter()]

        def mark() -> None:
            synchronize(self.x_t.device)
            marks.append(time.perf_counter())

        with estimator(self.backbone, PAG(PAG_SCALE, layers=LAYER)) as estimate:
            with torch.no_grad():
                estimate(self.x_t, T)  # the first step learns what the two passes share
            marks[0] = time.perf_counter()
            x_t = self.x_t.detach().requires_grad_()
            strong = estimate.strong(x_t, T)
            mark()
            x0_hat = self.diffusion.x0(x_t, strong.eps, T)
            norm = torch.linalg.vector_norm(self.y - self.operator.A(x0_hat))
            mark()
            (grad,) = torch.autograd.grad(norm, x_t)
            mark()
            eps = estimate.guided(strong, x_t, T)
            mark()
            with torch.no_grad():
                self.diffusion.step(x_t.detach(), eps, strong.variance.detach(), T, self.n) - ZETA * grad
            mark()
        names = ("strong pass", "operator", "backward", "weak pass", "update")
        return {name: b - a for name, a, b in zip(names, marks, marks[1:], strict=False)}


class IdentityAttention(TorchFunctionMode):
    """Plain reference implementation of PAG's perturbation for one layer, independent of restore.guidance."""

    def __init__(self, backbone: ADM, paper_name: str, second_half_only: bool = False) -> None:
        super().__init__()
        (layer,) = (item for item in backbone.attention.values() if item.paper == paper_name)
        self.module, self.half, self.inside = layer.module, second_half_only, False
        self.hooks = [
            self.module.register_forward_pre_hook(lambda *_: setattr(self, "inside", True)),
            self.module.register_forward_hook(lambda *_: setattr(self, "inside", False)),
        ]

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is F.scaled_dot_product_attention and self.inside:
            value = args[2]
            return torch.cat([out[: len(out) // 2], value[len(value) // 2 :]]) if self.half else value
        return out


def synchronize(device: torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


VARIANTS = {
    "DPS, written out": Bench.written_out,
    "DPS": Bench.package,
    "DPS+PAG, two passes": Bench.two_passes,
    "DPS+PAG, batched": Bench.batched,
    "DPS+PAG, shared prefix": Bench.shared,
}


def profile(
    size: int = 128,
    batch: int = 1,
    repeats: int = 5,
    memory_size: int = 256,
    device: str = "cpu",
    psld: bool = True,
) -> str:
    """Measure and describe: time of every variant, phases of a step, peak memory, images per hour.

    size, batch: of the timed steps. repeats: rounds; each round times every variant once, after one
    round of warm-up. memory_size: side of the image for the memory figures, 0 to leave them out (on a
    CPU each variant then runs in its own process and its peak resident memory is read).
    """
    if min(size, memory_size or 32) < 32 or size % 32 or memory_size % 32 or repeats < 1 or batch < 1:
        raise RestoreError("profile needs sizes divisible by 32 and at least one repeat and one image")
    bench = Bench(ffhq_backbone(device), size, batch)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    phases: list[dict[str, float]] = []
    for round_ in range(repeats + 1):
        for name, variant in VARIANTS.items():
            seconds = variant(bench)
            if round_:
                times[name].append(seconds)
        if round_:
            phases.append(bench.phases())
    medians = {name: statistics.median(values) for name, values in times.items()}
    plain = medians["DPS"]
    lines = [f"FFHQ configuration, {size} px, batch {batch}, {device}, median of {repeats} alternating rounds", ""]
    lines += [
        "variant | seconds a step | against DPS | NFE a step | images an hour at 1000 steps",
        "---|---|---|---|---",
    ]
    for name, seconds in medians.items():
        nfe = 2 if "PAG" in name else 1
        lines.append(f"{name} | {seconds:.3f} | {seconds / plain:.2f} | {nfe} | {3.6 * batch / seconds:.1f}")
    lines += ["", "phase of a DPS+PAG step | share"]
    lines.append("---|---")
    means = {key: statistics.median(p[key] for p in phases) for key in phases[0]}
    lines += [f"{key} | {100 * value / sum(means.values()):.1f} %" for key, value in means.items()]
    if memory_size:
        lines += ["", *memory_table(memory_size, device)]
    if psld:
        lines += ["", *psld_table()]
    return "\n".join(lines)


def psld_table() -> list[str]:
    """A PSLD step of SD 1.5 at 512 pixels in bf16 with checkpointing: shares, PAG's overhead, peak memory."""
    cost = psld_cost(dtype=torch.bfloat16)
    lines = ["PSLD step, SD 1.5 configuration, 512 px, bf16, computed from FLOPs and tensor sizes", ""]
    lines += ["phase | share of a step without PAG", "---|---"]
    lines += [f"{name} | {100 * share:.1f} %" for name, share in cost.shares.items()]
    lines += ["", f"PAG with the shared prefix: x {cost.overhead:.3f}; with two passes: x {cost.overhead_unshared:.3f}"]
    gigabytes = {
        "weights": cost.parameters,
        "step with PAG": cost.peak_pag,
        "with checkpointing": cost.peak_checkpointing,
    }
    lines.append("memory: " + ", ".join(f"{name} {value / 1e9:.2f} GB" for name, value in gigabytes.items()))
    return lines


MEMORY = {
    "DPS": ("package", False),
    "DPS, checkpointing": ("package", True),
    "DPS+PAG, two passes": ("two_passes", False),
    "DPS+PAG, batched": ("batched", False),
    "DPS+PAG, shared prefix": ("shared", False),
    "DPS+PAG, shared prefix, checkpointing": ("shared", True),
}


def memory_table(size: int, device: str) -> list[str]:
    """Peak memory of a step above the loaded model, each variant in a process of its own."""
    lines = [f"peak memory of a step above the loaded model, {size} px, batch 1", ""]
    lines += ["variant | MiB | against DPS", "---|---|---"]
    plain = None
    for name, (variant, checkpointing) in MEMORY.items():
        code = "from restore.bench.profile import peak_memory as p; "
        code += f"print(p({variant!r}, {size}, {checkpointing}, {device!r}))"
        # With a low threshold every tensor has its own mapping, and the peak is that of the tensors, not of
        # what glibc's arenas keep.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RestoreError(f"measuring {name} failed: {done.stderr.strip().splitlines()[-1]}")
        mebibytes = float(done.stdout.split()[-1])
        plain = plain or mebibytes
        lines.append(f"{name} | {mebibytes:.0f} | {mebibytes / plain:.2f}")
    return lines


def peak_memory(variant: str, size: int, checkpointing: bool, device: str) -> float:
    """MiB by which one step raises the peak of this process (of the device, with CUDA)."""
    bench = Bench(ffhq_backbone(device, checkpointing), size, 1)
    gc.collect()
    run = getattr(bench, variant)
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the high-water mark
    run()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> float:
    """A line of /proc/self/status in KiB. Raises RestoreError where there is none (other than Linux)."""
    try:
        with open("/proc/self/status") as file:
            return float(next(line for line in file if line.startswith(key)).split()[1])
    except OSError:
        raise RestoreError("memory on a CPU is measured on Linux only; use memory_size=0") from None
