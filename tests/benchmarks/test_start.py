"""The waits of a person at a terminal: seen in order, and compared with another checkout's."""

import pytest

from benchmarks.start import FIRST, RESULT, STEP, Waits, format_waits, time_command
from operators import RestoreError


def test_the_first_line_comes_at_once_and_before_the_result():
    waits = time_command(["--help"])
    assert 0 < waits.clock[FIRST] <= waits.clock[RESULT] and STEP not in waits.clock
    assert 0.05 < waits.processor[RESULT] < 1.5  # what torch alone takes


def test_a_command_that_fails_is_no_measurement():
    with pytest.raises(RestoreError, match="no such thing"):
        time_command(["models", "show", "no such thing"])


def test_the_other_checkout_is_what_runs(tmp_path):
    (tmp_path / "restore" / "app").mkdir(parents=True)
    for package in ("restore", "restore/app"):
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "restore" / "app" / "cli.py").write_text("import sys; sys.exit(f'another, {sys.argv[1]}')")
    with pytest.raises(RestoreError, match="another, models"):
        time_command(["models"], tmp_path)


def test_medians_and_ratios():
    def repeats(*seconds):
        return [Waits({FIRST: s, RESULT: 10 * s}, {RESULT: 5 * s}) for s in seconds]

    text = format_waits({("photo", ""): repeats(1, 9, 2), ("photo", "before"): repeats(4, 4, 8)})
    assert "| photo | first line | 2.0 | - | 4.0 | - | 0.50 | - |" in text
    assert "| photo | result | 20.0 | 10.0 | 40.0 | 20.0 | 0.50 | 0.50 |" in text
