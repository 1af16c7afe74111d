"""How far the restoration of a photo is, in the terminal and on the page: steps, and calls of the network in them."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from operators.naming import AUTO
from restore.memory import Pace, Plan, format_range, widen


class PhotoPace(Pace):
    """The pace of one photo. A step of a large photo takes minutes, so the network's calls count within a step.

    plan: of the photo, None if there is none; batch: samples computed together.
    """

    def __init__(self, plan: Plan | None = None, batch: int = 1, **clock: Any) -> None:
        seconds = None if plan is None else plan.seconds
        super().__init__(None if seconds is None else widen(seconds, plan.busy), **clock)
        self.calls, self.calls_planned, self.next = 0, 0, 1.0
        if plan is not None:
            batch = min(batch, plan.samples)
            calls = math.ceil(plan.windows / max(1, plan.options.max_windows // batch))
            self.calls_planned = plan.evaluations * calls * math.ceil(plan.samples / batch)

    def format_left(self) -> str:
        """Return "2 to 5 minutes left"; "" as long as nothing is known, and at the end."""
        left = self.left()
        return "" if left is None or self.share >= 1 else f"{format_range(*left)} left"

    def count_call(self) -> None:
        """The network was called. What the plan did not foresee stays between the last step and the next."""
        self.calls += 1
        if self.calls_planned:
            self.advance(max(self.share, min(self.calls / self.calls_planned, self.next - 1e-3)))

    def count_step(self, step: dict[str, Any]) -> None:
        """A step is done, as a Restorer's callback is told."""
        samples = step.get("count", 1)
        done = (step["first"] + samples * (step["step"] + 1) / step["steps"]) / step["total"]
        self.next = min(1.0, done + samples / step["steps"] / step["total"])
        self.advance(done)
        self.calls = round(done * self.calls_planned)  # the steps know better than the plan


@contextmanager
def watch_network(backbone: Any, called: Callable[[], None]) -> Iterator[None]:
    """Within the block, call `called` after every call of a backbone's network by this thread.

    Other threads may use the network too: the page plans a photo while it restores another one. (So calls in a
    backward pass count on the CPU alone: on a GPU autograd has threads of its own.)
    """
    network = getattr(backbone, "network", None)
    if not isinstance(network, torch.nn.Module):
        yield
        return
    own = threading.get_ident()
    hook = network.register_forward_hook(lambda *_: called() if threading.get_ident() == own else None)
    try:
        yield
    finally:
        hook.remove()


class Progress:
    """A bar in the terminal: the share of a run's files that is done, and how long the rest takes; nothing if quiet.

    files: of the run. batch: samples computed together. backbone: whose calls show what happens within a step.
    """

    DELAY = 0.5  # seconds before the bar appears
    SECONDS = 0.1  # between two looks at the residual

    def __init__(self, files: int, quiet: bool = False, batch: int | str = 1, backbone: Any = None) -> None:
        from tqdm import tqdm

        form = "{percentage:3.0f}%|{bar}| {elapsed}{postfix}"
        self.files, self.batch, self.done, self.pace, self.note = files, batch, 0, PhotoPace(), ""
        self.noted = -math.inf
        self.bar = tqdm(total=1.0, bar_format=form, leave=False, delay=self.DELAY, disable=quiet)
        self.watching = watch_network(backbone, self._called)

    def watch(self, backbone: Any) -> None:
        """Show the calls of another backbone's network from now on."""
        self.watching.__exit__(None, None, None)
        self.watching = watch_network(backbone, self._called)
        self.watching.__enter__()

    def announce(self, outcome: Any) -> None:
        """Begin a photo: print its plan above the bar."""
        batch = outcome.plan.batch if self.batch == AUTO and outcome.plan is not None else self.batch
        self.pace = PhotoPace(outcome.plan, batch)
        self.say(outcome.line())

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not self.bar.disable:
            self.bar.write(line, file=sys.stderr)

    def __call__(self, step: dict) -> None:
        self.pace.count_step(step)
        # Reading a number waits for an accelerator, so that it is done for the eye alone.
        if "residual" in step and not self.bar.disable and time.perf_counter() - self.noted > self.SECONDS:
            self.note, self.noted = f", residual={float(step['residual'].mean()):.3g}", time.perf_counter()
        self._show()

    def follow(self, outcomes: Iterable[Any]) -> Iterator[Any]:
        """Yield the outcomes of the files as they come; those that cost nothing are no part of the run."""
        for outcome in outcomes:
            if outcome.skipped or outcome.error is not None:
                self.files -= 1
            else:
                self.done += 1
            self.pace = PhotoPace()
            yield outcome

    def _called(self) -> None:
        self.pace.count_call()
        self._show()

    def _show(self) -> None:
        rest, files = self.pace.format_left(), max(1, self.files)
        of = f" for photo {self.done + 1} of {self.files}" if rest and self.files > 1 else ""
        self.bar.set_postfix_str(f"{rest}{of}{self.note}".removeprefix(", "), refresh=False)  # tqdm adds a comma
        self.bar.update(min(1.0, (self.done + self.pace.share) / files) - self.bar.n)

    def __enter__(self) -> Progress:
        self.watching.__enter__()
        return self

    def __exit__(self, *failed: Any) -> None:
        self.watching.__exit__(*failed)
        self.bar.close()
