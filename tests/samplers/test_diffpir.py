"""DiffPIR against trajectories of the official code (tests/golden/samplers_diffpir), and its edge cases."""

import golden_samplers as golden
import pytest
import torch

import operators
from restore.samplers.diffpir import diffpir
from restore.samplers.noise import ImageNoise


@pytest.fixture(scope="module")
def prior():
    return golden.network()


def settings(case):
    # The authors' sigma_n is on [0, 1], half of ours: their lambda is four times ours.
    return {"lam": case.setting("paper lambda") / 4, "zeta": case.setting("paper zeta")}


@pytest.mark.parametrize("name", golden.cases("diffpir"))
def test_whole_trajectory(prior, name):
    """The official result is the x that enters the last step; ours goes one step further."""
    case = golden.Case("diffpir", name)
    steps = f"quad:{len(case['timesteps_visited'])}"
    assert prior.schedule.timesteps(steps) == case["timesteps_visited"]
    states = golden.walk(diffpir, prior, case, steps, case.x_start, **settings(case))
    assert len(states) == case["n_updates"] + 1
    golden.check_whole(case, states)


@pytest.mark.parametrize("name", golden.cases("diffpir"))
def test_teacher_forced_steps(prior, name):
    case = golden.Case("diffpir", name)
    for k in (1, 5, 10):
        x, steps = case.tensors[f"x_after_{k}"], case["timesteps_visited"][k : k + 2]
        (state, _) = golden.walk(diffpir, prior, case, steps, x, k, **settings(case))
        assert golden.relative(state["x_t"], case.tensors[f"x_after_{k + 1}"]) < 1e-5, k
        assert golden.relative(x, case.tensors[f"x_after_{k + 1}"]) > 1e-2


class Mirrored:
    """Another prior's x, mirrored, as the image; and an encoder that is always wrong by the same."""

    downscale, bounded = 2, False

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def decode(self, z):
        return z.flip(-1)

    def encode(self, image, noise=None):
        return image.flip(-1) + 0.3


@pytest.mark.parametrize("start_from", ["noise", "measurement"])
def test_on_latents_the_data_step_is_taken_in_the_image(prior, start_from):
    """The change of the image is encoded, so that the error of the autoencoder does not move the latent."""
    draws, noise = ImageNoise([(0, "image", 0)], dtype=torch.float64), operators.GaussianNoise(0.05)
    mask = operators.box_mask(32, size=12, margin=2, seed=1)
    y = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    options = {"steps": "quad:6", "lam": 1.0, "zeta": 0.5, "clip": False, "start_from": start_from}
    shown = []

    def run(prior, mask, y, **more):
        return diffpir(prior, operators.Inpainting(mask, noise=noise), y, noise=draws, **options, **more)

    latent = run(Mirrored(prior), mask, y * mask, callback=shown.append)
    pixels = run(prior, mask.flip(-1), (y * mask).flip(-1))
    if start_from == "noise":
        assert golden.relative(latent, pixels.flip(-1)) < 1e-9
    else:  # there the encoder's error is part of the start
        assert torch.isfinite(latent).all()
    assert golden.relative(latent, pixels) > 0.1
    # What a callback is shown is the image, and its residual that of the image.
    residual = (y * mask - shown[-1]["x0_hat"] * mask).flatten(1).norm(dim=1)
    assert torch.allclose(shown[-1]["residual"], residual)
