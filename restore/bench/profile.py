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
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch.overrides import TorchFunctionMode

import operators
from operators import RestoreError
from restore.backbones.adm import ADM
from restore.backbones.base import Prediction
from restore.backbones.sizes import Sized
from restore.bench.cost import psld_cost
from restore.guidance import PAG
from restore.samplers.dps import dps
from restore.samplers.steps import Diffusion

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
ZETA, PAG_SCALE = 1.0, 1.0
TIMES = (501, 500)  # two steps: in the first nothing is shared yet, the second is measured


def ffhq_backbone(device: str = "cpu", checkpointing: bool = False) -> ADM:
    torch.manual_seed(0)
    return ADM(UNet2DModel(**FFHQ), device=device, checkpointing=checkpointing)


class Bench:
    """Two DPS steps on a random problem (SR x8), in the variants that are compared. Each variant returns the seconds
    of its second step and x after it."""

    def __init__(self, backbone: ADM, size: int, batch: int) -> None:
        g = torch.Generator().manual_seed(0)
        device = backbone.device
        self.backbone, self.operator = backbone, operators.SuperResolution(8)
        self.x_T = torch.randn(batch, 3, size, size, generator=g).to(device)
        self.y = self.operator.A(torch.randn(batch, 3, size, size, generator=g).to(device).tanh())
        self.n = torch.randn(batch, 3, size, size, generator=g).to(device)

    def sampler(self, guidance, prior=None, operator=None, callback=lambda step: None) -> torch.Tensor:
        """The package's own loop."""
        return dps(
            prior or Sized(self.backbone, *self.x_T.shape[-2:]),
            operator or self.operator,
            self.y,
            noise=lambda k, shape, kind: self.x_T if kind == "start" else self.n,
            steps=list(TIMES),
            zeta=ZETA,
            scale_zeta=False,
            guidance=guidance,
            callback=callback,
        )

    def package(self, guidance=None) -> tuple[float, torch.Tensor]:
        marks: list[float] = []
        x = self.sampler(guidance, callback=lambda step: marks.append(self.now()))
        return marks[1] - marks[0], x

    def shared(self) -> tuple[float, torch.Tensor]:
        return self.package(PAG(PAG_SCALE, layers=LAYER))

    def written_out(self, pag: str = "") -> tuple[float, torch.Tensor]:
        """The same steps as a script would write them around the same network: no class, no protocol.

        pag: "", "two passes", or "batched": both branches in one batch, which drags the weak one through the graph.
        """
        diffusion = Diffusion(self.backbone.schedule, TIMES)
        network, identity = self.backbone.network, IdentityAttention(self.backbone, LAYER, pag == "batched")
        x_t, marks = self.x_T, []
        for i in (1, 0):
            t = diffusion.timesteps[i]
            x_t = x_t.detach().requires_grad_()
            with identity if pag == "batched" else nullcontext():
                out = network(torch.cat([x_t, x_t]) if pag == "batched" else x_t, t, return_dict=False)[0]
            eps, v = out[: len(x_t)].chunk(2, dim=1)
            difference = self.y - self.operator.A(diffusion.x0(x_t, eps, i))
            (grad,) = torch.autograd.grad(torch.linalg.vector_norm(difference.flatten(1), dim=1).sum(), x_t)
            with torch.no_grad():
                if pag == "two passes":
                    with identity:
                        out = torch.cat([out, network(x_t, t, return_dict=False)[0]])
                weak = out[len(x_t) :, :3] if pag else eps
                x_t = diffusion.step(x_t, eps + PAG_SCALE * (eps - weak), v, i, self.n) - ZETA * grad
            marks.append(self.now())
        identity.remove()
        return marks[1] - marks[0], x_t

    def two_passes(self) -> tuple[float, torch.Tensor]:
        return self.written_out("two passes")

    def batched(self) -> tuple[float, torch.Tensor]:
        return self.written_out("batched")

    def phases(self) -> dict[str, float]:
        """Seconds of the parts of the package's DPS+PAG step: what passes between its calls of prior and operator."""
        prior, last, seconds = Sized(self.backbone, *self.x_T.shape[-2:]), self.now(), {}

        def close(name: str) -> None:
            nonlocal last
            now = self.now()
            seconds[name], last = seconds.get(name, 0.0) + now - last, now

        def predict(*args, inner=prior.predict) -> Prediction:
            strong = torch.is_grad_enabled()
            if not strong:
                close("backward")
            found = inner(*args)
            close("strong pass" if strong else "weak pass")
            return found

        def measure(x: torch.Tensor) -> torch.Tensor:
            y = self.operator.A(x)
            close("operator")
            return y

        def end(step: dict) -> None:
            close("update")
            if step["step"] == 0:
                seconds.clear()

        prior.predict = predict
        self.sampler(PAG(PAG_SCALE, layers=LAYER), prior, SimpleNamespace(A=measure), end)
        return seconds

    def now(self) -> float:
        if self.x_T.device.type == "cuda":
            torch.cuda.synchronize(self.x_T.device)
        return time.perf_counter()


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

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is F.scaled_dot_product_attention and self.inside:
            value = args[2]
            return torch.cat([out[: len(out) // 2], value[len(value) // 2 :]]) if self.half else value
        return out


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
            seconds, _ = variant(bench)
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


# Variant and whether activations are computed again in the backward pass.
MEMORY = [("DPS", False), ("DPS", True), ("DPS+PAG, two passes", False), ("DPS+PAG, batched", False)]
MEMORY += [("DPS+PAG, shared prefix", False), ("DPS+PAG, shared prefix", True)]


def memory_table(size: int, device: str) -> list[str]:
    """Peak memory of a step above the loaded model, each variant in a process of its own."""
    lines = [f"peak memory of a step above the loaded model, {size} px, batch 1", ""]
    lines += ["variant | MiB | against DPS", "---|---|---"]
    plain = None
    for variant, checkpointing in MEMORY:
        name = variant + (", checkpointing" if checkpointing else "")
        code = "from restore.bench.profile import peak_memory as p; "
        code += f"print(p({variant!r}, {size}, {checkpointing}, {device!r}))"
        mebibytes = in_own_process(code, name)
        plain = plain or mebibytes
        lines.append(f"{name} | {mebibytes:.0f} | {mebibytes / plain:.2f}")
    return lines


def in_own_process(code: str, name: str) -> float:
    """The last number that `code` prints in a fresh Python. Raises RestoreError, with `name`, where it fails."""
    # With a low threshold every tensor has its own mapping, and the peak is that of the tensors, not of
    # what glibc's arenas keep.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RestoreError(f"measuring {name} failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])


def peak_memory(variant: str, size: int, checkpointing: bool, device: str) -> float:
    """MiB by which one step of a variant raises the peak of this process (of the device, with CUDA)."""
    bench = Bench(ffhq_backbone(device, checkpointing), size, 1)
    return rise(lambda: VARIANTS[variant](bench), device)


def rise(run: Callable[[], Any], device: torch.device | str) -> float:
    """MiB by which `run` raises the peak of this process (of the device, with CUDA)."""
    gc.collect()
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
