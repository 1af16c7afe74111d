"""Processor seconds of whole commands on photos, beside another checkout's: `python -m benchmarks.commands
photos=FOLDER against=FOLDER`.

Each variant has a process of its own, which has imported the command line and run it once; the variants restore each
photo in turn, so that ratios hold on a crowded machine. What is timed is `restore run` from its arguments to the files
it writes: loading the prior, the plan, the restoration, the result; not Python's start and imports.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

import operators
from benchmarks.cpu import ROOT, Server
from operators.naming import check_known
from restore.images import io
from restore.metrics.single import psnr
from restore.paths import data_dir

# What happens to a piece of a photo, and the command that mends it.
CASES = {
    "noise": (operators.Denoising(noise=operators.GaussianNoise(50 / 255)), "--task denoise sigma=auto"),
    "sr2": (operators.SuperResolution(2), "--task sr2 sigma=0"),
}
BEFORE = "--label photo"  # of an older checkout, whose prior of photos was a class of the prior of faces


def measure_commands(
    cases: str = "noise,sr2",
    photos: str = "",
    pieces: int = 4,
    height: int = 256,
    width: int = 384,
    against: str = "",
    before: str = BEFORE,
    options: str = "--quality fast",
) -> str:
    """Return a table: medians of CPU seconds and of ratios, means of PSNR and of its paired differences.

    cases: of CASES. photos: a folder, by default the shipped ones. pieces: the centres, height x width, of the first so
    many photos. against: another checkout, given the options `before` too. options: variants of this checkout, comma
    separated, beside the default. Raises RestoreError for an unknown case or too small photos.
    """
    names = [name.strip() for name in cases.split(",")]
    check_known(names, CASES, "unknown case")
    variants = {"default": (ROOT, "")} | {text.strip(): (ROOT, text) for text in options.split(",") if text.strip()}
    variants |= {"before": (Path(against).resolve(), before)} if against else {}
    truths = cut_pieces(Path(photos) if photos else data_dir() / "photos", pieces, height, width)
    lines = ["| case | variant | CPU seconds | / before | PSNR, dB | beside before |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found = _measure_case(name, truths, variants, Path(folder))
            lines += format_rows(name, found, "before" if against else "default")
            print("\n".join(lines[-len(found) :]), file=sys.stderr)
    return "\n".join(lines)


def cut_pieces(folder: Path, pieces: int, height: int, width: int) -> list[torch.Tensor]:
    """Return the centres (1, 3, height, width) of the first photos of a folder that are as large, by name."""
    found = []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg")):
        pixels = io.read_image(path).pixels
        if pixels.shape[2] < height or pixels.shape[3] < width or pixels.shape[1] != 3:
            continue
        top, left = (pixels.shape[2] - height) // 2, (pixels.shape[3] - width) // 2
        found.append(pixels[..., top : top + height, left : left + width])
        if len(found) == pieces:
            return found
    raise operators.RestoreError(f"photos must have {pieces} of {height} x {width} pixels and more, got {len(found)}")


def _measure_case(
    name: str, truths: Sequence[torch.Tensor], variants: Mapping[str, tuple[Path, str]], folder: Path
) -> dict[str, list[dict]]:
    operator, command = CASES[name]
    servers, found = {}, {which: [] for which in variants}
    try:
        for k, (which, (code, more)) in enumerate(variants.items()):
            case = {"arguments": [*command.split(), *more.split(), "-o", str(folder / f"{name}-{k}")]}
            servers[which] = Server(code, case, "serve_command")
        for k, truth in enumerate(truths):
            file = folder / f"{name}-{k}.png"
            io.write_image(file, operator(truth, torch.Generator().manual_seed(k))[0])
            for repeat in range(2 if k == 0 else 1):  # the first is not counted
                for which, server in servers.items():
                    answer = server.ask(str(file))
                    result = io.read_image(answer.pop("result")).pixels
                    if repeat or k:
                        found[which].append(answer | {"psnr": float(psnr(result, truth)[0])})
    finally:
        for server in servers.values():
            server.close()
    return found


def format_rows(name: str, found: Mapping[str, Sequence[Mapping[str, float]]], against: str) -> list[str]:
    """Return rows of Markdown; found: answers of each variant, one a photo; against: a variant, to compare with."""
    lines = []
    for which, answers in found.items():
        pairs = list(zip(answers, found[against], strict=True))
        seconds = statistics.median(answer["seconds"] for answer in answers)
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)
        quality, gain = np.mean([a["psnr"] for a in answers]), [a["psnr"] - b["psnr"] for a, b in pairs]
        beside = "–" if which == against else f"{np.mean(gain):+.2f} ({min(gain):+.2f} to {max(gain):+.2f})"
        lines.append(f"| {name} | {which} | {seconds:.2f} | {ratio:.2f} | {quality:.2f} | {beside} |")
    return lines


if __name__ == "__main__":
    from benchmarks.measure import run_command

    run_command(measure_commands)
