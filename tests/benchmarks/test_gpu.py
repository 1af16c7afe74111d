"""The GPU's benchmark on a CPU, with tiny networks: every method, resumed, and what there was no time for."""

import json

import pytest
import torch

from benchmarks import gpu
from operators import RestoreError


def test_the_whole_command_on_a_cpu(tmp_path):
    """All methods are measured, a killed run goes on, and a cell that fails does not stop the others."""
    out = tmp_path / "gpu.jsonl"
    first = gpu.measure_gpu(out=str(out), device="cpu", tiny=True, only="fp32, batch 2, eager")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["method"] for row in rows] == list(gpu.METHODS)
    for row in rows:
        assert "error" not in row and row["seconds_step"] > 0 and 0 < row["share"] < 2, row
        assert row["images_hour"] == pytest.approx(7200 / row["seconds_step"] / gpu.METHODS[row["method"]][1])
    by_method = {row["method"]: row["tflops"] * row["seconds_step"] for row in rows}
    assert by_method["DPS"] < by_method["DPS + PAG"] < 2 * by_method["DPS"]
    out.write_text(out.read_text()[:-20])  # killed while it wrote the last row
    second = gpu.measure_gpu(out=str(out), device="cpu", tiny=True, only="fp32, batch 2, eager")
    again = [row["method"] for row in gpu.read_rows(out)]
    assert again == list(gpu.METHODS) and second.splitlines()[:-1] == first.splitlines()[:-1]


def test_what_there_was_no_time_for_is_named(tmp_path):
    table = gpu.measure_gpu(minutes=0, out=str(tmp_path / "none.jsonl"), device="cpu", tiny=True)
    assert "left out for want of time: DPS, fp32, batch 2, eager; DPS, bf16" in table
    with pytest.raises(RestoreError, match="minutes"):
        gpu.measure_gpu(minutes=-1)


def test_cells_are_complete_and_the_goals_come_first():
    cells = gpu.list_cells(tiny=False)
    assert len(cells) == len(set(cells)) and cells[: len(gpu.FIRST)] == gpu.FIRST
    for method, (_, steps) in gpu.METHODS.items():
        ways = ("eager",) if "written" in method else ("eager", "compiled")
        own = {(cell.precision, cell.batch, cell.way) for cell in cells if cell.method == method}
        assert {(p, b, w) for p in gpu.PRECISIONS for b in gpu.BATCHES for w in ways} <= own and steps in (100, 1000)


def test_an_error_is_a_row(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    monkeypatch.setattr(gpu, "dps", fail)
    row = gpu.Bench(torch.device("cpu"), tiny=True).measure(gpu.Cell("DPS", "fp32", 1))
    assert row["error"] == "out of memory" and "out of memory" in gpu.format_rows([row])[-1]


def test_precision_is_as_it_was_afterwards():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with gpu.set_precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.slow
def test_compiled_cells(tmp_path):
    out = tmp_path / "gpu.jsonl"
    gpu.measure_gpu(out=str(out), device="cpu", tiny=True, only="compiled")
    (row,) = gpu.read_rows(out)
    assert row["way"] == "compiled" and "error" not in row
