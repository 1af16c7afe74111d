"""Processor seconds of restorations on one thread of a CPU, beside those of another checkout, of other options and of
the machine's own matrix product: `python -m benchmarks.cpu against=FOLDER`.

Each variant has a process of its own, which has loaded its prior; they are asked in turn, so that ratios hold on a
crowded machine too. Seconds are medians of the process's own time. The share of the peak is the arithmetic of a
restoration (convolutions, matrix products, attention), divided by its time and by the speed of a product of two
matrices of 1024 x 1024, measured before each restoration.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIDE = 1024  # of the matrices

# What is restored: the prior, a shipped photo and the part of it, the operator, what the call is given.
CASES: dict[str, dict[str, Any]] = {
    "face": {"backbone": "embedded", "photo": "astronaut-face-64.png", "side": 64, "operator": "sr4"},
    "noise": {"backbone": "embedded-photo", "photo": "coffee.jpg", "side": 256, "operator": "denoise"},
    "sr4": {"backbone": "embedded-photo", "photo": "coffee.jpg", "side": 256, "operator": "sr4"},
    "dps": {
        "backbone": "embedded",
        "photo": "astronaut-face-64.png",
        "side": 64,
        "operator": "sr4",
        "call": {"sampler": "dps", "steps": 10, "zeta": 5.0},
    },
}
CASES["dps+pag"] = {**CASES["dps"], "pag": {"scale": 1.0, "layers": "i5"}}


def measure_cpu(
    cases: str = "face,noise,sr4,dps,dps+pag", repeats: int = 5, against: str = "", options: str = "", side: int = 0
) -> str:
    """Return a table of medians.

    cases: of CASES. repeats: of each, in turn, after one that is not counted. against: another checkout, such as that
    of the commit before. options: of restore.load, compared with none: precision=bf16,lean=false. side: of the
    photos' parts in place of the cases'. Raises RestoreError for an unknown case.
    """
    from operators.naming import check_known

    names = [name.strip() for name in cases.split(",")]
    check_known(names, CASES, "unknown case")
    variants = {"now": (ROOT, {})}
    variants |= {"before": (Path(against).resolve(), {})} if against else {}
    variants |= {options: (ROOT, parse_options(options))} if options else {}
    lines = ["| case | variant | CPU seconds | now / variant | share of peak | PSNR, dB |", "|---|---|---|---|---|---|"]
    for name in names:
        case = CASES[name] | ({"side": side} if side else {})
        servers = {which: Server(code, {**case, "options": given}) for which, (code, given) in variants.items()}
        found: dict[str, list[dict]] = {which: [] for which in variants}
        try:
            for repeat in range(repeats + 1):
                for which, server in servers.items():
                    answer = server.ask()
                    if repeat:
                        found[which].append(answer)
        finally:
            for server in servers.values():
                server.close()
        lines += format_rows(name, found)
        print("\n".join(lines[-len(found) :]), file=sys.stderr)  # a crowded machine takes its time
    return "\n".join(lines)


def parse_options(text: str) -> dict[str, Any]:
    """Return {key: value} of "key=value,key=value", values as in YAML. Raises RestoreError for another form."""
    from operators import RestoreError
    from restore.app.options import split_settings

    others, options = split_settings([part.strip() for part in text.split(",")])
    if others:
        raise RestoreError(f"options must be key=value, comma separated, got {text}")
    return options


class Server:
    """A process in another checkout that does one case whenever it is asked, by a function of this file."""

    def __init__(self, code: Path, case: Mapping[str, Any], serve: str = "serve") -> None:
        run = f"import runpy; runpy.run_path({str(Path(__file__))!r})[{serve!r}]()"
        environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", run], cwd=code, env=environment, **pipes)
        self._send(dict(case))

    def _send(self, message: Any) -> None:
        print(json.dumps(message), file=self.process.stdin, flush=True)

    def ask(self, question: str = "again") -> dict[str, Any]:
        """Return what `serve` found. Raises RestoreError if the process has failed."""
        from operators import RestoreError

        self._send(question)
        answer = self.process.stdout.readline()
        if not answer:
            raise RestoreError("the measured process failed; its message is above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """Restore the case of the first line of the standard input for each line that follows, and print {seconds, peak,
    gflop, psnr}.

    Runs in other checkouts too, so it asks for nothing that they may not have.
    """
    import torch

    import operators
    import restore
    from restore.images import io
    from restore.metrics.single import psnr
    from restore.paths import data_dir

    case = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    restorer = restore.load(case["backbone"], device="cpu", **case["options"])
    pixels = io.read_image(data_dir() / "photos" / case["photo"]).pixels
    top, left = ((length - case["side"]) // 2 for length in pixels.shape[-2:])
    x = pixels[..., top : top + case["side"], left : left + case["side"]]
    noise = operators.GaussianNoise(0.1 if case["operator"] == "denoise" else 0.05)
    is_plain = case["operator"] == "denoise"
    operator = operators.Denoising(noise=noise) if is_plain else operators.SuperResolution(4, noise=noise)
    y = operator(x, torch.Generator().manual_seed(0))
    call = dict(case.get("call", {}))
    if "pag" in case:
        call["guidance"] = restore.PAG(**case["pag"])
    elif call:
        call["guidance"] = None
    a, gflop = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)), None
    for _ in sys.stdin:
        if gflop is None:
            gflop = count_flops(lambda: restorer(y, operator, seed=0, **call)) / 1e9
        started = time.process_time()
        a @ a
        product = time.process_time() - started
        started = time.process_time()
        result = restorer(y, operator, seed=0, **call)
        seconds = time.process_time() - started
        quality = float(psnr(result.samples[:, 0], x)[0])
        answer = {"seconds": seconds, "peak": 2 * SIDE**3 / product / 1e9, "gflop": gflop, "psnr": quality}
        print(json.dumps(answer), flush=True)


def serve_command() -> None:
    """Run `restore run` on the file of each line of the standard input, and print what it took.

    Runs in other checkouts too, so it asks for nothing that they may not have.
    """
    import torch

    from restore.app import cli

    case = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    out = Path(case["arguments"][-1])
    for line in sys.stdin:
        file = json.loads(line)
        started = time.process_time()
        cli.app(["run", file, *case["arguments"], "--overwrite", "--quiet"], standalone_mode=False)
        seconds = time.process_time() - started
        print(json.dumps({"seconds": seconds, "result": str(out / Path(file).name)}), flush=True)


def count_flops(run: Callable[[], Any]) -> int:
    """Return the arithmetic of `run`: convolutions, matrix products and attention, backward passes too.

    torch's own FlopCounterMode follows modules by hooks, with which autograd.grad fails for an input that is a leaf.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            count = flop_registry.get(function._overloadpacket)
            if count is None:
                with self:
                    out = function.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
            out = function(*args, **kwargs)
            self.total += count(*args, **kwargs, out_val=out) if count is not None else 0
            return out

    with Counter() as counter:
        run()
    return counter.total


def format_rows(name: str, found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Return rows of Markdown; found: the answers of each variant, the first of which the others are compared with."""
    lines, first = [], None
    for which, answers in found.items():
        seconds, peak = (statistics.median(answer[key] for answer in answers) for key in ("seconds", "peak"))
        first = seconds if first is None else first
        share, quality = answers[0]["gflop"] / seconds / peak, answers[0]["psnr"]
        cells = [name, which, f"{seconds:.2f}", f"{first / seconds:.2f}", f"{share:.2f}", f"{quality:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    from benchmarks.measure import run_command

    run_command(measure_cpu)
