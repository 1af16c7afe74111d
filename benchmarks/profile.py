"""Cost of a DPS step with and without PAG: `python -m benchmarks.profile size=128`.

Times depend on the machine, their ratios hardly: every ratio is of medians measured in turn in one run. The network
has the FFHQ configuration of DPS with random weights, which cost the same as trained ones.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch.overrides import TorchFunctionMode

import operators
from benchmarks.measure import measure_peak, run_command, run_in_new_process
from benchmarks.networks import FFHQ
from operators import RestoreError
from restore.backbones.adm import ADM
from restore.backbones.base import Prediction
from restore.backbones.memory_options import enable_block_checkpointing
from restore.backbones.sizes import Sized
from restore.guidance import PAG
from restore.samplers.dps import dps
from restore.samplers.steps import Diffusion

LAYER = "input_blocks.9.1"
ZETA, PAG_SCALE = 1.0, 1.0
TIMES = (501, 500)  # the first step learns what the passes share, the second is measured


def make_backbone(device: str = "cpu", checkpointing: bool = False) -> ADM:
    """Return the FFHQ network with random weights."""
    torch.manual_seed(0)
    backbone = ADM(UNet2DModel(**FFHQ), device=device)
    if checkpointing:
        enable_block_checkpointing(backbone)
    return backbone


class TwoSteps:
    """Two DPS steps on a random problem (SR x8), in the variants that are compared.

    Each variant returns the seconds of its second step, and x after it.
    """

    def __init__(self, backbone: ADM, size: int, batch: int) -> None:
        g = torch.Generator().manual_seed(0)
        device = backbone.device
        self.backbone, self.operator = backbone, operators.SuperResolution(8)
        self.x_T = torch.randn(batch, 3, size, size, generator=g).to(device)
        self.y = self.operator.A(torch.randn(batch, 3, size, size, generator=g).to(device).tanh())
        self.n = torch.randn(batch, 3, size, size, generator=g).to(device)

    def run_sampler(self, guidance=None, prior=None, operator=None, callback=None) -> torch.Tensor:
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

    def run_package(self, guidance=None) -> tuple[float, torch.Tensor]:
        marks: list[float] = []
        x = self.run_sampler(guidance, callback=lambda step: marks.append(self.now()))
        return marks[1] - marks[0], x

    def run_shared(self) -> tuple[float, torch.Tensor]:
        return self.run_package(PAG(PAG_SCALE, layers=LAYER))

    def run_script(self, pag: str = "") -> tuple[float, torch.Tensor]:
        """The same steps as a script would write them around the same network.

        pag: "", "two passes", or "batched": both branches in one batch, so that the weak one is in the graph as well.
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

    def measure_phases(self) -> dict[str, float]:
        """Return the seconds of each part of the package's DPS+PAG step, between its calls of prior and operator."""
        prior, last, seconds = Sized(self.backbone, *self.x_T.shape[-2:]), self.now(), {}

        def close(name: str) -> None:
            nonlocal last
            now = self.now()
            seconds[name], last = seconds.get(name, 0.0) + now - last, now

        def predict(*args, inner=prior.predict) -> Prediction:
            strong = torch.is_grad_enabled()
            if not strong:
                close("backward")
            prediction = inner(*args)
            close("strong pass" if strong else "weak pass")
            return prediction

        def measure(x: torch.Tensor) -> torch.Tensor:
            y = self.operator.A(x)
            close("operator")
            return y

        def end(step: dict) -> None:
            close("update")
            if step["step"] == 0:
                seconds.clear()

        prior.predict = predict
        self.run_sampler(PAG(PAG_SCALE, layers=LAYER), prior, SimpleNamespace(A=measure), end)
        return seconds

    def now(self) -> float:
        if self.x_T.device.type == "cuda":
            torch.cuda.synchronize(self.x_T.device)
        return time.perf_counter()


class IdentityAttention(TorchFunctionMode):
    """A plain implementation of PAG's perturbation of one layer, independent of restore.guidance."""

    def __init__(self, backbone: ADM, paper_name: str, second_half_only: bool = False) -> None:
        super().__init__()
        (layer,) = (item for item in backbone.attention.values() if item.paper == paper_name)
        self.half, self.inside = second_half_only, False
        self.hooks = [
            layer.module.register_forward_pre_hook(lambda *_: setattr(self, "inside", True)),
            layer.module.register_forward_hook(lambda *_: setattr(self, "inside", False)),
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
    "DPS, written out": TwoSteps.run_script,
    "DPS": TwoSteps.run_package,
    "DPS+PAG, two passes": lambda steps: steps.run_script("two passes"),
    "DPS+PAG, batched": lambda steps: steps.run_script("batched"),
    "DPS+PAG, shared prefix": TwoSteps.run_shared,
}
# Variant, and whether activations are computed again in the backward pass.
MEMORY = [("DPS", False), ("DPS", True), ("DPS+PAG, two passes", False), ("DPS+PAG, batched", False)]
MEMORY += [("DPS+PAG, shared prefix", False), ("DPS+PAG, shared prefix", True)]


def profile(size: int = 128, batch: int = 1, repeats: int = 5, memory_size: int = 256, device: str = "cpu") -> str:
    """Return Markdown: time of every variant, phases of a step, peak memory, images per hour.

    size, batch: of the timed steps. repeats: rounds; each times every variant once, after a round of warm-up.
    memory_size: side of the image for the memory figures, 0 to leave them out; on a CPU each variant then runs in
    a process of its own. Raises RestoreError for sizes that are not multiples of 32.
    """
    if min(size, memory_size or 32) < 32 or size % 32 or memory_size % 32 or repeats < 1 or batch < 1:
        raise RestoreError(
            f"size={size} and memory_size={memory_size} must be divisible by 32, repeats and batch at least 1"
        )
    steps = TwoSteps(make_backbone(device), size, batch)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    phases: list[dict[str, float]] = []
    for round_ in range(repeats + 1):
        for name, variant in VARIANTS.items():
            seconds, _ = variant(steps)
            if round_:
                times[name].append(seconds)
        if round_:
            phases.append(steps.measure_phases())
    medians = {name: statistics.median(values) for name, values in times.items()}
    lines = [f"FFHQ configuration, {size} px, batch {batch}, {device}, median of {repeats} alternating rounds", ""]
    lines += ["variant | seconds a step | against DPS | NFE a step | images an hour at 1000 steps"]
    lines += ["---|---|---|---|---"]
    for name, seconds in medians.items():
        nfe, ratio = 2 if "PAG" in name else 1, seconds / medians["DPS"]
        lines.append(f"{name} | {seconds:.3f} | {ratio:.2f} | {nfe} | {3.6 * batch / seconds:.1f}")
    lines += ["", "phase of a DPS+PAG step | share", "---|---"]
    phase = {key: statistics.median(p[key] for p in phases) for key in phases[0]}
    lines += [f"{key} | {100 * value / sum(phase.values()):.1f} %" for key, value in phase.items()]
    return "\n".join(lines + (["", *format_memory(memory_size, device)] if memory_size else []))


def format_memory(size: int, device: str) -> list[str]:
    """Return a table of the peak memory of a step above the loaded model, each variant in a process of its own."""
    lines = [f"peak memory of a step above the loaded model, {size} px, batch 1", ""]
    lines += ["variant | MiB | against DPS", "---|---|---"]
    plain = None
    for variant, checkpointing in MEMORY:
        name = variant + (", checkpointing" if checkpointing else "")
        call = f"measure_variant({variant!r}, {size}, {checkpointing}, {device!r})"
        mebibytes = run_in_new_process(f"from benchmarks.profile import measure_variant; print({call})", name)
        plain = plain or mebibytes
        lines.append(f"{name} | {mebibytes:.0f} | {mebibytes / plain:.2f}")
    return lines


def measure_variant(variant: str, size: int, checkpointing: bool, device: str) -> float:
    """Return the MiB by which one variant raises the peak memory, see measure_peak."""
    steps = TwoSteps(make_backbone(device, checkpointing), size, 1)
    return measure_peak(lambda: VARIANTS[variant](steps), device)


if __name__ == "__main__":
    run_command(profile)
