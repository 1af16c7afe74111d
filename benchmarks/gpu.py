"""Seconds, memory and share of the peak of restorations on a GPU: `python -m benchmarks.gpu minutes=8`.

The FFHQ configuration of ADM at 256 pixels and that of Stable Diffusion 1.5 at 512, with random weights, which cost the
same as trained ones: DPS, DPS with PAG, DiffPIR and, on latents, PSLD, beside the published DPS step written out; in
fp32 (without TF32, which torch's default has in convolutions), TF32 and bf16, for batches of 1, 8 and 32, uncompiled
and compiled. What matters most comes first, and each row is written when it is measured, so that a run that ends early
has shown something; another run with the same file goes on.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

import operators
from benchmarks.measure import run_command
from benchmarks.networks import FFHQ, SD15_UNET, SD15_VAE, TINY
from benchmarks.profile import LAYER
from benchmarks.psld_cost import make_counter
from operators import RestoreError
from restore.backbones.adm import ADM
from restore.backbones.graphs import compile_networks
from restore.backbones.schedule import Schedule
from restore.backbones.sizes import Sized
from restore.backbones.stable_diffusion import StableDiffusion
from restore.guidance import PAG
from restore.restoration import choose_device
from restore.samplers.diffpir import diffpir
from restore.samplers.dps import dps
from restore.samplers.noise import ImageNoise
from restore.samplers.psld import psld

PRECISIONS, BATCHES = ("fp32", "tf32", "bf16"), (1, 8, 32)
WAYS = {"eager": None, "compiled": "default", "CUDA graphs": "reduce-overhead"}  # mode of torch.compile
# What is measured: the model, and the published number of steps.
WRITTEN = ", written out"
METHODS = {"DPS": ("ffhq", 1000), "DPS + PAG": ("ffhq", 1000), f"DPS{WRITTEN}": ("ffhq", 1000)}
METHODS |= {"DiffPIR": ("ffhq", 100), "PSLD": ("sd", 1000)}
WARM, TIMED = 3, (2, 10)  # steps that are not timed, since they learn and compile; fewest and most that are
MOST_SECONDS = 4.0  # of timed steps
GUESS = {"eager": 15.0, "compiled": 120.0, "CUDA graphs": 120.0}  # seconds of a cell before one of its kind is known
SIDE = 8192  # of the matrices whose product is the peak
MEMORY = "out of memory"  # an error that is a result


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    method: str
    precision: str
    batch: int
    way: str = "eager"

    @property
    def name(self) -> str:
        return f"{self.method}, {self.precision}, batch {self.batch}, {self.way}"


# The goals' own ratios first: throughput against batch 1 in fp32, PAG against DPS, PSLD's memory, what compiling gains.
FIRST = [Cell("DPS", "bf16", 32), Cell("DPS", "fp32", 1), Cell("DPS + PAG", "bf16", 32), Cell("PSLD", "bf16", 1)]
FIRST += [Cell("DPS, written out", "fp32", 1), Cell("DPS, written out", "bf16", 32), Cell("DPS + PAG", "fp32", 1)]
FIRST += [Cell("DiffPIR", "bf16", 32), Cell("DPS", "bf16", 1), Cell("DPS + PAG", "bf16", 1)]
FIRST += [Cell("DPS + PAG", "bf16", 32, "compiled"), Cell("DPS", "bf16", 1, "CUDA graphs"), Cell("PSLD", "bf16", 8)]


def list_cells(tiny: bool) -> list[Cell]:
    """Return all cells, the most important first; of those on no list uncompiled ones, small batches and bf16 first."""
    if tiny:
        return [*(Cell(m, p, 2) for m in METHODS for p in ("fp32", "bf16")), Cell("DPS", "fp32", 1, "compiled")]
    others = [
        Cell(method, precision, batch, way)
        for way, batch, precision, method in product(WAYS, BATCHES, reversed(PRECISIONS), METHODS)
        if not (way == "CUDA graphs" and batch > 1)  # they save launches, which few images wait for
        and not (way != "eager" and method == "DPS, written out")
    ]
    return list(dict.fromkeys(FIRST + others))


def measure_gpu(
    minutes: float = 8.0, out: str = "gpu.jsonl", only: str = "", device: str = "auto", tiny: bool = False
) -> str:
    """Return a Markdown table.

    minutes: after which no cell is begun that would end later; 0 prints what `out` has. out: a file of JSON lines, one
    a cell; those of this device and torch are not measured again. only: measure cells with this in their name. tiny:
    small networks and few cells, which a CPU measures in seconds. Raises RestoreError for a device that is not there.
    """
    started, place = time.perf_counter(), choose_device(device)
    if minutes < 0:
        raise RestoreError(f"minutes must not be negative, got {minutes:g}")
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    where = {"device": name, "torch": torch.__version__, "tiny": tiny}
    known = [row for row in read_rows(Path(out)) if where.items() <= row.items()]
    rows = {row["name"]: row for row in known if row.get("error", MEMORY) == MEMORY}
    cells, left_out = [cell for cell in list_cells(tiny) if only in cell.name], []
    bench = Bench(place, tiny)
    for cell in cells:
        if cell.name in rows:
            continue
        spent = [row["took"] for row in rows.values() if row["way"] == cell.way]
        if time.perf_counter() - started + max(spent, default=GUESS[cell.way] * (not tiny)) > 60 * minutes:
            left_out.append(cell.name)
            continue
        rows[cell.name] = row = {"name": cell.name, **where, **bench.measure(cell)}
        add_row(Path(out), row)
        shown = row.get("error") or f"{row['seconds_step']:.4g} s a step"
        print(f"{cell.name}: {shown}", file=sys.stderr, flush=True)  # what a call that is cut off has shown
    heading = f"{name}, torch {torch.__version__}, random weights" + ", tiny networks" * tiny
    lines = [heading, "", *format_rows([rows[cell.name] for cell in cells if cell.name in rows])]
    return "\n".join([*lines, *(["", f"left out for want of time: {'; '.join(left_out)}"] * bool(left_out))])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, none if there is no file; a line that a killed run left unfinished is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Write a row at the end of a file, on a line of its own even if the last one was left unfinished."""
    is_torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * is_torn + json.dumps(row) + "\n")


class Bench:
    """Measures cells on one device; the speed of a matrix product and the arithmetic of a step once."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.peaks: dict[str, float] = {}
        self.flop: dict[str, float] = {}

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Return a row: seconds a step, images an hour at the published steps, memory, FLOP/s and share of the peak, or
        an `error` if the cell cannot be computed, so that the others are."""
        row, started = asdict(cell), time.perf_counter()
        try:
            with set_precision(cell.precision):
                row |= self._measure(cell)
        except Exception as error:  # out of memory, above all
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            row["error"] = MEMORY if isinstance(error, torch.OutOfMemoryError) else reason
        finally:
            if WAYS[cell.way] is not None:
                torch._dynamo.reset()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return row | {"took": time.perf_counter() - started}

    def _measure(self, cell: Cell) -> dict[str, Any]:
        model, steps = METHODS[cell.method]
        peak, flop = self._find_peak(cell.precision), self._count_flop(cell.method.removesuffix(WRITTEN)) * cell.batch
        backbone = self._make(model, cell.precision)
        if WAYS[cell.way] is not None:
            options = {"backend": "eager"} if self.tiny else {}
            compile_networks(backbone, WAYS[cell.way], **options)
        prior = Sized(backbone, *[backbone.resolution * backbone.downscale] * 2)
        marks = self._run(cell.method, prior, cell.batch, WARM + 1)
        seconds = max(marks[-1] - marks[-2], 1e-6)
        timed = int(min(max(MOST_SECONDS / seconds, TIMED[0]), 2 if self.tiny else TIMED[1]))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        marks = self._run(cell.method, prior, cell.batch, WARM + timed, wait_each=False)
        seconds = (marks[-1] - marks[WARM - 1]) / timed
        # The memory of CUDA graphs is reserved by them, and no longer allocated when they run.
        read = torch.cuda.max_memory_reserved if cell.way == "CUDA graphs" else torch.cuda.max_memory_allocated
        memory = read(self.device) / 1e9 if self.device.type == "cuda" else None
        row = {"steps": steps, "seconds_step": seconds, "images_hour": 3600 * cell.batch / (steps * seconds)}
        row |= {"memory_gb": memory, "tflops": flop / seconds / 1e12, "peak_tflops": peak / 1e12}
        return row | {"share": flop / seconds / peak}

    def _run(
        self, method: str, prior: Sized, batch: int, steps: int, wait_each: bool = True, note: Callable | None = None
    ) -> list[float]:
        """Run so many steps of a method; return the time after each. wait_each: for the device, after each; else only
        when the timed steps begin and end, so that the host may plan ahead."""
        marks: list[float] = []

        def receive(step: dict | None = None) -> None:
            if wait_each or len(marks) in (WARM - 1, steps - 1):
                self._wait()
            marks.append(time.perf_counter())
            if note is not None:
                note()

        side, generator = prior.height, torch.Generator().manual_seed(0)
        factor = 8 if side % 64 == 0 else 4
        operator = operators.SuperResolution(factor, noise=operators.GaussianNoise(0.05))
        y = operator(torch.randn(batch, 3, side, side, generator=generator).tanh(), generator).to(self.device)
        noise = ImageNoise([(0, str(i), 0) for i in range(batch)], self.device)
        times = [500 - i for i in range(steps)]
        if method == "DPS, written out":
            run_algorithm_1(prior.inner, operator.A, y, noise, times, receive)
            return marks
        guidance = PAG(1.0, layers="m1" if self.tiny else LAYER) if "PAG" in method else None
        options = {"noise": noise, "steps": times, "guidance": guidance, "callback": receive}
        if METHODS[method][0] == "sd":
            psld(prior, operator, y, **options, eta=1e-3, gamma=1e-4)
        elif method == "DiffPIR":
            diffpir(prior, operator, y, **options, lam=5.0, zeta=0.5)
        else:
            dps(prior, operator, y, **options, zeta=0.1)
        return marks

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _make(self, model: str, precision: str) -> Any:
        """Return a model with random weights, made on the device."""
        from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel

        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        configs = TINY if self.tiny else {"ffhq": FFHQ, "unet": SD15_UNET, "vae": SD15_VAE}
        torch.manual_seed(0)
        with self.device:
            if model == "ffhq":
                return ADM(UNet2DModel(**configs["ffhq"]), dtype=dtype, device=self.device, lean=False)
            unet, vae = UNet2DConditionModel(**configs["unet"]), AutoencoderKL(**configs["vae"])
            text = torch.randn(1, 77, unet.config.cross_attention_dim)
        parts = [torch.nn.Module.to(part, dtype=dtype) for part in (unet, vae)]
        return StableDiffusion(*parts, Schedule.from_config({}), text)

    def _find_peak(self, precision: str) -> float:
        """Return the FLOP/s of a product of two square matrices in this precision, in the current state of torch."""
        if precision not in self.peaks:
            side = 256 if self.device.type == "cpu" else SIDE
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            a, seconds = torch.randn(side, side, device=self.device).to(dtype), []
            for _ in range(10):
                self._wait()
                started = time.perf_counter()
                a @ a
                self._wait()
                seconds.append(time.perf_counter() - started)
            self.peaks[precision] = 2 * side**3 / statistics.median(seconds[3:])
        return self.peaks[precision]

    def _count_flop(self, method: str) -> float:
        """Return the floating-point operations of one step for one image, convolutions and products of matrices."""
        if method not in self.flop:
            backbone, totals = self._make(METHODS[method][0], "bf16"), []
            prior = Sized(backbone, *[backbone.resolution * backbone.downscale] * 2)
            predict = prior.predict
            prior.predict = lambda x, *rest: predict(x.view_as(x), *rest)  # the counter's hooks want no leaf
            with make_counter() as counter:
                self._run(method, prior, 1, WARM, note=lambda: totals.append(counter.get_total_flops()))
            self.flop[method] = float(totals[-1] - totals[-2])
            del prior.predict  # which holds the model that holds it
        return self.flop[method]


def run_algorithm_1(
    backbone: ADM, A: Callable, y: torch.Tensor, noise: ImageNoise, times: Sequence[int], receive: Callable[[], None]
) -> None:
    """DPS as published (Chung et al. 2023, Algorithm 1), a step of size 0.1 down ||y - A(x0_hat)||, in plain torch."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()
    network, low = backbone.network, backbone.dtype
    x = noise(0, (len(y), 3, backbone.resolution, backbone.resolution), "start")
    for k, i in enumerate(times):
        a, a_prev = alpha_bar[i], alpha_bar[i - 1]
        beta = 1 - a / a_prev
        x = x.detach().requires_grad_()
        with torch.autocast(x.device.type, dtype=low, enabled=low != torch.float32):
            eps = network(x, i, return_dict=False)[0][:, :3].float()
        x0 = ((x - (1 - a) ** 0.5 * eps) / a**0.5).clamp(-1, 1)
        (gradient,) = torch.autograd.grad(torch.linalg.vector_norm((y - A(x0)).flatten(1), dim=1).sum(), x)
        with torch.no_grad():
            mean = a_prev**0.5 * beta / (1 - a) * x0 + (1 - beta) ** 0.5 * (1 - a_prev) / (1 - a) * x
            sigma = (beta * (1 - a_prev) / (1 - a)) ** 0.5
            x = mean + sigma * noise(k, x.shape) - 0.1 * gradient
        receive()


@contextmanager
def set_precision(precision: str) -> Iterator[None]:
    """Within the block products and convolutions of fp32 run in TF32 if it is "tf32", in full precision otherwise."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    is_tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if is_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = is_tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def format_rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table, a line for each row."""
    lines = [
        "| method | precision | batch | way | ms a step | images an hour | of steps | GB | TFLOP/s | of the peak |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["method"], row["precision"], str(row["batch"]), row["way"]]
        if "error" in row:
            cells += [row["error"].replace("|", "/"), *[""] * 5]
        else:
            memory = "-" if row["memory_gb"] is None else f"{row['memory_gb']:.1f}"
            cells += [f"{1000 * row['seconds_step']:.1f}", f"{row['images_hour']:.0f}", str(row["steps"]), memory]
            cells += [f"{row['tflops']:.1f}", f"{row['share']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    run_command(measure_gpu)
