"""Autoguidance and SWG against the weaker model and the windows, in float64."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from weak_passes import relative, weak_of

import operators
import restore
from operators import RestoreError
from restore import zoo
from restore.backbones.adm import ADM
from restore.backbones.sizes import Sized, make_blend_weights, place_windows
from restore.guidance import SWG, Autoguidance, build_guidance, describe_guidance, estimator


def test_autoguidance(model, x, tiny_adm, monkeypatch):
    weak = ADM.load(tiny_adm)
    weak.network.double()
    with torch.no_grad():
        expected = weak.predict(x, 250).eps
        assert relative(weak_of(Autoguidance(1.0, weak), model, x, 250), expected) < 1e-12
        # One with other noise levels is asked where they are the same.
        other = ADM(weak.network, schedule="cosine")
        t = other.schedule.t(model.schedule.ratio(250))
        assert abs(t - 250) > 10
        expected = other.predict(x, t).eps
        assert relative(weak_of(Autoguidance(1.0, other), model, x, 250), expected) < 1e-12
    guidance = Autoguidance(1.0, tiny_adm)  # a folder
    loads, load = [], zoo.load_backbone
    monkeypatch.setattr(zoo, "load_backbone", lambda *args, **options: loads.append(args) or load(*args, **options))
    with estimator(model, guidance), estimator(model, guidance):
        assert len(loads) == 1
    assert build_guidance(describe_guidance(guidance)).terms == (guidance,)


def test_a_label_goes_only_to_a_model_with_classes(tiny_adm):
    """CFG from two models, a class-conditional and an unconditional one (PAG, Ahn et al. 2024, App. E.1, Fig. 41)."""
    unconditional = ADM.load(tiny_adm)
    config = {**unconditional.network.config, "num_class_embeds": 3}
    torch.manual_seed(1)
    conditional, other = (ADM(UNet2DModel.from_config(config)) for _ in range(2))
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    for prior in (conditional, Sized(conditional, *x.shape[-2:])):
        with torch.no_grad(), estimator(prior, Autoguidance(3.0, unconditional)) as estimate:
            strong, eps = estimate(x, 250, labels)
            c, u = conditional.predict(x, 250, labels).eps, unconditional.predict(x, 250).eps
        assert relative(strong.eps, c) < 1e-6 and relative(eps, c + 3.0 * (c - u)) < 1e-5
    with torch.no_grad():  # one with classes gets them
        with estimator(conditional, Autoguidance(3.0, other)) as estimate:
            _, eps = estimate(x, 250, labels)
        assert relative(eps, c + 3.0 * (c - other.predict(x, 250, labels).eps)) < 1e-5


def test_autoguidance_by_the_model_itself_changes_nothing(x, tiny_adm):
    model = ADM.load(tiny_adm)
    with torch.no_grad(), estimator(model, Autoguidance(3.0, str(tiny_adm))) as estimate:
        strong, eps = estimate(x.float(), 250)
    assert torch.equal(eps, strong.eps)


def test_swg(x, tiny_adm):
    model = ADM.load(tiny_adm)
    model.network.double()
    x = x[..., :16, :12]
    starts = {n: place_windows(n, 8, 4) for n in (16, 12)}
    rows, columns = (make_blend_weights(starts[n], 8, n).double() for n in (16, 12))
    expected = torch.zeros_like(x)
    with torch.no_grad():
        for top, w in zip(starts[16], rows, strict=True):
            for left, v in zip(starts[12], columns, strict=True):
                eps = model.predict(x[..., top : top + 8, left : left + 8], 250).eps
                expected[..., top : top + 8, left : left + 8] += w[:, None] * v * eps
    assert len(starts[16]) == 3 and relative(weak_of(SWG(1.0, 8), Sized(model, 16, 12), x, 250), expected) < 1e-6
    assert relative(weak_of(SWG(1.0, 8), model, x, 250), expected) < 1e-6


def test_an_offline_prior_downloads_no_weaker_model(tiny_adm, monkeypatch):
    asked = []

    def fetch(entry, offline, *rest):
        asked.append(offline)
        raise RestoreError("asked")

    monkeypatch.setattr(zoo.store, "_pull_file", fetch)
    for name in ("RESTORE_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    operator, guidance = operators.Denoising(noise=operators.GaussianNoise(0.1)), Autoguidance(1.0, "adm-imagenet-64")
    for offline in (True, False):
        prior = restore.load(tiny_adm, device="cpu", offline=offline)
        method = prior.method(operator, guidance=guidance, sampler="dps", steps=2)
        with pytest.raises(RestoreError, match="asked"):
            prior.protocol(operator, method)
        with pytest.raises(RestoreError, match="asked"):
            prior.generate(1, guidance=guidance, steps=2)
    assert asked == [True, True, False, False]
