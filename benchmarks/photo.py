"""Damaged photos, restored by this package and by what else one can install: `python -m benchmarks.photo`.

Pieces of photos at their own resolution are damaged (`benchmarks/damages.py`), written as files, restored as `restore
run FILE` does it, and compared with the original beside other programs (`benchmarks/alternatives.py`). All of it runs
on one thread of a CPU.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.alternatives import ALTERNATIVES
from benchmarks.damages import DAMAGES, MARGIN, Damage, Damaged, Piece, cut_pieces
from benchmarks.measure import run_command
from operators import RestoreError
from operators.naming import check_known
from restore import disk
from restore.app.choice import MethodChoice
from restore.app.files import Photo
from restore.app.run import Condition, RestoreJob
from restore.images import io
from restore.images.folder import filter_images
from restore.metrics.single import LPIPS, psnr, ssim
from restore.metrics.statistics import bootstrap_mean
from restore.restorer import Restorer, load
from restore.task import load_task

QUALITIES = ("fast", "balanced", "best")
OURS = {f"restore, {quality}": quality for quality in QUALITIES}
REFERENCE = "restore, balanced"  # what the others are compared with: the default


@dataclass
class Bench:
    """Measures methods on damaged pieces; each number is on disk before the next one is begun.

    restorer, label: of `restore run`. lpips: None leaves it out. folder: of rows/*.json and of the pictures.
    """

    restorer: Restorer
    folder: Path
    seed: int = 0
    label: str | None = None
    lpips: LPIPS | None = None
    again: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)  # why something is left out, each once

    def measure(self, name: str, piece: Piece, method: str) -> dict[str, Any] | None:
        """Return the row of a method on a damaged piece, from an earlier run if it was the same; None if left out."""
        damage = DAMAGES[name]
        damaged = damage.of(piece, self.seed)
        ours = method in OURS
        if not ours and not ALTERNATIVES[method].suits(damage.kind, damaged):
            return None
        if method in self.notes or f"{method}, {name}" in self.notes:
            return None
        stem = f"{piece.name}_{name}_{method}".replace(",", "").replace(" ", "-")
        facts = {"truth": hashlib.sha256(piece.truth.tobytes()).hexdigest()[:12]}
        facts |= {"file": hashlib.sha256(damaged.content).hexdigest()[:12], "lpips": self.lpips is not None}
        facts |= {"weights": self.restorer.weights_hash(), "label": self.label} if ours else {}
        path = self.folder / "rows" / f"{stem}.json"
        row = disk.read_json(path)
        if row and row.get("facts") == facts and method not in self.again:
            return row
        picture = self.folder / "pictures" / f"{stem}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        try:
            if ours:
                seconds, result = self._restore(damage, damaged, OURS[method], stem)
            else:
                if reason := ALTERNATIVES[method].explain_absence():
                    raise RestoreError(reason)
                seconds, result = _time(lambda: ALTERNATIVES[method].run(damaged))
        except RestoreError as error:
            self.notes[f"{method}, {name}" if ours else method] = str(error)
            return None
        pixels = np.clip(np.rint(result), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(picture)
        row = {"facts": facts, "damage": name, "method": method, "piece": piece.name, "photo": piece.photo}
        row |= {"seconds_per_megapixel": seconds / (pixels.shape[0] * pixels.shape[1] / 1e6)}
        row |= self._compare(pixels, piece.truth)
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_json(path, row)
        return row

    def _restore(self, damage: Damage, damaged: Damaged, quality: str, stem: str) -> tuple[float, np.ndarray]:
        """Return the processor's seconds and the result of the file, as `restore run` restores it."""
        folder, results = self.folder / "files", self.folder / "restored"
        for each in (folder, results):
            each.mkdir(parents=True, exist_ok=True)
        source = folder / f"{stem}{damaged.suffix}"
        source.write_bytes(damaged.content)
        given: dict[str, Any] = {}
        if damaged.known is not None:
            given["mask"] = folder / f"{stem}-mask.png"
            Image.fromarray(damaged.known.astype(np.uint8) * 255).save(given["mask"])
        elif damage.task == "blur":
            given["kernel"] = folder / f"{stem}-kernel.npy"
            np.save(given["kernel"], damaged.kernel)
        task = load_task(damage.task, dict(damage.settings), blind=True, **given)
        photo = Photo(source, results / f"{stem}.png")
        method, condition = MethodChoice(quality=quality), Condition(label=self.label)
        job = RestoreJob(self.restorer, task, method, condition, overwrite=True)
        seconds, (outcome,) = _time(lambda: list(job.run([photo])))
        if outcome.error is not None:
            raise RestoreError(outcome.error)
        return seconds, np.array(Image.open(photo.target).convert("RGB"))

    def _compare(self, pixels: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        image, clean = io.to_tensor(pixels), io.to_tensor(truth)
        functions: dict[str, Callable] = {"psnr": psnr, "ssim": ssim}
        functions |= {"lpips": self.lpips} if self.lpips is not None else {}
        return {name: float(function(image, clean)) for name, function in functions.items()}


def _time(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


class Table:
    """Rows of a Bench as Markdown."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.damages = [name for name in DAMAGES if any(row["damage"] == name for row in rows)]
        self.methods = [name for name in (*OURS, *ALTERNATIVES) if any(row["method"] == name for row in rows)]

    def values(self, damage: str, method: str, key: str) -> dict[str, float]:
        """Return {photo: mean over its pieces}."""
        found: dict[str, list[float]] = {}
        for row in self.rows:
            if row["damage"] == damage and row["method"] == method and key in row:
                found.setdefault(row["photo"], []).append(row[key])
        return {photo: float(np.mean(values)) for photo, values in found.items()}

    def mean(self, damage: str, method: str, key: str) -> float | None:
        values = self.values(damage, method, key)
        return float(np.mean(list(values.values()))) if values else None

    def difference(self, damage: str, method: str, key: str, digits: int) -> str:
        """Return method − REFERENCE on the same photos, with its 95 % interval."""
        own, other = (self.values(damage, name, key) for name in (method, REFERENCE))
        common = sorted(own.keys() & other.keys())
        if method == REFERENCE or not common:
            return ""
        found = bootstrap_mean([own[photo] - other[photo] for photo in common])
        interval = f" ({found.low:+.{digits}f} to {found.high:+.{digits}f})" if found.n > 1 else ""
        return f"{found.mean:+.{digits}f}{interval}"

    def format(self) -> str:
        """Return every method on every damage."""
        heads = ["damage", "method", "PSNR", "SSIM", "LPIPS", "CPU s/MP", f"PSNR − {REFERENCE}", f"LPIPS − {REFERENCE}"]
        lines = [_line(heads), _line(["---"] * len(heads))]
        for damage in self.damages:
            shown = damage
            for method in self.methods:
                if self.mean(damage, method, "psnr") is None:
                    continue
                cells = [_number(self.mean(damage, method, key), d) for key, d in SHOWN.items()]
                apart = [self.difference(damage, method, key, SHOWN[key]) for key in ("psnr", "lpips")]
                lines.append(_line([shown, method, *cells, *apart]))
                shown = ""
        return "\n".join(lines)

    def format_briefly(self) -> str:
        """Return, for every damage, ours beside the alternatives that are best in PSNR and in LPIPS."""
        heads = ["PSNR / LPIPS, CPU s/MP", *OURS, "best PSNR of the others", "best LPIPS of the others"]
        lines = [_line(heads), _line(["---"] * len(heads))]
        for damage in self.damages:
            cells = [self._cell(damage, method) for method in OURS]
            for key, sign in (("psnr", 1), ("lpips", -1)):
                means = {method: self.mean(damage, method, key) for method in self.methods if method not in OURS}
                means = {method: sign * value for method, value in means.items() if value is not None}
                best = max(means, key=means.__getitem__, default=None)
                cells.append(f"{best} {self._cell(damage, best)}" if best else "–")
            lines.append(_line([damage, *cells]))
        return "\n".join(lines)

    def _cell(self, damage: str, method: str) -> str:
        psnr_, lpips, seconds = (self.mean(damage, method, key) for key in ("psnr", "lpips", "seconds_per_megapixel"))
        if psnr_ is None:
            return "–"
        return f"{psnr_:.2f}{'' if lpips is None else f' / {lpips:.3f}'}, {_number(seconds, 0)}"


SHOWN = {"psnr": 2, "ssim": 3, "lpips": 3, "seconds_per_megapixel": 0}  # digits


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{1 if digits == 0 and value < 10 else digits}f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def compare(
    photos: str = ",".join(f"data/photos/{name}.jpg" for name in ("astronaut", "chelsea", "coffee")),
    damages: str = ",".join(name.replace(",", ";") for name in DAMAGES),
    methods: str = ",".join(name.replace(",", ";") for name in (*OURS, *ALTERNATIVES)),
    pieces: int = 2,
    size: int = 160,
    seed: int = 0,
    backbone: str = "embedded-photo",
    label: str = "photo",
    lpips: str = "",
    out: str = "runs/photo",
    again: str = "",
) -> str:
    """Return two tables in Markdown: ours beside the best alternatives, and all methods with paired differences.

    Lists are separated by commas; a comma within a name is written ";". photos: clean ones, files and folders; a photo
    counts once, as the mean of its pieces. damages, methods: what is measured, by default all; the beginning of a name
    is enough. pieces: of each photo; size: their side in pixels, a multiple of 4. backbone, label: of `restore run`; a
    backbone without that label has none. lpips: weights of AlexNet; without them LPIPS is left out. out: a folder, in
    which an interrupted run continues. again: methods that are measured again although they are there.
    Raises RestoreError for unknown names and photos of which none is large enough.
    """
    torch.set_num_threads(1)
    chosen = {"damage": select(damages, DAMAGES, "damage"), "method": select(methods, OURS | ALTERNATIVES, "method")}
    if size < 64 or size % 4 or pieces < 1:
        raise RestoreError(f"size must be a multiple of 4 from 64 on and pieces at least 1, got {size} and {pieces}")
    found = find_pieces(photos, pieces, size, seed, "photos must be")
    restorer = load(backbone, device="cpu", offline=True)
    known = label in (getattr(restorer.backbone, "labels", None) or ())
    network = LPIPS("alex", {"alexnet": lpips}) if lpips else None
    repeated = tuple(select(again, OURS | ALTERNATIVES, "method")) if again else ()
    bench = Bench(restorer, Path(out), seed, label if known else None, network, repeated)
    rows = list(_measure_all(bench, found, **chosen))
    table = Table(rows)
    count = len({piece.photo for piece in found})
    lines = [f"{len(found)} pieces of {size} × {size} pixels from {count} photos; {restorer.name}, one CPU thread."]
    lines += ["", table.format_briefly(), "", table.format()]
    lines += ["", *(f"- {name}: left out; {reason}" for name, reason in bench.notes.items())] if bench.notes else []
    return "\n".join(lines)


def _measure_all(bench: Bench, pieces: list[Piece], damage: list[str], method: list[str]) -> Iterator[dict[str, Any]]:
    from tqdm import tqdm

    todo = [(name, piece, one) for piece in pieces for name in damage for one in method]
    for name, piece, one in tqdm(todo, unit="row", leave=False):
        row = bench.measure(name, piece, one)
        if row is not None:
            yield row


def find_pieces(photos: str, pieces: int, size: int, seed: int, must: str) -> list[Piece]:
    """Return squares of files and folders, separated by commas; must: the beginning of the error."""
    found = cut_pieces([path for name in photos.split(",") for path in list_photos(Path(name))], pieces, size, seed)
    if not found:
        raise RestoreError(f"{must} of at least {size + 2 * MARGIN} pixels a side, got none in {photos}")
    return found


def list_photos(path: Path) -> list[Path]:
    if not path.exists():
        raise RestoreError(f"photos must be files and folders, got {path}, which does not exist")
    return filter_images(path.iterdir()) if path.is_dir() else [path]


def select(text: str, table: dict[str, Any], what: str) -> list[str]:
    """Return the names in a table that begin with one of the given beginnings."""
    beginnings = [part.strip().replace(";", ",") for part in text.split(",")]
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in table):
            check_known([beginning], table, f"there is no {what}")
    return [name for name in table if any(name.startswith(beginning) for beginning in beginnings)]


if __name__ == "__main__":
    run_command(compare)
