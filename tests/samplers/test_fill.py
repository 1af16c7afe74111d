"""Holes filled without a network."""

import pytest
import torch

import operators
from operators import RestoreError
from restore.samplers import fill
from restore.samplers.fill import fill_holes
from restore.samplers.steps import reconstruct


def make_plane(height=24, width=31):
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([0.3 * rows, 0.2 * columns, 0.1 * rows - 0.4 * columns])[None].double()


@pytest.mark.parametrize("direct", [fill.DIRECT, 0])
def test_a_plane_goes_on_through_holes(monkeypatch, direct):
    """A plane has no curvature, and its gradient is the least that its border allows: it is the exact answer."""
    monkeypatch.setattr(fill, "DIRECT", direct)
    plane = make_plane()
    mask = torch.ones(1, 1, 24, 31)
    mask[..., 6:15, 8:20] = 0
    filled = fill_holes(plane * mask, mask)
    assert torch.equal(filled * mask, plane * mask)
    assert torch.allclose(filled, plane, atol=1e-6 if direct else 1e-3)


def test_every_image_has_its_own_mask():
    plane = make_plane().expand(2, -1, -1, -1)
    mask = (torch.rand(2, 1, 24, 31, generator=torch.Generator().manual_seed(0)) > 0.4).double()
    filled = fill_holes(plane * mask, mask)
    assert (filled - plane).abs().max() < 0.05 and torch.equal(filled * mask, plane * mask)
    for b in range(2):
        assert torch.equal(filled[b : b + 1], fill_holes((plane * mask)[b : b + 1], mask[b : b + 1]))


def test_only_an_inpainting_has_holes():
    with pytest.raises(RestoreError, match="start_from='fill' fills holes .* SuperResolution"):
        prior = type("Prior", (), {"shape": (3, 8, 8)})
        reconstruct("fill", prior, operators.SuperResolution(2), torch.zeros(1, 3, 4, 4), 0.0)
