"""How long a person waits: `python -m benchmarks.start`, from the start of the command to its first line, first step
and result, and of the page to its first answer.

Each command runs in a process of its own at a terminal (a pseudo-terminal, so Linux and macOS). The first step begins
when the plan is printed. Seconds by the clock and of the processor (Linux), each the median of the repeats.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from benchmarks.measure import run_command
from operators import RestoreError
from restore.paths import data_dir

ROOT = Path(__file__).parents[1]
PLANNED = "evaluations"  # in the line that is printed before the first step
FIRST, STEP, RESULT, ANSWER = "first line", "first step", "result", "first answer"
LONGEST = 3600.0  # seconds for one command


@dataclass
class Waits:
    """Seconds from a command's start to what a person waits for, by its name: by the clock, and of the processor."""

    clock: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)


def time_command(arguments: Sequence[str], code: Path = ROOT, answers: Callable[[], bool] | None = None) -> Waits:
    """Run `restore` with these arguments from the checkout `code` until it ends, or until it `answers`.

    Raises RestoreError if it fails.
    """
    waits, text, started = Waits(), "", time.perf_counter()
    child, terminal = pty.fork()
    if child == 0:  # the new process
        os.chdir(code)  # the first place where `-m` looks
        environment = os.environ | {"PYTHONPATH": str(code)}
        os.execve(sys.executable, [sys.executable, "-m", "restore.app.cli", *map(str, arguments)], environment)

    def note(name: str, seconds: float | None = None) -> None:
        waits.clock.setdefault(name, time.perf_counter() - started)
        used = _read_processor_seconds(child) if seconds is None else seconds
        if used is not None:
            waits.processor.setdefault(name, used)

    try:
        while time.perf_counter() - started < LONGEST:
            if answers is not None and answers():
                note(ANSWER)
                os.kill(child, signal.SIGTERM)
                answers = None
            if not select.select([terminal], [], [], 0.02)[0]:
                continue
            try:
                more = os.read(terminal, 65536)
            except OSError:  # the terminal of a process that has ended
                break
            if not more:
                break
            text += more.decode(errors="replace")
            if text.strip():
                note(FIRST)
            if PLANNED in text:
                note(STEP)
    finally:
        os.close(terminal)
        if time.perf_counter() - started >= LONGEST:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    if ANSWER not in waits.clock:
        note(RESULT, usage.ru_utime + usage.ru_stime)
        if status:
            raise RestoreError(f"restore {' '.join(map(str, arguments))} failed: {text.strip()[-300:]}")
    return waits


def _read_processor_seconds(process: int) -> float | None:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def time_page(code: Path) -> Waits:
    """Run `restore ui` until it answers a browser."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def answers() -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as page:
            return page.status == 200
        return False

    return time_command(["ui", "--port", str(port)], code, answers)


def measure_start(repeats: int = 3, against: str = "", photos: str = "64x64,768x512", page: bool = True) -> str:
    """Return a table of medians.

    repeats: of everything, in turn. against: another checkout, such as that of the commit before, for ratios.
    photos: sizes of noisy photos to restore. page: also measure `restore ui`.
    """
    checkouts = {"": ROOT} | ({"before": Path(against).resolve()} if against else {})
    found: dict[tuple[str, str], list[Waits]] = {}
    with tempfile.TemporaryDirectory() as folder:
        commands = {f"photo {size}": _make_photo(Path(folder), size) for size in photos.split(",") if size}
        for repeat in range(repeats):
            for which, code in checkouts.items():
                for name, photo in commands.items():
                    out = Path(folder) / f"{which}{repeat}"
                    run = ["run", photo, "--task", "denoise", "sigma=0.1", "-o", out]
                    found.setdefault((name, which), []).append(time_command(run, code))
                if page:
                    found.setdefault(("page", which), []).append(time_page(code))
    return format_waits(found)


def _make_photo(folder: Path, size: str) -> Path:
    width, height = map(int, size.split("x"))
    path = folder / f"{size}.png"
    Image.open(data_dir() / "photos" / "coffee.jpg").resize((width, height)).save(path)
    return path


def format_waits(found: Mapping[tuple[str, str], Sequence[Waits]]) -> str:
    """Return Markdown; found: the repeats of what was measured, by (name, "" or "before")."""
    head = ["", "wait for", "seconds", "of the processor", "before", "of the processor", "ratio", "of the processor"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (name, which), waits in found.items():
        for event in () if which else waits[0].clock:
            now, before = (_take_medians(some, event) for some in (waits, found.get((name, "before"), ())))
            ratios = [None if None in pair else pair[0] / pair[1] for pair in zip(now, before, strict=True)]
            cells = [f"{value:.1f}" if value is not None else "-" for value in (*now, *before)]
            cells += [f"{ratio:.2f}" if ratio is not None else "-" for ratio in ratios]
            lines.append(f"| {' | '.join([name, event, *cells])} |")
    return "\n".join(lines)


def _take_medians(waits: Sequence[Waits], event: str) -> list[float | None]:
    return [
        statistics.median(seconds) if (seconds := [kind[event] for kind in kinds if event in kind]) else None
        for kinds in ([w.clock for w in waits], [w.processor for w in waits])
    ]


if __name__ == "__main__":
    run_command(measure_start)
