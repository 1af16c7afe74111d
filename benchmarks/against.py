"""Samplers of another library on the same network and problem: `python -m benchmarks.against deepinv`.

Both sides are timed in turn in one process, from call to call of the network, so that neither's preparations count;
every ratio is ours / theirs. Nothing of the other library is changed: its denoiser is this package's prior, its
physics the same matrix, its images and noise are on [0, 1]. Ours runs as Restorer runs it, in fewer operations of the
network where there is no gradient (restore.backbones.lean); theirs calls the network's own code. On a CPU, seconds are
those of the processor.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import operators
from benchmarks.measure import measure_peak, run_command, run_in_new_process
from operators import RestoreError
from operators.naming import lookup
from restore import samplers
from restore.backbones.lean import run_lean
from restore.backbones.sizes import Sized
from restore.images.io import read_image
from restore.metrics.single import psnr, ssim
from restore.paths import data_dir
from restore.restorer import Restorer, load
from restore.samplers.noise import ImageNoise, measurement_generator

SIGMA = 0.05  # of y, on [-1, 1]
TASKS = {"box inpainting": ("dps", "diffpir", "ddrm"), "SR x4, block means": ("dps", "diffpir")}
ROWS = [(task, sampler) for task, names in TASKS.items() for sampler in names]

DIFFERENCES = {
    "dps": "theirs: continuous VP time of beta 0.1 to 20, float64 state, posterior variance of DDPM, x0 clamped to "
    "[-1, 1] on [0, 1], the gradient a part of the score (weight {weight:g}; 1 is their default), so that its step "
    "falls with the noise; ours: zeta the same at every step, x0 clamped to [-1, 1]",
    "diffpir": "theirs: starts from A^T y, noised, and returns the x that enters the last call; lambda_ and zeta are "
    "set to ours ({lambda_:g}, {zeta:g}; their defaults 7, 0.1)",
    "ddrm": "theirs: starts at sigma / alpha = 2, evenly spaced sigma, fresh noise divided by sqrt(2); eta and eta_b "
    "are the paper's on both sides",
}


@dataclass
class Side:
    """One library's sampler on the problem: run(evaluations, seed) -> image (1, 3, H, W), about [-1, 1]."""

    run: Callable[[int, int], torch.Tensor]
    settings: dict[str, float]


class Comparison:
    """A face of 64 pixels, one task of TASKS, the embedded prior (or another one)."""

    def __init__(self, task: str, restorer: Restorer | None = None, device: str = "cpu") -> None:
        self.task, self.restorer = task, restorer or load("embedded", device=device, offline=True)
        self.device = self.restorer.device
        self.truth = read_image(data_dir() / "photos" / "astronaut-face-64.png").pixels.to(self.device)
        size, noise = tuple(self.truth.shape[-2:]), operators.GaussianNoise(SIGMA)
        if task == "box inpainting":
            self.operator: operators.Operator = operators.Inpainting(operators.box_mask(size), noise=noise)
        else:
            self.operator = operators.SuperResolution(4, method="average", noise=noise)
        y = self.operator.A(self.truth)
        n = torch.randn(y.shape, generator=measurement_generator(0, "face"))
        self.y = y + SIGMA * n.to(self.device)
        self.prior = self.restorer.prior(*size)
        self.calls: list[float] = []  # times at which the network was called
        network = self.restorer.backbone.network
        self.hook = network.register_forward_pre_hook(lambda *_: self.calls.append(self.now()))

    def make_physics(self) -> Any:
        """Return deepinv's operator with the same matrix, whose inverse is in closed form as ours."""
        import deepinv

        noise, shape = deepinv.physics.GaussianNoise(SIGMA / 2), tuple(self.truth.shape[1:])
        if self.task == "box inpainting":
            mask = self.operator.mask[0].expand(shape)
            return deepinv.physics.Inpainting(shape, mask=mask, noise_model=noise, device=self.device)
        # Blocks of means as a convolution whose centre is a block's corner.
        kernel = F.pad(torch.full((1, 1, 4, 4), 1 / 16), (0, 3, 0, 3))
        return deepinv.physics.Downsampling(shape, kernel, factor=4, noise_model=noise, device=self.device)

    def make_ours(self, sampler: str) -> Side:
        method = self.restorer.method(self.operator, sampler=sampler, guidance=None)
        function = samplers.find_sampler(sampler)

        def run(evaluations: int, seed: int) -> torch.Tensor:
            noise = ImageNoise([(seed, "face", 0)], self.device)
            steps = f"quad:{evaluations}" if sampler == "diffpir" else evaluations
            with run_lean():  # as Restorer does
                return function(self.prior, self.operator, self.y, noise=noise, steps=steps, **method.parameters)

        return Side(run, dict(method.parameters))

    def make_theirs(self, sampler: str, settings: dict[str, float], weight: float) -> Side:
        """settings: ours, translated if both have them. weight: of DPS's gradient in their score."""
        import deepinv

        denoiser, physics = make_denoiser(self.prior), self.make_physics()
        # y = A(x) + n of x in [-1, 1] is 2 y' - A(1) of x' = (x + 1) / 2.
        y = (self.y + self.operator.A(torch.ones_like(self.truth))) / 2
        own: dict[str, float] = {}
        if sampler == "diffpir":
            own = {"lambda_": 2 * settings.get("lam", 1.75), "zeta": settings.get("zeta", 0.3)}
        elif sampler == "dps":
            own = {"weight": weight}

        def run(evaluations: int, seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            if sampler == "dps":
                model = deepinv.sampling.DPS(denoiser, num_steps=evaluations + 1, device=self.device, **own)
            elif sampler == "diffpir":
                fidelity = deepinv.optim.data_fidelity.L2()
                model = deepinv.sampling.DiffPIR(denoiser, fidelity, max_iter=evaluations, device=self.device, **own)
            else:
                model = deepinv.sampling.DDRM(denoiser, sigmas=torch.linspace(1, 0, evaluations).tolist())
            return (2 * model(y, physics) - 1).float()

        return Side(run, own)

    def make_both(self, sampler: str, weight: float) -> tuple[Side, Side]:
        ours = self.make_ours(sampler)
        return ours, self.make_theirs(sampler, ours.settings, weight)

    def time_calls(self, side: Side, evaluations: int, seed: int) -> tuple[list[float], torch.Tensor]:
        """Return the seconds from each call of the network to the next, and the image."""
        self.calls.clear()
        image = side.run(evaluations, seed)
        if len(self.calls) != evaluations:
            raise RestoreError(f"evaluations must be {evaluations}, got {len(self.calls)}")
        return [b - a for a, b in zip(self.calls, self.calls[1:], strict=False)], image

    def time_steps(self, sides: tuple[Side, Side], evaluations: int, repeats: int) -> tuple[float, float]:
        """Return the median seconds of a step of both, run in turn; a first round is not counted."""
        rounds: tuple[list[float], list[float]] = ([], [])
        for round_ in range(repeats + 1):
            for seconds, side in zip(rounds, sides, strict=True):
                steps, _ = self.time_calls(side, evaluations, round_)
                seconds.extend(steps if round_ else ())
        return statistics.median(rounds[0]), statistics.median(rounds[1])

    def measure_fidelity(self, side: Side, evaluations: int, samples: int) -> tuple[float, float]:
        """Return PSNR and SSIM, averaged over the images of several seeds."""
        images = [self.time_calls(side, evaluations, seed + 1)[1] for seed in range(samples)]
        values = [(float(psnr(image, self.truth)), float(ssim(image, self.truth))) for image in images]
        return tuple(statistics.mean(column) for column in zip(*values, strict=True))

    def close(self) -> None:
        self.hook.remove()

    def now(self) -> float:
        """Return, on a CPU, the processor seconds of this process: other programs' time belongs to neither side."""
        if self.device.type == "cpu":
            return time.process_time()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def make_denoiser(prior: Sized) -> Any:
    """Return the prior as deepinv's Denoiser: E[x | x + sigma n] of images on [0, 1]."""
    from deepinv.models import Denoiser

    class Prior(Denoiser):
        def forward(self, x: torch.Tensor, sigma: Any, **_: Any) -> torch.Tensor:
            ratio = 2 * float(torch.as_tensor(sigma).flatten()[0])  # sigma / alpha on [-1, 1]
            x = 2 * x - 1
            t = prior.schedule.t(ratio)
            eps = prior.predict(x / (1 + ratio**2) ** 0.5, t).eps
            return (x - ratio * eps + 1) / 2

    return Prior(device=next(prior.network.parameters()).device)


def compare_with_deepinv(
    evaluations: int = 20,
    dps_evaluations: int = 100,
    repeats: int = 5,
    samples: int = 4,
    memory: bool = True,
    weight: float = 100.0,
    device: str = "cpu",
) -> str:
    """Return Markdown: seconds of a step, peak memory and fidelity of both, with ratios ours / theirs.

    evaluations, dps_evaluations: of the images that are compared, the same on both sides. repeats: rounds of timing;
    each runs every sampler of both once for `evaluations`, after a round of warm-up. samples: images of different
    seeds whose PSNR and SSIM are averaged. memory: measure it too, each sampler in a process of its own.
    weight: of the gradient in their DPS; of 3, 10, 30 and 100 the last was best for SR x4 at 40 evaluations.
    Raises RestoreError if deepinv is not installed.
    """
    try:
        import deepinv
    except ImportError:
        raise RestoreError("deepinv is not installed; try pip install deepinv") from None
    if min(evaluations, dps_evaluations) < 2 or min(repeats, samples) < 1:
        raise RestoreError(
            f"evaluations={evaluations} and dps_evaluations={dps_evaluations} must be at least 2, "
            f"repeats={repeats} and samples={samples} at least 1"
        )
    restorer = load("embedded", device=device, offline=True)
    version = getattr(deepinv, "__version__", "")
    lines = [f"embedded prior, a face of 64 px, sigma_y {SIGMA}, batch 1, {device}, deepinv {version}", ""]
    heads = ["task", "sampler", "seconds a step: ours", "theirs", "ratio"]
    heads += ["MiB above the model: ours", "theirs", "ratio"] if memory else []
    heads += ["NFE", "PSNR: ours", "theirs", "SSIM: ours", "theirs"]
    lines += [" | ".join(heads), "|".join(["---"] * len(heads))]
    notes: dict[str, str] = {}
    for task, sampler in ROWS:
        comparison = Comparison(task, restorer)
        sides = comparison.make_both(sampler, weight)
        ours, theirs = comparison.time_steps(sides, evaluations, repeats)
        cells = [f"{ours:.4f}", f"{theirs:.4f}", f"{ours / theirs:.2f}"]
        if memory:
            a, b = (_measure_in_new_process(task, sampler, own, device) for own in (True, False))
            cells += [f"{a:.0f}", f"{b:.0f}", f"{a / b:.2f}"]
        nfe = dps_evaluations if sampler == "dps" else evaluations
        (p, s), (p_theirs, s_theirs) = (comparison.measure_fidelity(side, nfe, samples) for side in sides)
        cells += [str(nfe), f"{p:.2f}", f"{p_theirs:.2f}", f"{s:.3f}", f"{s_theirs:.3f}"]
        lines.append(" | ".join([task, sampler, *cells]))
        notes[sampler] = DIFFERENCES[sampler].format(**sides[1].settings)
        comparison.close()
    return "\n".join([*lines, "", *(f"- {sampler}: {text}" for sampler, text in notes.items())])


def _measure_in_new_process(task: str, sampler: str, own: bool, device: str) -> float:
    call = f"measure_side({task!r}, {sampler!r}, {own}, {device!r})"
    return run_in_new_process(f"from benchmarks.against import measure_side; print({call})", f"{sampler} ({task})")


def measure_side(task: str, sampler: str, own: bool, device: str) -> float:
    """Return the MiB by which a few steps of one side raise the peak memory, see measure_peak."""
    comparison = Comparison(task, device=device)
    side = comparison.make_both(sampler, 1.0)[0 if own else 1]
    return measure_peak(lambda: side.run(3, 0), comparison.device)


LIBRARIES = {"deepinv": compare_with_deepinv}


def main(arguments: list[str]) -> None:
    """Compare with the library that the first argument names; the others are settings of its comparison."""
    try:
        compare = lookup(arguments[0] if arguments else None, LIBRARIES, "library")
    except RestoreError as error:
        sys.exit(f"error: {error}")
    run_command(compare, arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
