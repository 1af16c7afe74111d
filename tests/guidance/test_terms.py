"""Every guidance with samplers, windows, prefixes, combinations and pipelines; mistakes."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_sd import tiny_unet
from weak_passes import latent_prior, relative

import operators
from operators import RestoreError
from restore.backbones.adm import ADM
from restore.backbones.base import normalise
from restore.backbones.sizes import Sized
from restore.guidance import (
    PAG,
    SAG,
    SLG,
    SSG,
    SWG,
    TPG,
    TSG,
    Autoguidance,
    build_guidance,
    describe_guidance,
    estimator,
)
from restore.guidance.pipelines import guided
from restore.samplers.dps import dps
from restore.samplers.generate import generate
from restore.samplers.noise import ImageNoise

TERMS = {
    "sag": "{sag: {scale: %s, threshold: 0.99, sigma: 2, taps: 5}}",
    "seg": "{pag: {scale: %s, layers: m1, target: {seg: {sigma: 1}}}}",
    "tpg": "{tpg: {scale: %s, layers: m1, noise: 2}}",
    "tsg": "{tsg: {scale: %s, s: 1}}",
    "autoguidance": "{autoguidance: {scale: %s, model: WEAK}}",
    "swg": "{swg: {scale: %s, window: 8}}",
    "slg": "{slg: {scale: %s, layers: m1}}",
    "ssg": "{ssg: {scale: %s, share: 0.1}}",
}


def configured(name, scale, weak):
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(OmegaConf.create("[" + TERMS[name] % scale + "]"))
    if name == "autoguidance":
        config[0][name]["model"] = str(weak)
    return config


@pytest.fixture(scope="module")
def weaker(tmp_path_factory):
    """An earlier checkpoint, so to speak: the tiny network with other weights."""
    from diffusers import UNet2DModel

    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("weaker")
    network = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8),
        layers_per_block=1,
        out_channels=6,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    ADM(network).save(folder)
    return folder


def state_of(network):
    return [dict(module.__dict__) for module in network.modules()]


@pytest.mark.parametrize("name", TERMS)
def test_every_term_with_sampler_windows_prefix_and_combination(name, tiny_adm, weaker):
    model = ADM.load(tiny_adm)
    before = state_of(model.network)
    config = configured(name, 1.5, weaker)
    guidance = build_guidance(config)
    assert build_guidance(json.loads(json.dumps(describe_guidance(guidance)))) == guidance

    # Generation beyond the network's size, and a sampler that differentiates through it.
    def run(guidance, size=(16, 24)):
        prior = Sized(model, *size, recompute_windows=True)
        noise = ImageNoise([(0, "a", 0), (0, "b", 0)])
        generated = generate(prior, 2, noise=noise, steps=3, guidance=guidance)
        operator = operators.SuperResolution(2)
        y = operator.A(torch.zeros(2, 3, *size))
        return generated, dps(prior, operator, y, noise=noise, steps=2, zeta=0.1, guidance=guidance), prior.evaluations

    plain, off, on = run(None), run(build_guidance(configured(name, 0, weaker))), run(guidance)
    assert torch.equal(plain[0], off[0]) and torch.equal(plain[1], off[1]) and plain[2] == off[2] == 5
    assert on[2] == 10 and torch.isfinite(on[1]).all()
    assert all(relative(a, b) > 1e-5 for a, b in zip(on[:2], plain[:2], strict=True))

    # The same bits with and without a shared prefix, another combination, and an image without company.
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for share in (True, False):
        with torch.no_grad(), estimator(model, guidance, share_prefix=share) as estimate:
            results += [estimate(x, 500)[1] for _ in range(2)]
            if share and name in ("seg", "tpg", "slg", "ssg"):
                assert estimate.tapes[0].queues  # something is taken from the strong pass
    assert all(torch.equal(eps, results[0]) for eps in results)
    with torch.no_grad(), estimator(model, guidance) as estimate:
        assert relative(estimate(x[1:], 500)[1], results[0][1:]) < 1e-5
    with torch.no_grad(), estimator(model, build_guidance([*config, {"combine": "apg"}])) as estimate:
        assert relative(estimate(x, 500)[1], results[0]) > 1e-6
    with torch.no_grad(), estimator(normalise(Sized(model, 16, 16), "vp"), guidance) as estimate:
        assert relative(estimate(x, 500)[1], results[0]) < 1e-5

    # A weak pass that fails leaves the network as it was.
    class Failing(ADM):
        def predict(self, x_t, t, condition=None):
            prediction = super().predict(x_t, t, condition)
            if not torch.is_grad_enabled():
                raise KeyError
            return prediction

    failing = Failing(model.network)
    if name != "autoguidance":
        with pytest.raises(KeyError), estimator(failing, guidance) as estimate:
            estimate(x, 500)
    assert state_of(model.network) == before


@pytest.mark.parametrize("name", [name for name in TERMS if name != "autoguidance"])
def test_latents(name):
    model = latent_prior()
    config = configured(name, 1.5, None)
    config[0].get("swg", {})["window"] = 16
    z = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prior = Sized(model, 32, 48)
    with torch.no_grad(), estimator(prior, build_guidance(config)) as estimate:
        strong, eps = estimate(z, 400)
    assert eps.shape == z.shape and relative(eps, strong.eps) > 1e-6


def test_inside_a_pipeline(tiny_adm):
    """Terms that change the network work there; those that need clean estimates or images raise an error."""
    unet = tiny_unet()
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = unet(x, 400, text).sample
        for guidance in (
            TPG(1.0, "m1"),
            SLG(1.0, "m1"),
            SSG(1.0),
            TSG(1.0, alpha=0.0),
            PAG(1.0, "m1", target={"seg": {"sigma": 1.0}}),
        ):
            with guided(unet, guidance):
                assert relative(unet(x, 400, text).sample, plain) > 1e-6
        assert torch.equal(unet(x, 400, text).sample, plain)
    for guidance in (SAG(1.0), Autoguidance(1.0, str(tiny_adm)), SWG(1.0, 8)):
        with pytest.raises(RestoreError, match="needs clean estimates"), guided(unet, guidance):
            pass
    with pytest.raises(RestoreError, match="noise levels are unknown"), guided(unet, TSG(1.0)):
        pass


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: SAG(1.0, "i7,m1"), "one attention layer, got 2"),
        (lambda: SAG(1.0, taps=4), "taps of sag must be .* odd"),
        (lambda: SAG(1.0, sigma=0), "sigma of sag must be .*> 0"),
        (lambda: TPG(1.0, "m1:0"), "layers of tpg must name no heads"),
        (lambda: SLG(1.0, "m1:0"), "layers of slg must name no heads"),
        (lambda: SSG(1.0, share=0.6), r"share of ssg must be a number in \(0, 0.5\], got 0.6"),
        (lambda: TSG(1.0, s=0), "s > 0 or a shift"),
        (lambda: SWG(1.0, 12), "window of swg must be below 64 and a multiple of 8"),
        (lambda: SWG(1.0, 64), "window of swg must be below 64 and a multiple of 8"),
        (lambda: Autoguidance(1.0, "no-such-model"), "no-such-model"),
        (
            lambda: Autoguidance(1.0, latent_prior()),
            "3 channels at 1/1 .*, got StableDiffusion with 4 channels at 1/4",
        ),
        (lambda: PAG(1.0, "m1", target={"seg": {"sigma": 0}}), "sigma of target seg must be a number > 0, got 0"),
        (lambda: PAG(1.0, "m1", target={"seg": {"sgima": 1}}), "target seg has no option 'sgima'; did you mean"),
        (lambda: PAG(1.0, "m1", target={"identity": {"sigma": 1}}), "unknown target with options 'identity'"),
        (
            lambda: build_guidance({"sag": {"scale": 1, "layer": "m1"}}),
            "guidance.sag has no option 'layer'; did you mean 'lay",
        ),
        (lambda: build_guidance({"autoguidance": {"scale": 1}}), "needs the option 'model'"),
    ],
)
def test_mistakes(model, make, match):
    with pytest.raises(RestoreError, match=match) as error, estimator(model, make()):
        pass
    assert "\n" not in str(error.value)
