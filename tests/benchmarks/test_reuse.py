"""Weak passes in every k-th evaluation, beside those in all."""

import pytest

from benchmarks import reuse
from operators import RestoreError


def cells_of(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_ratios_are_of_one_face_and_differences_paired():
    def rows(seconds, psnr, lpips):
        columns = zip(seconds, psnr, lpips, strict=True)
        return [{"seconds": s, "psnr": p, "lpips": d, "nfe": 3} for s, p, d in columns]

    found = {
        reuse.PLAIN: rows((1.0, 2.0, 4.0), (30.0, 31.0, 32.0), (0.1, 0.2, 0.3)),
        "every=1": rows((2.0, 3.0, 5.0), (29.0, 30.0, 31.0), (0.2, 0.3, 0.4)),
        "every=2": rows((1.5, 2.5, 4.5), (28.5, 29.5, 30.5), (0.3, 0.4, 0.5)),
    }
    plain, first, second = (cells_of(line) for line in reuse.format_table(found).splitlines()[2:])
    assert plain[2] == "1.00" and plain[5] == "+1.000 (+1.000 to +1.000)"
    assert first[2:] == ["1.50", "30.00", "0.3000", "–", "–"]
    assert second[2:] == ["1.25", "29.50", "0.4000", "-0.500 (-0.500 to -0.500)", "+0.1000 (+0.1000 to +0.1000)"]


@pytest.mark.parametrize("every", ["2,4", "1,0", "1;2", "1,-2", ""])
def test_lists_that_are_none_are_refused(every):
    with pytest.raises(RestoreError, match="every must be"):
        reuse.measure_reuse(every=every)


def test_a_run_counts_weak_passes():
    lines = reuse.measure_reuse(limit=1, steps=3, every="1,2").splitlines()[2:]
    assert [cells_of(line)[:2] for line in lines] == [["no PAG", "3"], ["every=1", "6"], ["every=2", "5"]]
    assert cells_of(lines[1])[3] != cells_of(lines[2])[3] != "nan"
