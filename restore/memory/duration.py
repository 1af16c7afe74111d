"""Durations for people: how long something takes, as a range, and how long the rest of it takes."""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Callable

# What a plan's seconds are worth: shares of them. Network calls vary in length, and processors in speed.
FASTER, SLOWER = 0.7, 1.5
MOST_RELIEF = 2.0
UNITS = (("second", 1), ("minute", 60), ("hour", 3600))
ROUND = (0.5, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 75, 90)


def format_duration(seconds: float) -> str:
    """Return a duration for people: "12 s", "3 min", "2.1 h"."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def format_range(low: float, high: float) -> str:
    """Return a range of seconds for people, rounded outwards: "2 to 5 minutes", "40 to 90 seconds"."""
    if high < 5:
        return "5 seconds"
    name, unit = next((name, unit) for name, unit in reversed(UNITS) if high >= 1.5 * unit)
    least = max((n for n in ROUND if n * unit <= low), default=ROUND[1] if unit == 1 else ROUND[0])
    most = next((n for n in ROUND if n * unit >= high), round(high / unit))
    return f"{least:g} to {most:g} {name}s" if least < most else f"{most:g} {name}{'s' * (most != 1)}"


def widen(seconds: float, busy: float = 1.0) -> tuple[float, float]:
    """Return the range in which a plan's seconds, measured at this machine's present pace, will lie.

    busy: how many times faster it would be if the programs stopped that ran when it was made, see Plan. Some may stop;
    that all do at once is not expected.
    """
    return FASTER * seconds / min(busy, MOST_RELIEF), SLOWER * seconds


class Pace:
    """How far something is and how long the rest takes: as planned at first, then at the rate of the work done.

    expected: range of the seconds that it takes, None if unknown. now: the clock.
    """

    def __init__(self, expected: tuple[float, float] | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self.expected, self.now, self.started, self.share = expected, now, now(), 0.0
        self.marks: deque[tuple[float, float]] = deque([(self.started, 0.0)], maxlen=10_000)

    def advance(self, share: float) -> None:
        """Say that this share of the work is done; less than before corrects what was said."""
        if share != self.share:
            while len(self.marks) > 1 and self.marks[-1][1] >= share:
                self.marks.pop()
            self.share = share
            self.marks.append((self.now(), share))

    def left(self) -> tuple[float, float] | None:
        """Return the range of the seconds left, None if nothing is known yet."""
        elapsed, rest = self.now() - self.started, 1 - self.share
        if self.share <= 0:
            if self.expected is None:
                return None
            low, high = (max(seconds - elapsed, 0.0) for seconds in self.expected)
            return (low, high) if high > 0 else None
        # The average tells of all of the work, its end of what the machine does now.
        paces = [elapsed / self.share, *map(self._recent_pace, (elapsed / 4, elapsed / 12))]
        doubt = 1.25 + max(0.0, 0.1 - self.share) * 4  # little work says little
        return rest * min(paces) / doubt, rest * max(paces) * doubt

    def _recent_pace(self, seconds: float) -> float:
        """Return the seconds that all of the work takes at the rate of the last `seconds` of it."""
        last, share = self.marks[-1]
        index = bisect.bisect_right(self.marks, last - seconds, key=lambda mark: mark[0]) - 1
        then, before = self.marks[max(0, min(index, len(self.marks) - 2))]
        return (last - then) / (share - before)
