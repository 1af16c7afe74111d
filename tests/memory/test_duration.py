"""How long it takes, for people: ranges that hold on a busy machine, corrected by the work done."""

import numpy as np
import pytest

from restore.memory import duration
from restore.memory.duration import Pace, format_duration, format_range


@pytest.mark.parametrize("seconds, text", [(0.2, "1 s"), (99, "99 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations_for_people(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    "low, high, text",
    [
        (0, 3, "5 seconds"),
        (0.2, 7, "1 to 8 seconds"),
        (11, 19, "10 to 20 seconds"),
        (41, 85, "40 to 90 seconds"),
        (130, 290, "2 to 5 minutes"),
        (30, 100, "0.5 to 2 minutes"),
        (60, 60, "60 seconds"),
        (120, 120, "2 minutes"),
        (4000, 9000, "1 to 3 hours"),
        (3600, 90 * 3600, "1 to 90 hours"),
        (400_000, 500_000, "90 to 139 hours"),
    ],
)
def test_ranges_for_people(low, high, text):
    assert format_range(low, high) == text


def test_other_programs_may_stop():
    (low, high), (lower, same) = duration.widen(100), duration.widen(100, busy=1.8)
    assert low < 100 < high == same and lower == pytest.approx(low / 1.8)
    assert duration.widen(100, busy=9)[0] == pytest.approx(low / 2)  # a range of which one can make something


def walk(slowdowns, expected=None):
    """Work of equal parts, each of as many seconds as `slowdowns` says; what is said before each, and the truth."""
    clock = [0.0]
    pace = Pace(expected, now=lambda: clock[0])
    for k, seconds in enumerate(slowdowns):
        yield pace.left(), sum(slowdowns[k:])
        clock[0] += seconds
        pace.advance((k + 1) / len(slowdowns))


def test_the_plan_is_believed_until_something_is_done():
    (first, _), *_ = walk([10.0] * 100, expected=(50, 200))
    assert first == (50, 200)
    clock = [0.0]
    pace = Pace((50, 200), now=lambda: clock[0])
    clock[0] = 60
    assert pace.left() == (0, 140)
    clock[0] = 300
    assert pace.left() is None and Pace().left() is None


@pytest.mark.parametrize("planned", [(10, 30), (5000, 9000)], ids=["too short", "too long"])
def test_a_wrong_plan_is_corrected_by_the_first_parts(planned):
    said = list(walk([10.0] * 100, expected=planned))
    assert all(low <= truth <= high for (low, high), truth in said[1:])
    assert said[1][0][1] < 2 * said[1][1] and all(high < 1.3 * truth for (_, high), truth in said[10:])


def test_a_machine_that_becomes_busy_or_idle_is_noticed():
    for slowdowns in ([1.0] * 50 + [3.0] * 50, [3.0] * 50 + [1.0] * 50):
        said = list(walk(slowdowns))[65:]  # nobody knows at once that it stays so
        held = [low <= truth <= high for (low, high), truth in said]
        assert np.mean(held) > 0.9  # the range holds both the average and the recent pace
    noisy = np.random.default_rng(0).uniform(0.5, 1.5, 100).tolist()
    assert np.mean([low <= truth <= high for (low, high), truth in list(walk(noisy))[10:]]) > 0.9
