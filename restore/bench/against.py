"""The same network and problem in another library's samplers: `restore profile --against deepinv`.

Both sides are timed alternately in one process, call of the network to call of the network, so that neither's
preparations count; every ratio is ours / theirs. Nothing of the other library is changed: its denoiser is this
package's prior, its physics the same matrix, its images and noise are on [0, 1]. Seconds are the processor's on a CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import operators
from operators import RestoreError
from restore import samplers
from restore.backbones.sizes import Sized
from restore.bench.profile import in_own_process, rise
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
    """One library's sampler on the problem: run(evaluations, seed) -> image (1, 3, H, W) in [-1, 1], about."""

    run: Callable[[int, int], torch.Tensor]
    settings: dict[str, float]


class Contest:
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
        self.prior = self.restorer.sized(*size)
        self.calls: list[float] = []  # when the network was called
        network = self.restorer.backbone.network
        self.hook = network.register_forward_pre_hook(lambda *_: self.calls.append(self.now()))

    def physics(self) -> Any:
        """deepinv's own operator with the same matrix, its inverse in closed form as ours."""
        import deepinv

        noise, shape = deepinv.physics.GaussianNoise(SIGMA / 2), tuple(self.truth.shape[1:])
        if self.task == "box inpainting":
            mask = self.operator.mask[0].expand(shape)
            return deepinv.physics.Inpainting(shape, mask=mask, noise_model=noise, device=self.device)
        # Blocks of means as a convolution whose centre is a block's corner.
        kernel = F.pad(torch.full((1, 1, 4, 4), 1 / 16), (0, 3, 0, 3))
        return deepinv.physics.Downsampling(shape, kernel, factor=4, noise_model=noise, device=self.device)

    def ours(self, sampler: str) -> Side:
        method = self.restorer.method(self.operator, sampler=sampler, guidance=None)
        function = samplers.find_sampler(sampler)

        def run(evaluations: int, seed: int) -> torch.Tensor:
            return function(
                self.prior,
                self.operator,
                self.y,
                noise=ImageNoise([(seed, "face", 0)], self.device),
                steps=f"quad:{evaluations}" if sampler == "diffpir" else evaluations,
                **method.parameters,
            )

        return Side(run, dict(method.parameters))

    def theirs(self, sampler: str, settings: dict[str, float], weight: float) -> Side:
        """settings: ours, translated where both have them. weight: of DPS's gradient in their score."""
        import deepinv

        denoiser, physics = as_denoiser(self.prior), self.physics()
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
                made = deepinv.sampling.DPS(denoiser, num_steps=evaluations + 1, device=self.device, **own)
            elif sampler == "diffpir":
                fidelity = deepinv.optim.data_fidelity.L2()
                made = deepinv.sampling.DiffPIR(denoiser, fidelity, max_iter=evaluations, device=self.device, **own)
            else:
                made = deepinv.sampling.DDRM(denoiser, sigmas=torch.linspace(1, 0, evaluations).tolist())
            return (2 * made(y, physics) - 1).float()

        return Side(run, own)

    def both(self, sampler: str, weight: float) -> tuple[Side, Side]:
        ours = self.ours(sampler)
        return ours, self.theirs(sampler, ours.settings, weight)

    def timed(self, side: Side, evaluations: int, seed: int) -> tuple[list[float], torch.Tensor]:
        """Seconds from each call of the network to the next, and the image."""
        self.calls.clear()
        image = side.run(evaluations, seed)
        if len(self.calls) != evaluations:
            raise RestoreError(f"{len(self.calls)} evaluations were made where {evaluations} were asked for")
        return [b - a for a, b in zip(self.calls, self.calls[1:], strict=False)], image

    def step_times(self, sides: tuple[Side, Side], evaluations: int, repeats: int) -> tuple[float, float]:
        """Median seconds of a step of both, run in turn; a first round is not counted."""
        rounds: tuple[list[float], list[float]] = ([], [])
        for round_ in range(repeats + 1):
            for seconds, side in zip(rounds, sides, strict=True):
                steps, _ = self.timed(side, evaluations, round_)
                seconds.extend(steps if round_ else ())
        return statistics.median(rounds[0]), statistics.median(rounds[1])

    def fidelity(self, side: Side, evaluations: int, samples: int) -> tuple[float, float]:
        """PSNR and SSIM, averaged over the images of several seeds."""
        images = [self.timed(side, evaluations, seed + 1)[1] for seed in range(samples)]
        values = [(float(psnr(image, self.truth)), float(ssim(image, self.truth))) for image in images]
        return tuple(statistics.mean(column) for column in zip(*values, strict=True))

    def close(self) -> None:
        self.hook.remove()

    def now(self) -> float:
        """On a CPU the process' own seconds, of all its threads: what other programs take belongs to neither side."""
        if self.device.type == "cpu":
            return time.process_time()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def as_denoiser(prior: Sized) -> Any:
    """The prior as deepinv's Denoiser: E[x | x + sigma n] of images on [0, 1]."""
    from deepinv.models import Denoiser

    class Prior(Denoiser):
        def forward(self, x: torch.Tensor, sigma: Any, **_: Any) -> torch.Tensor:
            ratio = 2 * float(torch.as_tensor(sigma).flatten()[0])  # sigma / alpha on [-1, 1]
            x = 2 * x - 1
            t = prior.schedule.t(ratio)
            eps = prior.predict(x / (1 + ratio**2) ** 0.5, t).eps
            return (x - ratio * eps + 1) / 2

    return Prior(device=next(prior.network.parameters()).device)


def against_deepinv(
    evaluations: int = 20,
    dps_evaluations: int = 100,
    repeats: int = 5,
    samples: int = 4,
    memory: bool = True,
    weight: float = 100.0,
    device: str = "cpu",
) -> str:
    """A Markdown table: seconds of a step, peak memory and fidelity of both, with ratios ours / theirs.

    evaluations, dps_evaluations: of the images that are compared, the same on both sides. repeats: rounds of timing;
    each runs every sampler of both once for `evaluations`, after a round of warm-up. samples: images of different
    seeds whose PSNR and SSIM are averaged. memory: measure it too, each sampler in a process of its own.
    weight: of the gradient in their DPS; of 3, 10, 30 and 100 the last was best for SR x4 at 40 evaluations.
    Raises RestoreError where deepinv is not installed.
    """
    try:
        import deepinv
    except ImportError:
        raise RestoreError("deepinv is not installed; run `pip install deepinv`.") from None
    if min(evaluations, dps_evaluations) < 2 or min(repeats, samples) < 1:
        raise RestoreError("profile needs at least two evaluations, one repeat and one sample")
    restorer = load("embedded", device=device, offline=True)
    version = getattr(deepinv, "__version__", "")
    lines = [f"embedded prior, a face of 64 px, sigma_y {SIGMA}, batch 1, {device}, deepinv {version}", ""]
    heads = ["task", "sampler", "seconds a step: ours", "theirs", "ratio"]
    heads += ["MiB above the model: ours", "theirs", "ratio"] if memory else []
    heads += ["NFE", "PSNR: ours", "theirs", "SSIM: ours", "theirs"]
    lines += [" | ".join(heads), "|".join(["---"] * len(heads))]
    notes: dict[str, str] = {}
    for task, sampler in ROWS:
        contest = Contest(task, restorer)
        sides = contest.both(sampler, weight)
        ours, theirs = contest.step_times(sides, evaluations, repeats)
        cells = [f"{ours:.4f}", f"{theirs:.4f}", f"{ours / theirs:.2f}"]
        if memory:
            a, b = (_peak(task, sampler, own, device) for own in (True, False))
            cells += [f"{a:.0f}", f"{b:.0f}", f"{a / b:.2f}"]
        nfe = dps_evaluations if sampler == "dps" else evaluations
        (p, s), (p_theirs, s_theirs) = (contest.fidelity(side, nfe, samples) for side in sides)
        cells += [str(nfe), f"{p:.2f}", f"{p_theirs:.2f}", f"{s:.3f}", f"{s_theirs:.3f}"]
        lines.append(" | ".join([task, sampler, *cells]))
        notes[sampler] = DIFFERENCES[sampler].format(**sides[1].settings)
        contest.close()
    return "\n".join([*lines, "", *(f"- {sampler}: {text}" for sampler, text in notes.items())])


def _peak(task: str, sampler: str, own: bool, device: str) -> float:
    code = f"from restore.bench.against import peak as p; print(p({task!r}, {sampler!r}, {own}, {device!r}))"
    return in_own_process(code, f"{sampler} ({task})")


def peak(task: str, sampler: str, own: bool, device: str) -> float:
    """MiB by which a few steps of one side raise the peak of this process (of the device, with CUDA)."""
    contest = Contest(task, device=device)
    side = contest.both(sampler, 1.0)[0 if own else 1]
    return rise(lambda: side.run(3, 0), contest.device)


LIBRARIES = {"deepinv": against_deepinv}
