"""SAG against its algorithm, written out in float64, and the official predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from weak_passes import MIDDLE, blur_matrix, double_adm, maps_of, relative, weak_of

from restore.backbones.adm import ADM
from restore.backbones.schedule import Schedule
from restore.backbones.sizes import Sized, make_blend_weights
from restore.guidance import SAG, estimator

GOLDEN = Path(__file__).parent.parent / "golden"


def test_sag_is_the_official_one():
    golden = load_file(GOLDEN / "pag_eps.safetensors")
    case = json.loads((GOLDEN / "pag_eps.json").read_text())["sag"]["sag"]
    model = ADM.load(GOLDEN / "nets/adm_a.safetensors", head_channels=16)
    guidance = SAG(case["guide_scale"] - 1, "m1", case["threshold"], case["blur_sigma"], case["kernel_size"])
    t = int(golden["sag.t"])
    with torch.no_grad(), estimator(model, guidance) as estimate:
        strong, eps = estimate(golden["sag.x_t"], t)
    assert relative(strong.eps, golden["sag.eps"]) < 1e-5
    assert relative(eps, golden["sag.guided_eps"]) < 1e-5
    assert relative(weak_of(SAG(1.0), model, golden["sag.x_t"], t), golden["sag.eps_degraded"]) < 1e-5  # the defaults


@pytest.mark.parametrize("size", [(32, 32), (32, 16)])
@pytest.mark.parametrize("layers, heads", [("m1", slice(None)), ("m1:1", [1]), ("i7:0,2", [0, 2])])
def test_sag(model, x, size, layers, heads):
    x = x[..., : size[0], : size[1]]
    t = 300
    path = MIDDLE if layers.startswith("m1") else next(p for p, a in model.attention.items() if a.short == "i7")
    strong, maps, grid = maps_of(model, x, t, path)
    received = maps[:, heads].mean(1).sum(1)
    assert torch.allclose(received.mean(1), torch.ones(2, dtype=torch.float64))
    mask = (received > 0.98).view(2, 1, *grid).repeat_interleave(size[0] // grid[0], 2)
    mask = mask.repeat_interleave(size[1] // grid[1], 3)
    assert 0 < float(mask.double().mean()) < 1
    x0 = strong.x0.clamp(-1, 1)
    rows, columns = (blur_matrix(n, 3, 2.0) for n in size)
    blurred = torch.einsum("ij,bcjk,lk->bcil", rows, x0, columns)
    a = Schedule.from_config({}).alphas_cumprod[t]
    degraded = a.sqrt() * torch.where(mask, blurred, x0) + (1 - a).sqrt() * strong.eps
    with torch.no_grad():
        expected = model.predict(degraded, t).eps
    got = weak_of(SAG(1.0, layers, threshold=0.98, sigma=2.0, taps=7), model, x, t)
    assert relative(got, expected) < 1e-12 and relative(expected, strong.eps) > 1e-4


def test_sag_on_windows_blends_their_attention(model, x):
    """At 32 x 48 with windows of 32: the mask is where the blended attention is above the threshold."""
    x = torch.cat([x, x.flip(-1)[..., :16]], dim=-1)
    small = double_adm(resolution=32)
    prior = Sized(small, 32, 48, max_windows=2)  # one window of the two images in each call
    strong, got = prior.predict(x, 300), weak_of(SAG(1.0, sigma=2.0, taps=7), prior, x, 300)
    received, weights = torch.zeros(2, 1, 32, 48, dtype=torch.float64), make_blend_weights([0, 16], 32, 48).double()
    for start, weight in zip([0, 16], weights, strict=True):
        _, maps, grid = maps_of(small, x[..., start : start + 32], 300)
        seen = maps.mean(1).sum(1).view(2, 1, *grid)
        received[..., start : start + 32] += F.interpolate(seen, (32, 32)) * weight
    x0 = strong.x0.clamp(-1, 1)
    blurred = torch.einsum("ij,bcjk,lk->bcil", blur_matrix(32, 3, 2.0), x0, blur_matrix(48, 3, 2.0))
    a = Schedule.from_config({}).alphas_cumprod[300]
    with torch.no_grad():
        expected = prior.predict(
            a.sqrt() * torch.where(received > 1, blurred, x0) + (1 - a).sqrt() * strong.eps, 300
        ).eps
    assert relative(got, expected) < 1e-6  # the windows' weights are float32
    assert relative(got, weak_of(SAG(1.0, sigma=2.0, taps=7), Sized(small, 32, 48, max_windows=4), x, 300)) < 1e-6
