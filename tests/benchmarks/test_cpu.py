"""Restorations timed beside another checkout's."""

import pytest
import torch

from benchmarks import cpu
from benchmarks.measure import parse_settings
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


def test_options_are_those_of_the_command_line():
    settings = parse_settings(cpu.measure_cpu, ["cases=face", "options=precision=auto,lean=false"])
    assert cpu.parse_options(settings["options"]) == {"precision": "auto", "lean": False}
    with pytest.raises(RestoreError, match="options must be key=value"):
        cpu.parse_options("lean")


def test_unknown_cases_are_refused():
    with pytest.raises(RestoreError, match="unknown case"):
        cpu.measure_cpu("face,nose")


@pytest.mark.slow
def test_two_processes_are_asked_in_turn():
    table = cpu.measure_cpu("noise", repeats=1, side=32, options="lean=false")
    now, own = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:])
    assert (now[1], own[1]) == ("now", "lean=false") and now[5] == own[5]
    assert 0 < float(now[4]) < 1.5 and float(now[2]) > 0


def test_arithmetic_of_a_gradient_is_counted():
    """Of DPS, whose x_t is a leaf; a layer's product takes 2 m n k, its gradient by the input as much."""
    layer, x = torch.nn.Linear(8, 4), torch.randn(3, 8)
    layer.requires_grad_(False)
    with torch.no_grad():
        assert cpu.count_flops(lambda: layer(x)) == 2 * 3 * 8 * 4
    x.requires_grad_()
    assert cpu.count_flops(lambda: torch.autograd.grad(layer(x).square().sum(), x)) == 2 * 2 * 3 * 8 * 4
