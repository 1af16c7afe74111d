"""PSLD and PSLD+PAG against trajectories of the authors' code (tests/golden/psld_loop, psld_pag_loop)."""

import json
from pathlib import Path

import pytest
import tiny_flow
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from golden_samplers import reference
from safetensors.torch import load_file
from tiny_sd import SCHEDULER

import operators
import restore
from operators import GaussianNoise, RestoreError
from restore import zoo
from restore.backbones.base import normalise
from restore.backbones.memory_options import enable_block_checkpointing
from restore.backbones.schedule import Schedule
from restore.backbones.sizes import Sized
from restore.backbones.stable_diffusion import StableDiffusion
from restore.guidance import CFG, PAG, build_guidance, estimator
from restore.samplers.noise import ImageNoise
from restore.samplers.psld import psld
from restore.samplers.steps import alpha_bars, ldm_timesteps

GOLDEN = Path(__file__).parent.parent / "golden"
SETS = {name: json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("psld_loop", "psld_pag_loop")}
CASES = [(name, case) for name, sidecar in SETS.items() for case in sidecar["cases"]]
SHARED = load_file(GOLDEN / "psld_loop.safetensors")
FILES = {"psld_loop": SHARED, "psld_pag_loop": load_file(GOLDEN / "psld_pag_loop.safetensors")}


def relative(a, b):
    return float((a - b).norm() / b.norm())


def make_backbone(T=1000, context=SHARED["context"], null=None, **options):
    nets = []
    for cls, name in ((UNet2DConditionModel, "sd_unet"), (AutoencoderKL, "sd_vae")):
        net = cls.from_config(json.loads((GOLDEN / "nets" / f"{name}_config.json").read_text()))
        net.load_state_dict({k: v.float() for k, v in load_file(GOLDEN / "nets" / f"{name}.safetensors").items()})
        nets.append(net)
    schedule = Schedule.from_config({**SCHEDULER, "num_train_timesteps": T})
    return StableDiffusion(*nets, schedule, context if null is None else null, **options)


@pytest.fixture(scope="module")
def backbone():
    return make_backbone()


def arrange(name, case, adjoint="reference"):
    config = SETS[name]["cases"][case]
    tensors = {k.split(".", 1)[1]: v for k, v in FILES[name].items() if k.startswith(case + ".")}
    if case == "box_pag0":
        tensors = {**{k.split(".", 1)[1]: v for k, v in SHARED.items() if k.startswith("box.")}, **tensors}
    kind, noise = config["operator_short"], GaussianNoise(config["sigma"])
    if kind == "box":
        operator = operators.Inpainting(tensors["mask"].float(), noise=noise, adjoint=adjoint)
    elif kind == "sr8":
        operator = operators.SuperResolution(8, noise=noise, adjoint=adjoint)
    else:
        kernel = tensors.get("kernel", SHARED["gauss.kernel"])
        operator = operators.Blur(kernel, noise=noise, adjoint=adjoint)
    return tensors, config, operator


def guidance_of(config):
    guidance = None
    if config["pag_scale"]:
        guidance = PAG(config["pag_scale"], layers=config["pag_layers_ldm"])
    if config["cfg_scale"] != 1:
        guidance = CFG(config["cfg_scale"] - 1) + guidance
    return guidance


def bank(tensors):
    def noise(k, shape, kind):
        if kind == "measurement":
            return (tensors["meas_noise"] if "meas_noise" in tensors else SHARED["noise.measurement"])[k].reshape(shape)
        return SHARED[f"noise.{kind}"][k + 1 if kind == "latent" else k].reshape(shape)

    return noise


def run(backbone, tensors, config, operator, start=SHARED["noise.latent"][0][None], **changes):
    """(z_0, the steps) of PSLD started at the given z_T."""
    steps, draw = [], changes.pop("noise", bank(tensors))
    options = {
        "steps": ldm_timesteps(backbone.schedule, config["S"], reference=True),
        "eta": config["omega"],
        "gamma": config["gamma"],
        "guidance": guidance_of(config),
        "condition": SHARED["context"],
        "ddim_eta": config["eta"],
        **reference("psld"),
        **changes,
    }

    def noise(k, shape, kind):
        return start if kind == "start" else draw(k, shape, kind)

    prior = Sized(backbone, *(side * backbone.downscale for side in start.shape[-2:]))
    image = psld(prior, operator, tensors["y"], noise=noise, callback=steps.append, **options)
    z = steps[-1]["x_t"]
    assert torch.equal(image, backbone.decode(z))
    return z, steps


@pytest.mark.parametrize("name,case", CASES)
def test_trajectory_is_the_official_one(name, case):
    tensors, config, operator = arrange(name, case)
    null = FILES["psld_pag_loop"]["uncond_context"] if config["cfg_scale"] != 1 else None
    backbone = make_backbone(config["num_train_timesteps"], null=null)
    z, steps = run(backbone, tensors, config, operator)
    assert [step["t"] for step in steps] == config["timesteps_fed_to_unet"]
    for k in (1, 2, 5):
        if f"z_after_{k}" in tensors:
            assert relative(steps[k - 1]["x_t"], tensors[f"z_after_{k}"]) < 1e-5, k
    for k in (10, 15):
        if f"z_after_{k}" in tensors and case != "box_pag0":
            assert relative(steps[k - 1]["x_t"], tensors[f"z_after_{k}"]) < 1e-4, k
    assert relative(z, tensors["z_final"]) < 1e-4
    if case == "box_pag0":
        return
    assert relative(backbone.decode(z), tensors["decoded"]) < 1e-4
    residual, glue = (torch.stack([s[n] for s in steps])[:, 0] for n in ("residual", "glue"))
    assert relative(residual, tensors["meas_error"]) < 1e-4
    assert relative(glue, tensors["glue_error"]) < 1e-4
    assert relative(config["omega"] * residual + config["gamma"] * glue, tensors["loss"]) < 1e-4
    gradients = [step["gradient"] for step in steps]
    assert relative(torch.stack([g.norm() for g in gradients]), tensors["grad_norm"]) < 1e-3
    assert relative(gradients[0], tensors["grad_1"]) < 1e-4
    last = f"grad_{len(steps)}"
    assert relative(gradients[-1], tensors[last]) < 1e-3


def test_checkpointing_gives_the_same_guided_trajectory():
    """The weak pass and its replay must be over when the backward recomputes blocks."""
    tensors, config, operator = arrange("psld_pag_loop", "box")
    checkpointed = make_backbone()
    enable_block_checkpointing(checkpointed)
    z, _ = run(checkpointed, tensors, config, operator)
    assert relative(z, tensors["z_final"]) < 1e-4


CLEAN = {"measurement_noise": False, "encoding": "mean", "index_shift": False}


def test_clean_choices_need_no_noise_and_differ_from_the_reference(backbone):
    tensors, config, exact = arrange("psld_loop", "sr8", adjoint="exact")

    def no_noise(*_):
        raise AssertionError("drawn")

    few = {**CLEAN, "steps": [901, 601, 301, 1]}
    z, _ = run(backbone, tensors, config, exact, noise=no_noise, **few)
    for change in ({"measurement_noise": True}, {"encoding": "sample"}):
        assert relative(run(backbone, tensors, config, exact, **{**few, **change})[0], z) > 1e-4, change
    reference = operators.SuperResolution(8, adjoint="reference")
    assert relative(run(backbone, tensors, config, reference, **few)[0], z) > 1e-4


def test_gradient_is_that_of_the_two_norms(backbone):
    """The step minus the DDIM step is d/dz of eta ||.|| + gamma ||.||, by finite differences in float64."""
    tensors, config, operator = arrange("psld_loop", "box", adjoint="exact")
    double = make_backbone()
    double.network.double()
    double.vae.double()
    z = SHARED["noise.latent"][0][None].double()
    y = tensors["y"].double()
    common = {**CLEAN, "steps": [501], "eta": 0.7, "gamma": 0.3, "guidance": None, "condition": None, "ddim_eta": 0.0}
    _, steps = run(double, {"y": y}, config, operator, start=z, noise=None, **common)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(z):
        _, seen = run(double, {"y": y}, config, operator, start=z, noise=None, **common)
        return float(0.7 * seen[0]["residual"] + 0.3 * seen[0]["glue"])

    h = 1e-5
    numeric = (loss(z + h * direction) - loss(z - h * direction)) / (2 * h)
    assert float((steps[0]["gradient"] * direction).sum()) == pytest.approx(numeric, rel=1e-5)


def test_gamma_zero_is_latent_dps_and_runs_no_encoder(backbone):
    tensors, config, operator = arrange("psld_loop", "box", adjoint="exact")
    calls = []
    handle = backbone.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        _, steps = run(backbone, tensors, config, operator, gamma=0.0, steps=[901, 801], **CLEAN)
        assert not calls and float(steps[0]["glue"]) == 0
        run(backbone, tensors, config, operator, steps=[901, 801], **CLEAN)
        assert len(calls) == 2
    finally:
        handle.remove()
    z = SHARED["noise.latent"][0][None].requires_grad_()
    a = backbone.schedule.alpha_bar(901)
    x = backbone.decode((z - (1 - a) ** 0.5 * backbone.predict(z, 901).eps) / a**0.5)
    residual = (tensors["y"] - operator.A(x)).norm()
    (expected,) = torch.autograd.grad(config["omega"] * residual, z)
    assert relative(steps[0]["gradient"], expected) < 1e-5


def test_loss_sees_the_unguided_estimate(backbone):
    tensors, config, operator = arrange("psld_pag_loop", "box", adjoint="exact")
    first = {}
    for scale in (0.0, 4.0):
        guidance = PAG(scale, layers="i8")
        z, steps = run(backbone, tensors, config, operator, guidance=guidance, steps=[901, 801], **CLEAN)
        first[scale] = steps[0]
    assert torch.equal(first[0.0]["z0_hat"], first[4.0]["z0_hat"])
    assert torch.equal(first[0.0]["gradient"], first[4.0]["gradient"])
    assert relative(first[4.0]["x_t"], first[0.0]["x_t"]) > 1e-4


def test_batch_equals_single_images(backbone):
    tensors, config, operator = arrange("psld_pag_loop", "box", adjoint="exact")
    keys = [(0, f"image{i}", 0) for i in range(3)]
    y = torch.cat([tensors["y"] * s for s in (1.0, 0.5, -1.0)])
    options = {"condition": None, "steps": [901, 601, 301, 1], "ddim_eta": 0.5, **reference("psld")}

    def sample(rows):
        noise = ImageNoise([keys[i] for i in rows])
        start = noise(0, (len(rows), 4, 16, 16), "start")
        return run(backbone, {"y": y[list(rows)]}, config, operator, start=start, noise=noise, **options)[0]

    together = sample((0, 1, 2))
    for i in range(3):
        assert relative(together[i : i + 1], sample((i,))) < 1e-5
    assert torch.equal(sample((0, 1, 2)), together)


def test_last_step_removes_all_noise_when_t_reaches_zero():
    schedule = Schedule.from_config(SCHEDULER)
    alphas = schedule.alphas_cumprod
    at, prev = alpha_bars(schedule, [501, 1], shift=False)
    assert at == pytest.approx([float(alphas[501]), float(alphas[1])], rel=1e-6)
    assert prev == pytest.approx([float(alphas[1]), float(alphas[0])], rel=1e-6)
    assert alpha_bars(schedule, [501, 0], shift=False)[1][-1] == 1.0
    everything = list(range(1000, 0, -1))
    at, prev = alpha_bars(schedule, everything, shift=True)
    assert at[0] == pytest.approx(float(alphas[999]), rel=1e-6) and at[-1] == prev[-1]
    with pytest.raises(RestoreError, match="between 0 and 999"):
        alpha_bars(schedule, everything, shift=False)


def test_timesteps():
    schedule = Schedule.from_config(SCHEDULER)
    assert ldm_timesteps(schedule, 10) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert ldm_timesteps(schedule, "1000") == list(range(999, -1, -1))
    assert ldm_timesteps(schedule, 1000, reference=True) == list(range(1000, 0, -1))
    assert len(ldm_timesteps(schedule, 30)) == 30 and len(ldm_timesteps(schedule, 30, reference=True)) == 31
    assert len(set(ldm_timesteps(schedule, 999))) == 999 and max(ldm_timesteps(schedule, 999)) <= 999
    assert ldm_timesteps(schedule, [1, 501, 20]) == [501, 20, 1]
    for steps in (0, -1, 1001, "karras:5"):
        with pytest.raises(RestoreError, match="between 1 and 1000"):
            ldm_timesteps(schedule, steps)


def test_bad_options(backbone):
    tensors, config, operator = arrange("psld_loop", "box")
    with pytest.raises(RestoreError, match="encoding 'mode'"):
        run(backbone, tensors, config, operator, encoding="mode")
    with pytest.raises(RestoreError, match="measurement_noise.*without Gaussian noise"):
        run(backbone, tensors, config, operators.Inpainting(tensors["mask"].float()))
    with pytest.raises(RestoreError, match="not finite after step"):
        run(backbone, tensors, config, operator, eta=1e38, **CLEAN)


def test_the_time_beyond_the_table_is_the_psld_codes():
    """It visits T of T; a network of pixels refuses it."""
    latent, pixels = restore.load("embedded-latent").backbone, restore.load("embedded").backbone
    with torch.no_grad():
        assert latent.predict(torch.zeros(1, latent.channels, 16, 16), 1000).eps.isfinite().all()
        with pytest.raises(RestoreError, match="0 to 999, got 1000"):
            pixels.predict(torch.zeros(1, 3, 64, 64), 1000)


def test_every_latent_prior_comes_back_from_there(tmp_path):
    """DiT and flow matching, and APG, whose own noise levels end before it."""
    for kind in ("dit", "sd3", "flux"):
        prior = normalise(zoo.load_backbone(tiny_flow.save_folder(kind, tmp_path / kind))[1], "vp")
        side = prior.resolution
        with torch.no_grad():
            x_t = torch.ones(1, prior.channels, side, side)
            assert prior.predict(x_t, prior.schedule.time(len(prior.schedule))).x0.isfinite().all(), kind
    latent = restore.load("embedded-latent").backbone
    guidance = build_guidance([{"pag": {"layers": "i3", "scale": 1.0}}, {"combine": "apg"}])
    with torch.no_grad(), estimator(latent, guidance) as estimate:
        strong, eps = estimate(torch.ones(1, latent.channels, 16, 16), 1000)
    assert eps.isfinite().all() and not torch.equal(strong.eps, eps)
