"""deepinv's samplers on our prior, with the real library."""

import sys

import pytest
import torch

pytest.importorskip("deepinv")


from benchmarks.against import ROWS, TASKS, Comparison, compare_with_deepinv, main, make_denoiser
from operators import RestoreError
from restore import load
from restore.metrics.single import psnr


@pytest.fixture(scope="module")
def restorer():
    return load("embedded", device="cpu", offline=True)


@pytest.fixture(params=TASKS)
def comparison(request, restorer):
    comparison = Comparison(request.param, restorer)
    yield comparison
    comparison.close()


def test_both_solve_the_same_problem(comparison):
    """Their physics, on [0, 1], is our operator: in A and in its proximal step."""
    physics, x = comparison.make_physics(), (comparison.truth + 1) / 2
    y = comparison.operator.A(x.flip(3))
    assert torch.allclose(physics.A(x), comparison.operator.A(x), atol=1e-5)
    assert torch.allclose(physics.prox_l2(x, y, 7.0), comparison.operator.prox_l2(x, y, 7.0), atol=1e-5)


def test_the_prior_denoises_as_theirs(comparison):
    """D(x + sigma n, sigma) on [0, 1] is nearer to x than what it was given, by far, and the identity at sigma 0."""
    denoise, x = make_denoiser(comparison.prior), (comparison.truth + 1) / 2
    noisy = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (denoise(noisy, 0.1) - x).square().mean() < (noisy - x).square().mean() / 5
        assert torch.allclose(denoise(noisy, torch.zeros(1)), noisy, atol=1e-5)


def test_both_restore(comparison):
    """With the requested number of calls, both come closer to the truth than mid-grey."""
    grey = float(psnr(torch.zeros_like(comparison.truth), comparison.truth))
    for side in comparison.make_both("diffpir", 1.0):
        seconds, image = comparison.time_calls(side, 10, 0)
        assert len(seconds) == 9 and min(seconds) > 0
        assert image.shape == comparison.truth.shape and float(psnr(image, comparison.truth)) > grey + 5


@pytest.mark.slow
def test_the_table_has_every_row():
    text = compare_with_deepinv(evaluations=3, dps_evaluations=3, repeats=1, samples=1, memory=False)
    head, *table = [line.split(" | ") for line in text.splitlines() if " | " in line]
    assert [tuple(row[:2]) for row in table] == ROWS
    for row in table:
        *positive, ours, theirs = (float(cell) for cell in row[2:])
        assert len(row) == len(head) and min(positive) > 0
        assert 0 < ours <= 1 and abs(theirs) <= 1  # after three evaluations an SSIM may be anything
    assert all(f"- {sampler}: theirs" in text for _, sampler in ROWS)
    with pytest.raises(RestoreError, match="evaluations=1"):
        compare_with_deepinv(evaluations=1)


def test_mistakes_end_with_one_line(monkeypatch):
    for arguments, message in [
        (["deepin"], "did you mean 'deepinv'"),
        (["deepinv", "sizes=3"], "sizes"),
        (["deepinv", "repeats=many"], "repeats"),
        (["deepinv", "repeats"], "key=value, got repeats"),
    ]:
        with pytest.raises(SystemExit, match=message):
            main(arguments)
    monkeypatch.setitem(sys.modules, "deepinv", None)
    with pytest.raises(RestoreError, match="deepinv is not installed"):
        compare_with_deepinv()
