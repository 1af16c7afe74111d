"""DPS and DPS+PAG against trajectories of the official code (tests/golden/dps_loop, dps_pag_loop)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import operators
from operators import RestoreError
from restore.backbones.adm import ADM
from restore.backbones.memory_options import enable_block_checkpointing
from restore.backbones.schedule import respace
from restore.backbones.sizes import Sized
from restore.guidance import PAG
from restore.memory.count import LiveBytes
from restore.samplers.dps import dps
from restore.samplers.likelihood import DATA_NORMS
from restore.samplers.noise import ImageNoise

GOLDEN = Path(__file__).parent.parent / "golden"
SETS = {name: json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("dps_loop", "dps_pag_loop")}
CASES = [(name, case) for name, sidecar in SETS.items() for case in sidecar["cases"]]


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def backbone():
    return Sized(ADM.load(GOLDEN / "nets" / "adm_a.safetensors", head_channels=16), 32, 32)


@pytest.fixture(scope="module")
def double():
    """The same network in float64: DPS is discontinuous where a pixel of x0_hat crosses its clamp, and in float32 it
    depends on a machine's rounding (even on its number of threads) on which side one pixel of a trajectory lies."""
    adm = ADM.load(GOLDEN / "nets" / "adm_a.safetensors", head_channels=16)
    adm.network.double()
    return Sized(adm, 32, 32)


@pytest.fixture(scope="module")
def bank():
    return load_file(GOLDEN / "noise_bank.safetensors")["noise"]


def arrange(name, case):
    tensors = {
        k.split(".", 1)[1]: v for k, v in load_file(GOLDEN / f"{name}.safetensors").items() if k.startswith(case + ".")
    }
    config = SETS[name]["cases"][case]
    kind = config["operator_short"]
    if kind == "box":
        operator = operators.Inpainting(tensors["mask"].float())
    elif kind in ("sr8", "sr4"):
        operator = operators.SuperResolution(int(kind[2:]))
    else:
        operator = operators.Blur(tensors["kernel"])
    guidance = PAG(config["pag"]["s"], layers=config["pag"]["layers"]) if config["pag"] else None
    return tensors, config, operator, guidance


def run(backbone, bank, tensors, config, operator, guidance, start=0, count=None):
    """(iterates, distances) of `count` steps, or all, from `start` on, beginning at the stored iterate after `start`
    steps."""
    x = (bank[0] if start == 0 else tensors[f"x_after_{start}"]).reshape(1, 3, 32, 32)
    # Cutting the schedule at its noisy end leaves every coefficient of the remaining steps unchanged; cutting it at its
    # other end changes the last step's.
    timesteps = respace(1000, config["timestep_respacing"])[: config["n_steps"] - start][-(count or 0) :]
    states, distances = [], []

    def callback(step):
        states.append(step["x_t"])
        distances.append(float(step["residual"]))

    dps(
        backbone,
        operator,
        tensors["y"],
        steps=timesteps,
        zeta=config["scale"],
        scale_zeta=False,
        guidance=guidance,
        noise=lambda k, shape, kind: x if kind == "start" else bank[start + k + 1].reshape(shape),
        ddim_eta=0.0 if config["sampler"] == "ddim" else None,
        callback=callback,
    )
    return states, distances


@pytest.mark.parametrize("name,case", CASES)
def test_whole_trajectory(double, bank, name, case):
    tensors, config, operator, guidance = arrange(name, case)
    tensors = {key: value.double() for key, value in tensors.items()}
    states, distances = run(double, bank.double(), tensors, config, operator, guidance)
    assert len(states) == config["n_steps"]
    assert relative(states[-1], tensors["x_final"]) < 1e-4
    for k in (1, 2, 5, 10, 11, 15, 19):
        assert relative(states[k - 1], tensors[f"x_after_{k}"]) < 1e-4, k
    assert relative(torch.tensor(distances).double(), tensors["distance"]) < 1e-4


@pytest.mark.parametrize("name,case", CASES)
def test_teacher_forced_steps(backbone, bank, name, case):
    tensors, config, operator, guidance = arrange(name, case)
    for k in (1, 10, 19):
        states, _ = run(backbone, bank, tensors, config, operator, guidance, start=k, count=2)
        target = tensors["x_final"] if k + 1 == config["n_steps"] else tensors[f"x_after_{k + 1}"]
        assert relative(states[0], target) < 1e-5, k
        # The step must matter: standing still is far from the target.
        assert relative(tensors[f"x_after_{k}"], target) > 1e-3


@pytest.mark.parametrize("guided", [False, True])
def test_batch_equals_single_images(double, guided):
    """To rounding; in float64, where rounding is far from the differences that mixed up images would make."""
    guidance = PAG(1.5, layers="m1") if guided else None
    operator = operators.SuperResolution(4)
    y = (torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.3).double()
    keys = [(0, f"image{i}", 0) for i in range(3)]

    def restore_images(y, keys):
        options = {"steps": 5, "zeta": 0.5, "scale_zeta": False, "guidance": guidance}
        return dps(double, operator, y, noise=ImageNoise(keys, dtype=torch.float64), **options)

    together = restore_images(y, keys)
    for i in range(3):
        assert relative(restore_images(y[i : i + 1], keys[i : i + 1]), together[i : i + 1]) < 1e-9
    assert relative(together[:1], together[1:2]) > 0.1


def test_scale_zero_is_plain_dps(backbone):
    operator = operators.SuperResolution(4)
    y = torch.zeros(1, 3, 8, 8)
    noise = ImageNoise([(0, "x", 0)])
    common = {"steps": 4, "zeta": 0.3, "noise": noise}
    plain = dps(backbone, operator, y, **common)
    assert torch.equal(plain, dps(backbone, operator, y, guidance=PAG(0.0, layers="m1"), **common))
    assert not torch.equal(plain, dps(backbone, operator, y, guidance=PAG(1.0, layers="m1"), **common))


def test_divergence_is_explained(backbone):
    operator = operators.SuperResolution(4)
    noise = ImageNoise([(0, "x", 0)])
    with pytest.raises(RestoreError, match=r"not finite after step .*zeta"):
        dps(backbone, operator, torch.zeros(1, 3, 8, 8), steps=4, zeta=1e300, noise=noise)


def test_zeta_keeps_its_strength_at_other_sizes(backbone):
    """The norm grows with the root of the number of pixels, the step with it; the callback tells what was used."""
    adm, noise, seen = backbone.inner, ImageNoise([(0, "x", 0)]), []
    for side in (adm.resolution, 2 * adm.resolution):
        prior, y = Sized(adm, side, side), torch.zeros(1, 3, side, side)
        dps(prior, operators.Denoising(), y, steps=1, zeta=0.5, noise=noise, callback=lambda s: seen.append(s["used"]))
    assert [used["zeta"] for used in seen] == pytest.approx([0.5, 1.0])


def test_data_norms():
    y = torch.tensor([[[[-1.0, 0.0, 1.0, 0.5]]], [[[0.2, 0.4, -0.6, 0.8]]]])
    difference = torch.tensor([[[[0.3, -0.1, 0.2, 0.0]]], [[[0.1, 0.0, -0.4, 0.2]]]])
    for name, norm in DATA_NORMS.items():
        if name != "poisson-reference":  # divides by |y|, infinite where y is 0
            assert torch.allclose(2 * norm(difference, y), norm(2 * difference, y), rtol=1e-6)
    expected = (difference[1] ** 2 / (2 * (y[1] + 1) / 2)).sum().sqrt()
    assert torch.allclose(DATA_NORMS["poisson"](difference, y)[1], expected, rtol=1e-6)
    assert torch.allclose(DATA_NORMS["l2"](difference, y)[0], difference[0].norm())
    assert torch.allclose(
        DATA_NORMS["poisson-reference"](difference[1:], y[1:])[0], (difference[1].norm() / y[1].abs()).mean()
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_guidance_takes_hardly_more_memory(bank, checkpointing):
    """The weak pass runs when the graph of the strong one is gone; only the shared prefix is kept meanwhile."""
    backbone = ADM.load(GOLDEN / "nets" / "adm_a.safetensors", head_channels=16)
    if checkpointing:
        enable_block_checkpointing(backbone)
    model = Sized(backbone, 32, 32)
    operator = operators.SuperResolution(8)
    x_T = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = operator.A(x_T.clamp(-1, 1))

    def peak(guidance):
        with LiveBytes(known=[*model.network.parameters(), x_T, y]) as live:
            dps(model, operator, y, steps=[400, 500], zeta=1.0, guidance=guidance, noise=noise)
        return live.peak

    def noise(k, shape, kind):
        return x_T if kind == "start" else torch.zeros(shape)

    assert peak(PAG(1.0, "i7")) <= 1.1 * peak(None)
