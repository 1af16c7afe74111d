"""TAG and TSR: estimates changed without a weak pass, alone, after other terms, in samplers and in pipelines."""

from __future__ import annotations

import pytest
import torch
from tiny_sd import tiny_unet
from weak_passes import relative

import operators
from operators import RestoreError
from restore.backbones.base import Pixels, Prediction
from restore.backbones.schedule import Schedule
from restore.guidance import CFG, PAG, TAG, TSR, Record, build_guidance, describe_guidance, estimator, record_guidance
from restore.guidance.pipelines import guided
from restore.memory.measure import count_weak_passes
from restore.samplers.diffpir import diffpir
from restore.samplers.generate import generate
from restore.samplers.noise import ImageNoise


class Gaussian(Pixels):
    """x_0 ~ N(0, deviation² I), known exactly."""

    channels, resolution, multiple, null_condition, attention, shape = 3, 4, 1, None, {}, (3, 4, 4)

    def __init__(self, deviation):
        self.deviation, self.network = deviation, torch.nn.Identity()
        self.schedule = Schedule.vp((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))
        self.bounded = False

    def predict(self, x_t, t, condition=None):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        eps = sigma * x_t / (alpha**2 * self.deviation**2 + sigma**2)
        return Prediction(eps, None, (x_t - sigma * eps) / alpha)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [0.5, 0.93, 4.0])
def test_tsr_is_the_score_of_another_variance(k):
    x = draw(2, 3, 4, 4)
    for t in (0, 250, 600.5, 999):
        with torch.no_grad(), estimator(Gaussian(1.7), TSR(1.0, k=k, sigma0=1.7)) as estimate:
            strong, eps = estimate(x, t)
        assert relative(eps, Gaussian(1.7 / k**0.5).predict(x, t).eps) < 1e-10
        assert torch.equal(strong.eps, Gaussian(1.7).predict(x, t).eps) and estimate.evaluations == 1
    for off in (TSR(0.0), TSR(1.0, k=1.0)):
        with torch.no_grad(), estimator(Gaussian(1.7), off) as estimate:
            assert torch.equal(*(p.eps if isinstance(p, Prediction) else p for p in estimate(x, 250)))


def test_tag_keeps_the_part_along_x():
    """By hand: eps = (3, 4) at x along the first axis becomes (3, 4 · 1.15); a batch's images separately."""
    x = torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=torch.float64).view(2, 1, 1, 2)
    eps = torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=torch.float64).view(2, 1, 1, 2)
    change = TAG(0.15).bind(None)
    got = eps + 0.15 * change.direction(eps, x, 5)
    assert torch.allclose(got.view(2, 2), torch.tensor([[3.0, 4.6], [3.45, 4.0]], dtype=torch.float64))


def test_tag_is_the_papers_change_of_the_update(model, x):
    """DDIM without fresh noise: P along x of the update kept, the rest times 1.15."""
    t, s = 400, 200
    alpha, sigma, alpha_s, sigma_s = (f(u) for u in (t, s) for f in (model.schedule.alpha, model.schedule.sigma))

    def step(eps):
        return alpha_s * (x - sigma * eps) / alpha + sigma_s * eps

    with torch.no_grad(), estimator(model, PAG(1.0, "m1") + TAG(0.15)) as estimate:
        _, eps = estimate(x, t)
    with torch.no_grad(), estimator(model, PAG(1.0, "m1")) as estimate:
        _, plain = estimate(x, t)
    for b in range(len(x)):
        update, unit = (step(plain) - x)[b], x[b] / x[b].norm()
        along = (update * unit).sum() * unit
        assert relative((step(eps) - x)[b], along + 1.15 * (update - along)) < 1e-10
    assert relative(eps, plain) > 1e-3


def test_order_interval_schedule_yaml_and_passes(model, x):
    guidance = build_guidance(
        [{"tag": {"scale": 0.15}}, {"pag": {"scale": 1.0, "layers": "m1"}}, {"tsr": {"scale": 1}}]
    )
    assert guidance == TAG(0.15) + PAG(1.0, "m1") + TSR(1.0) and count_weak_passes(guidance) == 1
    assert build_guidance(describe_guidance(guidance)) == guidance
    with torch.no_grad(), estimator(model, guidance) as estimate:
        _, eps = estimate(x, 300)
        assert estimate.evaluations == 2
    with torch.no_grad(), estimator(model, PAG(1.0, "m1")) as estimate:
        eps_pag = estimate(x, 300)[1]
    expected = eps_pag + 0.15 * TAG(1.0).bind(model).direction(eps_pag, x, 300)
    expected = expected + TSR(1.0).bind(model).direction(expected, x, 300)
    assert torch.equal(eps, expected)
    with torch.no_grad(), estimator(model, TAG(0.15, interval=(900, 400)) + TSR(1.0, schedule=lambda t: 0.0)) as off:
        strong, eps = off(x, 300)
    assert torch.equal(eps, strong.eps)


def test_recorded(model, x):
    record = Record(predictions=True)
    with torch.no_grad(), estimator(model, record_guidance(PAG(1.0, "m1") + TAG(0.5), record)) as estimate:
        _, eps = estimate(x, 300)
    alpha, sigma = model.schedule.alpha(300), model.schedule.sigma(300)
    assert set(record.signals) == {0, 1} and record.signals[1].shape == (2, 1, 32, 32)
    assert relative(record.x0["guided"], (x - sigma * eps) / alpha) < 1e-12


def test_in_samplers():
    """In generation TSR draws from the other variance; restorations are what the score says."""
    prior, noise = Gaussian(1.0), ImageNoise([(0, str(i), 0) for i in range(64)], dtype=torch.float64)
    options = {"noise": noise, "steps": 100, "ddim_eta": 0.0}
    flat = generate(prior, 64, **options, guidance=TSR(1.0, k=0.25, sigma0=1.0))
    plain = generate(prior, 64, **options)
    assert float(flat.std() / plain.std()) == pytest.approx(2.0, rel=0.02)
    operator = operators.Denoising()
    y = draw(64, 3, 4, 4)
    runs = [
        diffpir(prior, operator, y, noise=noise, steps=5, sigma_y=0.5, guidance=guidance)
        for guidance in (None, TAG(0.15), TSR(1.0))
    ]
    assert relative(runs[1], runs[0]) < 1e-10  # the score of a white prior has no part across x_t
    assert relative(runs[2], runs[0]) > 1e-4 and torch.isfinite(runs[2]).all()


def test_tag_in_a_pipeline_changes_its_guided_prediction():
    """u + g (c − u), computed by the pipeline from both halves, is changed as a whole; with PAG in it too."""
    unet, g = tiny_unet(), 7.5
    z, text = torch.randn(2, 4, 8, 8), torch.randn(4, 5, 16)
    both = torch.cat([z, z])

    def combined(guidance):
        with torch.no_grad(), guided(unet, guidance, conditional="second"):
            u, c = unet(both, 401, text).sample.chunk(2)
        return u + g * (c - u)

    for other in (None, PAG(2.0, "m1")):
        base = combined(other)
        got = combined(TAG(0.15) if other is None else other + TAG(0.15))
        unit = z / torch.linalg.vector_norm(z, dim=(1, 2, 3), keepdim=True)
        along = (base * unit).sum((1, 2, 3), keepdim=True) * unit
        assert relative(got, along + 1.15 * (base - along)) < 1e-4
    with pytest.raises(RestoreError, match="tsr needs clean estimates"), guided(unet, TSR(1.0)):
        pass


def test_cfg_and_tag_leave_a_batchs_images_alone(model, x):
    guidance = CFG(1.0, null=None) + TAG(0.3) if model.null_condition is not None else TAG(0.3)
    with torch.no_grad(), estimator(model, guidance) as estimate:
        both = estimate(x, 300)[1]
        assert relative(estimate(x[1:], 300)[1], both[1:]) < 1e-10
