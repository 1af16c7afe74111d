"""ReSample against a trajectory of the authors' code (tests/golden/samplers_resample)."""

import pytest
import torch
from golden_langevin import arrange, latent_bank, sd_prior
from golden_samplers import reference, relative

import operators
from operators import GaussianNoise, RestoreError
from restore.guidance import CFG
from restore.samplers.noise import ImageNoise
from restore.samplers.resample import fit, resample


@pytest.fixture(scope="module")
def prior():
    return sd_prior()


def run(prior, **changes):
    tensors, own, operator = arrange("resample", "sr4_bicubic")
    (bank, condition), seen, drawn = latent_bank(), [], []

    def noise(k, shape, kind):
        if kind == "start":
            return bank[0].reshape(shape)
        drawn.append(k)
        return bank[len(drawn)].reshape(shape)

    options = {"steps": own["S"], "pixel_iterations": own["pixel_iters"], "latent_iterations": own["latent_iters"]}
    options |= {"tolerance": own["pixel_eps"], **reference("resample"), **changes}
    y = tensors["y"]
    image = resample(prior, operator, y, noise=noise, condition=condition, callback=seen.append, **options)
    return image, seen, tensors


def test_trajectory_is_the_official_one(prior):
    image, seen, tensors = run(prior)
    z = [step["x_t"] for step in seen]
    assert [step["t"] for step in seen] == list(range(976, 0, -25))
    for call in (2, 3, 6, 11):
        assert relative(z[call - 2], tensors[f"z_call_{call}"]) < 1e-5
    assert relative(seen[4]["z0_hat"], tensors["pseudo_z0_call_5"]) < 1e-5
    fitted = [step for step in seen if "z0_y" in step]
    assert [step["t"] for step in fitted] == [501, 251, 1]
    with torch.no_grad():
        in_pixels = prior.encode(tensors["event_1_pixel_optimization"])
    # On the way, and by one optimisation or resampling each from what came before it.
    assert relative(fitted[0]["z0_y"], in_pixels) < 1e-4
    assert relative(fitted[0]["x_t"], tensors["event_2_stochastic_resample"]) < 1e-4
    assert relative(fitted[1]["z0_y"], tensors["event_3_latent_optimization"]) < 1e-4
    assert relative(fitted[1]["x_t"], tensors["event_4_stochastic_resample"]) < 1e-4
    assert relative(fitted[2]["z0_y"], tensors["event_5_latent_optimization"]) < 1e-4
    assert relative(z[-1], tensors["z_final"]) < 1e-4
    assert torch.equal(image, prior.decode(z[-1]))


FEW = {"steps": 6, "every": 2, "travel": 2, "pixel_iterations": 3, "latent_iterations": 3}


def test_the_authors_slips_matter_and_are_off(prior):
    z = {slips: run(prior, slips=slips, **FEW)[1] for slips in (False, True)}
    assert relative(z[False][0]["z0_hat"], z[True][0]["z0_hat"]) > 1e-3
    step, t = z[False][0], z[False][0]["t"]
    start = latent_bank()[0][0][None]
    a, s = prior.schedule.alpha(t), prior.schedule.sigma(t)
    assert relative(step["z0_hat"], (start - s * step["eps"]) / a) < 1e-5


def test_guidance_moves_the_steps_and_on_request_the_estimates(prior):
    plain, zero = (run(prior, guidance=g, **FEW)[1] for g in (None, CFG(0.0)))
    assert torch.equal(plain[-1]["x_t"], zero[-1]["x_t"])
    steps = {on: run(prior, guidance=CFG(2.0), guided_estimate=on, **FEW)[1] for on in (False, True)}
    assert torch.equal(steps[False][0]["z0_hat"], plain[0]["z0_hat"])
    assert relative(steps[False][0]["x_t"], plain[0]["x_t"]) > 1e-4
    assert relative(steps[True][0]["z0_hat"], plain[0]["z0_hat"]) > 1e-4


def test_batch_equals_single_images(prior):
    operator = operators.SuperResolution(4)
    y = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 0.3
    keys = [(0, f"image{i}", 0) for i in range(2)]
    together = resample(prior, operator, y, noise=ImageNoise(keys), **FEW)
    for i in range(2):
        single = resample(prior, operator, y[i : i + 1], noise=ImageNoise(keys[i : i + 1]), **FEW)
        assert relative(single, together[i : i + 1]) < 1e-5
    assert relative(together[:1], together[1:]) > 0.1


def test_images_stop_fitting_independently():
    y = torch.tensor([[1.0], [0.01]])
    x = fit(torch.zeros(2, 1), lambda x: x, y, 0.01, 50, 0.05)
    # The second fits from the start: one step of 0.01, then it rests while the first goes on to 0.5.
    assert x[1].item() == pytest.approx(0.01, abs=1e-4) and 0.3 < x[0].item() < 0.6


def test_tolerance_is_the_noise_and_errors(prior):
    y, noise = torch.zeros(1, 3, 16, 16), ImageNoise([(0, "x", 0)])
    with pytest.raises(RestoreError, match="tolerance must be positive"):
        resample(prior, operators.SuperResolution(4), y, noise=noise, tolerance=None, **FEW)
    with pytest.raises(RestoreError, match="not finite after step 1.*zeta"):
        resample(prior, operators.SuperResolution(4), y, noise=noise, zeta=1e300, **FEW)
    operator = operators.SuperResolution(4, noise=GaussianNoise(5.0))
    results = [resample(prior, operator, y, noise=noise, tolerance=tol, **FEW) for tol in (None, 5.0, 1e-3)]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
