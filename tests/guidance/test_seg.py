"""SEG: attention of queries blurred on the grid of tokens, in float64."""

from __future__ import annotations

import pytest
import torch
from weak_passes import MIDDLE, blur_matrix, relative

from operators import RestoreError
from restore.guidance import PAG, AttentionRecord, estimator
from restore.guidance import targets as T


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6)])
@pytest.mark.parametrize("sigma", [0.4, 1.5, 40.0])
def test_seg(grid, sigma):
    """Attention of the queries blurred on the grid, in float64; the kernel ends at half of the grid's side."""
    n, generator = grid[0] * grid[1], torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    reach = [min(-(-6 * sigma // 1) // 2, side // 2) for side in grid]
    rows, columns = (blur_matrix(side, int(r), sigma) for side, r in zip(grid, reach, strict=True))
    image = torch.einsum("ij,bhjkd,lk->bhild", rows, q.unflatten(2, grid), columns).flatten(2, 3)
    expected = (image @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v
    assert relative(T.find_target({"seg": {"sigma": sigma}})(AttentionRecord(q, k, v, grid=grid)), expected) < 1e-12
    # In joint attention the text's queries stay.
    text = torch.randn(2, 3, 2, 8, generator=generator, dtype=torch.float64)
    joined = [torch.cat([text, part], dim=2) for part in (q, k, v)]
    expected = (torch.cat([text, image], dim=2) @ joined[1].transpose(-2, -1) / 8**0.5).softmax(-1) @ joined[2]
    record = AttentionRecord(*joined, grid=grid, image=slice(2, n + 2))
    assert relative(T.seg(sigma)(record), expected) < 1e-12


def test_seg_knows_the_grid_of_a_network(model, x):
    """In the network, at a size that is not square; without end it is the mean query."""
    x = x[..., :24]
    items = PAG(1.0, "m1", target={"seg": {"sigma": 0.7}}).perturbed_layers(model)
    attn, grid = model.attention[MIDDLE].module, []
    true, seen = items[0].target, []
    with torch.no_grad(), estimator(model, PAG(1.0, "m1", target=lambda a: seen.append(a) or true(a))) as estimate:
        eps = estimate(x, 300)[1]
    grid = seen[0].grid
    assert grid[0] * grid[1] == seen[0].q.shape[2] and grid[0] != grid[1] and attn.heads == seen[0].q.shape[1]
    q = torch.einsum(
        "ij,bhjkd,lk->bhild", blur_matrix(grid[0], 2, 0.7), seen[0].q.unflatten(2, grid), blur_matrix(grid[1], 1, 0.7)
    )
    expected = (q.flatten(2, 3) @ seen[0].k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ seen[0].v
    with torch.no_grad(), estimator(model, PAG(1.0, "m1", target=lambda a: expected)) as estimate:
        assert relative(estimate(x, 300)[1], eps) < 1e-12
    with torch.no_grad(), estimator(model, PAG(1.0, "m1", target="seg")) as estimate:
        infinite = estimate(x, 300)[1]
    with torch.no_grad(), estimator(model, PAG(1.0, "m1", target="mean_query")) as estimate:
        assert torch.equal(estimate(x, 300)[1], infinite) and relative(infinite, eps) > 1e-6


def test_seg_without_a_grid():
    with pytest.raises(RestoreError, match="grid of image tokens"):
        T.seg(2.0)(AttentionRecord(*[torch.zeros(1, 1, 4, 2)] * 3))
