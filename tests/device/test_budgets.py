"""What a step of each sampler costs an accelerator besides its network: kernels, waits of the host, and uploads."""

from __future__ import annotations

import pytest
import torch
from sim_priors import LATENTS, LINEAR, PIXELS, Plain, PlainLatent, Steps, image, measure, pixel_prior, plain_prior

import operators
from operators import RestoreError
from restore.protocol import hash_backbone
from restore.samplers.steps import FiniteCheck

# Launches of a step beside a network that is one convolution: with masked pixels, and with a motion blur. Conjugate
# gradients take about 42 an iteration, and DAPS, FAST-DIPS and PnP-DM have steps of their own within each.
CEILINGS = {
    (Plain, "dps"): (50, 62),
    (Plain, "diffpir"): (46, 572),
    (Plain, "dpir"): (41, 567),
    (Plain, "ddrm"): (42, None),
    (Plain, "ddnm"): (42, None),
    (Plain, "pigdm"): (58, 5170),
    (Plain, "daps"): (102, 138),
    (Plain, "fastdips"): (555, 1355),
    (Plain, "reddiff"): (54, 65),
    (Plain, "pnpdm"): (82, None),
    (PlainLatent, "psld"): (64, None),
    (PlainLatent, "resample"): (40, None),
    (PlainLatent, "flowdps"): (74, None),
    (PlainLatent, "dps"): (45, None),
    (PlainLatent, "diffpir"): (50, None),
    (PlainLatent, "daps"): (114, None),
    (PlainLatent, "fastdips"): (2590, None),
    (PlainLatent, "reddiff"): (57, None),
}
CASES = [
    pytest.param(kind, name, operator, most, id=f"{kind.__name__}-{name}-{operator}")
    for (kind, name), ceilings in CEILINGS.items()
    for operator, most in zip(("mask", "motion"), ceilings, strict=True)
    if most is not None
]


def test_every_sampler_has_a_budget():
    assert {name for kind, name in CEILINGS if kind is Plain} == set(PIXELS)
    assert {name for kind, name in CEILINGS if kind is PlainLatent} == set(LATENTS)


@pytest.mark.parametrize(("kind", "sampler", "operator", "most"), CASES)
def test_a_step(sim, kind, sampler, operator, most):
    """The host waits at most once, for conjugate gradients to end; nothing is uploaded but noise, which is not waited
    for."""
    own, made, steps = (PIXELS if kind is Plain else LATENTS)[sampler], LINEAR[operator](), Steps(sim)
    options = {"steps": 3, "guidance": None, "batch_size": 2, **own, "callback": steps}
    plain_prior(kind, "sim")(measure(made), made, sampler=sampler, **options)
    launches, syncs, uploads = steps.per_step()
    assert 0.8 * most < launches <= most
    assert uploads == 0 and syncs == (sampler == "pigdm" and operator == "motion"), sim.places


@pytest.mark.parametrize("sampler", ["dps", "diffpir"])
def test_guidance_neither_waits_nor_uploads(sim, sampler):
    """Labels, times, random draws and the weights of windows are on the device after the first step."""
    import restore

    guidance = restore.CFG(0.5) + restore.TPG(0.5, "m1") + restore.SAG(0.5) + restore.PAG(1.0, "m1", target="noise")
    operator, steps = operators.Denoising(noise=operators.GaussianNoise(0.05)), Steps(sim)
    options = {"steps": 3, "label": 1, "guidance": guidance, **PIXELS[sampler], "callback": steps}
    pixel_prior("sim")(image(1, 24), operator, sampler=sampler, **options)
    assert steps.per_step()[1:] == (0, 0) and sim.queued > 0, sim.places


@pytest.mark.parametrize("bad", [0, 5, 31, 32, 49, None])
def test_the_first_step_that_is_not_finite_is_named(sim, bad):
    check, x = FiniteCheck(50), torch.zeros(2, 3, device="sim")

    def run():
        for k in range(50):
            check(x + torch.nan if k == bad else x, k, "zeta=1")

    if bad is None:
        run()
        assert sim.syncs == 2
    else:
        with pytest.raises(RestoreError, match=rf"not finite after step {bad + 1}; lower .*\(zeta=1\)"):
            run()
        assert sim.syncs == 1 + (bad > 31)


def test_jpeg_neither_waits_nor_uploads(sim):
    """Its transforms, tables and preconditioner are made once."""
    operator, steps = LINEAR["jpeg"](), Steps(sim)
    plain_prior(Plain, "sim")(
        measure(operator), operator, sampler="diffpir", steps=3, start_from="noise", batch_size=2, callback=steps
    )
    assert steps.per_step()[1:] == (0, 0), sim.places


def test_conjugate_gradients_end_as_on_the_cpu(sim):
    """Images that are done no longer change: the device may be asked later, and the result is the same."""
    operator, y = LINEAR["kernels"](), measure(LINEAR["kernels"]())
    for gamma in (3.0, torch.tensor([0.0, 50.0])):
        here = operator.prox_l2(image(2), y, gamma)
        before = sim.syncs
        there = operator.prox_l2(image(2).to("sim"), y.to("sim"), gamma)
        assert torch.equal(here, there.held) and sim.syncs - before <= 2


def test_the_hash_of_weights_is_one_copy(sim, monkeypatch):
    here, there = (pixel_prior(device).backbone for device in ("cpu", "sim"))
    before = sim.syncs
    assert hash_backbone(there) == hash_backbone(here) and sim.syncs == before + 1
    monkeypatch.setattr("restore.protocol.BLOCK", 1000)
    assert hash_backbone(there) == hash_backbone(here)
