"""Restorations timed beside another checkout's."""

import pytest

from benchmarks import cpu
from operators import RestoreError


def test_a_row_for_each_variant_with_its_share_of_the_peak():
    answers = {"now": [2.0, 4.0, 3.0], "before": [4.0, 6.0, 5.0]}
    found = {
        which: [{"seconds": s, "peak": 50.0, "gflop": 75.0, "psnr": 30.0} for s in seconds]
        for which, seconds in answers.items()
    }
    now, before = ([cell.strip() for cell in row.split("|")[1:-1]] for row in cpu.format_rows("face", found))
    assert now == ["face", "now", "3.00", "1.00", "0.50", "30.000"]
    assert before == ["face", "before", "5.00", "0.60", "0.30", "30.000"]


def test_names_of_cases_may_hold_commas():
    assert cpu._split("face,dps+pag, every=2,sr4") == ["face", "dps+pag, every=2", "sr4"]
    with pytest.raises(RestoreError, match="unknown case"):
        cpu.measure_cpu("face,nose")


@pytest.mark.slow
def test_two_processes_are_asked_in_turn():
    table = cpu.measure_cpu("noise", repeats=1, side=32, options='{"lean": false}')
    now, own = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:])
    assert (now[1], own[1]) == ("now", '{"lean": false}') and now[5] == own[5]
    assert 0 < float(now[4]) < 1.5 and float(now[2]) > 0
