"""Whether a photo gets what it needs if nothing is said: `python -m benchmarks.look`.

Pieces of photos are damaged in known ways (`CASES`) and written as files. Each is restored as `restore run FILE` does
it with nothing else said, which is the first command that `restore look` proposes, and as people do it who know what
happened: with the operator of the damage itself, with the tasks of its parts, with no task at all. The gap is how far
the first falls behind the best.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
import torch
from PIL import Image

from benchmarks.damages import MARGIN, Piece, draw_hole, draw_scratches
from benchmarks.measure import run_command
from benchmarks.photo import find_pieces, select
from operators import RestoreError
from restore import disk
from restore.app.choice import MethodChoice
from restore.app.files import Photo
from restore.app.run import RestoreJob
from restore.images.io import to_tensor
from restore.images.motion import Motion
from restore.metrics.single import LPIPS, psnr
from restore.paths import configs_dir
from restore.restorer import Restorer, load
from restore.task import ROUNDING, Task, load_task

NEAR = 0.5  # dB; a gap that nobody minds
INVISIBLE = 45.0  # dB; a better result is not told from the original
AS_IT_IS, FIRST = "as it is", "nothing said"

# What happened to a photo, one after the other: blur (std), motion (length, angle), reduced (factor), noise (of 255),
# JPEG (quality); or missing pixels, white in the file: scratches, hole, share of the pixels.
CASES: dict[str, dict[str, Any]] = {
    "undamaged": {},
    "noise 10": {"noise": 10},
    "noise 25": {"noise": 25},
    "noise 50": {"noise": 50},
    "blur 1.5": {"blur": 1.5},
    "blur 3": {"blur": 3.0},
    "motion 9": {"motion": (9, 30), "noise": 1},
    "motion 15": {"motion": (15, 115), "noise": 1},
    "half size": {"reduced": 2},
    "quarter size": {"reduced": 4},
    "JPEG 10": {"jpeg": 10},
    "JPEG 20": {"jpeg": 20},
    "JPEG 40": {"jpeg": 40},
    "JPEG 60": {"jpeg": 60},
    "scratches": {"missing": draw_scratches},
    "hole": {"missing": draw_hole},
    "random pixels": {"missing": lambda side, random: random.random((side, side)) > 0.3},
    "blur 1.5, noise 5": {"blur": 1.5, "noise": 5},
    "blur 2, noise 15": {"blur": 2.0, "noise": 15},
    "noise 15, JPEG 60": {"noise": 15, "jpeg": 60},
    "blur 2, JPEG 60": {"blur": 2.0, "jpeg": 60},
    "half size, JPEG 60": {"reduced": 2, "jpeg": 60},
    "blur 1, half size, JPEG 60": {"blur": 1.0, "reduced": 2, "jpeg": 60},
    "half size, noise 10": {"reduced": 2, "noise": 10},
    "enlarged 2 times": {"reduced": 2, "enlarged": 2},
}


@dataclass(frozen=True)
class Damaged:
    """A damaged piece. content: the file, in the format of `suffix`. chain: what happened, as configurations of
    operators. sigma: of the noise, on [-1, 1]. is_masked: the chain is a mask of known pixels."""

    content: bytes
    suffix: str = ".png"
    chain: list[dict[str, Any]] = field(default_factory=list)
    sigma: float = 0.0
    is_masked: bool = False

    def write(self, path: Path) -> Path:
        path = path.with_name(path.name + self.suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content)
        return path


def damage(piece: Piece, name: str, seed: int = 0) -> Damaged:
    """Return a piece damaged as the world does it: blurs and reductions see beyond the border, noise is clipped."""
    case, random = CASES[name], np.random.default_rng([seed, zlib.crc32(f"{piece.name} {name}".encode())])
    image, margin, chain = piece.canvas, MARGIN, []
    if "blur" in case:
        size = 2 * round(4 * case["blur"]) + 1
        image = scipy.ndimage.gaussian_filter(image, (case["blur"], case["blur"], 0), mode="mirror")
        chain.append({"name": "gaussian_blur", "std": case["blur"], "kernel_size": size})
    if "motion" in case:
        kernel = Motion(*case["motion"]).kernel()
        image = np.stack(  # operators.Blur correlates; a straight motion is symmetric
            [scipy.ndimage.correlate(image[..., c], kernel.numpy(), mode="mirror") for c in range(3)], axis=2
        )
        chain.append({"name": "blur", "kernel": kernel})
    if "reduced" in case:
        image, margin = _resize(image, 1 / case["reduced"]), margin // case["reduced"]
        chain.append({"name": "super_resolution", "factor": case["reduced"]})
    if "enlarged" in case:  # a smooth enlargement is nearly a blur of this size
        image, margin = _resize(image, case["enlarged"]), margin * case["enlarged"]
        chain = [{"name": "gaussian_blur", "std": 0.55 * case["enlarged"], "kernel_size": 9}]
    image = image[margin:-margin, margin:-margin]
    if "missing" in case:
        known = case["missing"](len(image), random)
        image = np.where(known[..., None], image, 255)
        chain.append({"name": "inpainting_mask", "mask": torch.from_numpy(known).float()[None, None]})
    image = image + case.get("noise", 0) * random.standard_normal(image.shape)
    stream, pixels = io.BytesIO(), np.clip(np.rint(image), 0, 255).astype(np.uint8)
    saving = {"format": "JPEG", "quality": case["jpeg"]} if "jpeg" in case else {"format": "PNG"}
    Image.fromarray(pixels).save(stream, **saving)
    suffix, sigma = ".jpg" if "jpeg" in case else ".png", case.get("noise", 0) / 127.5
    return Damaged(stream.getvalue(), suffix, chain, sigma, "missing" in case)


def list_rivals(damaged: Damaged, path: Path) -> dict[str, Task]:
    """Return what people would run on the file who know what happened: all of it undone, and each thing alone."""
    chain = list(damaged.chain)
    if damaged.suffix == ".jpg":
        jpeg = load_task("jpeg").for_photo(path).config  # with the tables of the file
        chain.append({key: value for key, value in jpeg.items() if key != "noise"})
    denoise = {"denoise": load_task("denoise", blind=True)} if damaged.sigma or damaged.suffix == ".jpg" else {}
    if damaged.is_masked:
        return {"what happened": Task("inpaint", chain[0], blind=True)}
    if not chain:
        return denoise
    noise = {"name": "gaussian", "sigma": math.hypot(damaged.sigma, ROUNDING)}
    rivals = {part["name"]: Task(part["name"], {**part, "noise": noise}) for part in chain}
    whole = chain[0] if len(chain) == 1 else {"name": "compose", "operators": chain}
    return {"what happened": Task("auto", {**whole, "noise": noise}), **(rivals if len(chain) > 1 else {}), **denoise}


@dataclass
class Judge:
    """Restores damaged files and compares them; what is measured is in `folder`, so that an interrupted run continues.

    lpips: None leaves it out.
    """

    restorer: Restorer
    folder: Path
    quality: str = "fast"
    seed: int = 0
    lpips: LPIPS | None = None

    def measure(self, piece: Piece, name: str) -> dict[str, Any]:
        """Return the row of a damaged piece: {"case", "piece", "note", "scores": {method: {"psnr", "lpips"}}}."""
        damaged = damage(piece, name, self.seed)
        stem = f"{piece.name}_{name}".replace(",", "").replace(" ", "-")
        path, store = damaged.write(self.folder / "files" / stem), self.folder / "rows" / f"{stem}.json"
        facts = {"file": hashlib.sha256(damaged.content).hexdigest()[:12], "lpips": self.lpips is not None}
        facts |= {"weights": self.restorer.weights_hash(), "quality": self.quality, "presets": _hash_presets()}
        row = disk.read_json(store) or {}
        known = row.get("known", {}) if row.get("facts") == facts else {}
        first, note = None, "nothing found"
        try:
            first = load_task("auto", {}, blind=True).for_photo(path)
            note = first.note
        except RestoreError as error:
            if "nothing was found" not in str(error):
                raise
        tasks = {FIRST: first, AS_IT_IS: None}
        tasks |= {rival: task.for_photo(path) for rival, task in list_rivals(damaged, path).items()}
        scores = {}
        for method, task in tasks.items():
            key = hashlib.sha256(json.dumps([] if task is None else task.describe()).encode()).hexdigest()[:16]
            if key not in known:
                pixels = np.array(Image.open(path).convert("RGB")) if task is None else self._restore(path, task)
                known[key] = self._compare(pixels, piece.truth)
                disk.write_json(_parent(store), row | {"facts": facts, "known": known})
            scores[method] = known[key]
        row = {"facts": facts, "case": name, "piece": piece.name, "note": note, "scores": scores, "known": known}
        disk.write_json(_parent(store), row)
        return row

    def _restore(self, path: Path, task: Task) -> np.ndarray:
        photo = Photo(path, _parent(self.folder / "restored" / f"{path.stem}.png"))
        job = RestoreJob(self.restorer, _Fixed(task), MethodChoice(quality=self.quality), overwrite=True)
        (outcome,) = job.run([photo])
        if outcome.error is not None:
            raise RestoreError(outcome.error)
        return np.array(Image.open(photo.target).convert("RGB"))

    def _compare(self, pixels: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        """Compare at the size of the truth: a larger picture is reduced, a smaller one enlarged as a viewer does."""
        image = np.clip(np.rint(_resize(pixels.astype(float), len(truth) / len(pixels))), 0, 255).astype(np.uint8)
        image, clean = to_tensor(image), to_tensor(truth)
        functions = {"psnr": psnr} | ({"lpips": self.lpips} if self.lpips is not None else {})
        scores = {name: float(function(image, clean)) for name, function in functions.items()}
        return scores | {"psnr": min(scores["psnr"], INVISIBLE)}


@dataclass(frozen=True)
class _Fixed:
    """A task that was already fitted to its one photo."""

    task: Task

    def for_photo(self, photo: Path, degrade: bool = False) -> Task:
        return self.task


def _hash_presets() -> str:
    content = b"".join(path.read_bytes() for path in sorted((configs_dir() / "method").glob("*.yaml")))
    return hashlib.sha256(content).hexdigest()[:12]


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _resize(image: np.ndarray, factor: float) -> np.ndarray:
    size = [round(factor * side) for side in image.shape[1::-1]]
    bands = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    return np.stack([np.array(band.resize(size, Image.Resampling.BICUBIC), dtype=float) for band in bands], axis=2)


def find_gap(row: dict[str, Any]) -> tuple[float, str]:
    """Return by how many dB nothing said is behind the best, and which that is."""
    best = max(row["scores"], key=lambda method: row["scores"][method]["psnr"])
    return row["scores"][best]["psnr"] - row["scores"][FIRST]["psnr"], best


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return, in Markdown, a line for every case, the files that are farther behind, and the share that is not."""
    lines = ["| damage | files | as it is | nothing said | best | mean gap | largest gap | seen |", "|---" * 8 + "|"]
    for name in CASES:
        own = [row for row in rows if row["case"] == name]
        if not own:
            continue
        gaps = [find_gap(row)[0] for row in own]
        cells = [_mean(own, AS_IT_IS), _mean(own, FIRST), _mean(own, None)]
        seen = sorted({row["note"].split("; done")[0].removeprefix("seen: ") for row in own})
        apart = f"{np.mean(gaps):.2f} | {max(gaps):.2f}"
        lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} | {apart} | {'; '.join(seen)[:160]} |")
    gaps = [find_gap(row) for row in rows]
    far = [(row, *gap) for row, gap in zip(rows, gaps, strict=True) if gap[0] > NEAR]
    lines += ["", f"Within {NEAR} dB of the best: {len(rows) - len(far)} of {len(rows)}."]
    lines += [f"- {row['piece']}, {row['case']}: {gap:.2f} dB behind {best}; {row['note']}" for row, gap, best in far]
    return "\n".join(lines)


def _mean(rows: Sequence[dict[str, Any]], method: str | None) -> str:
    """The mean PSNR, and LPIPS, of a method, of the best one in PSNR for None."""
    scores = [row["scores"][method or find_gap(row)[1]] for row in rows]
    return " / ".join(
        f"{np.mean([s[key] for s in scores]):.{d}f}" for key, d in (("psnr", 2), ("lpips", 3)) if key in scores[0]
    )


def judge(
    data: str = ",".join(f"data/photos/{name}.jpg" for name in ("astronaut", "chelsea", "coffee")),
    cases: str = ",".join(name.replace(",", ";") for name in CASES),
    files: int = 50,
    pieces: int = 2,
    size: int = 128,
    seed: int = 0,
    backbone: str = "embedded-photo",
    quality: str = "fast",
    lpips: str = "",
    out: str = "runs/look",
) -> str:
    """Return a table in Markdown: what a photo gets if nothing is said, beside the best of the package's tasks.

    data: clean photos, files and folders, separated by commas; of each, `pieces` squares of `size` pixels, a multiple
    of 4. files: how many damaged ones, case after case, each of the next piece. cases: beginnings of their names; a
    comma within a name is written ";". lpips: weights of AlexNet; without them LPIPS is left out. out: a folder, in
    which an interrupted run continues.
    Raises RestoreError for unknown cases and photos of which none is large enough.
    """
    torch.set_num_threads(1)
    chosen = select(cases, CASES, "case")
    if size < 64 or size % 4 or pieces < 1 or files < 1:
        raise RestoreError(
            f"size must be a multiple of 4 from 64 on, pieces and files at least 1, got {size}, {pieces}, {files}"
        )
    found = find_pieces(data, pieces, size, seed, "data must be photos")
    restorer = load(backbone, device="cpu", offline=True)
    network = LPIPS("alex", {"alexnet": lpips}) if lpips else None
    rows = list(_measure_all(Judge(restorer, Path(out), quality, seed, network), found, chosen, files))
    count = len({row["piece"].rsplit("-", 1)[0] for row in rows})
    title = f"{len(rows)} files, pieces of {size} × {size} pixels of {count} photos; {restorer.name}, {quality}."
    return f"{title} PSNR in dB{' / LPIPS' if lpips else ''}, at most {INVISIBLE:g}.\n\n{format_table(rows)}"


def _measure_all(judge: Judge, pieces: list[Piece], cases: list[str], files: int) -> Iterator[dict[str, Any]]:
    from tqdm import tqdm

    for i in tqdm(range(files), unit="file", leave=False):
        turn, case = divmod(i, len(cases))
        yield judge.measure(pieces[(i + turn) % len(pieces)], cases[case])


if __name__ == "__main__":
    run_command(judge)
