"""Small priors, operators and guidances for the tests on the pretended accelerator, and runs on both devices."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import torch
from sim_device import SimTensor
from tiny_sd import seeded

import operators
import restore
from restore.backbones.adm import ADM
from restore.backbones.base import Pixels, Prediction
from restore.backbones.schedule import Schedule
from restore.restorer import Restorer

SIDE = 16
NOISE = operators.GaussianNoise(0.05)
PAG = restore.PAG(1.0, "m1")


def pixel_prior(device: str = "cpu", seed: int = 0, classes: int | None = 5, **options) -> Restorer:
    """A 16-pixel prior of random weights with attention at 8 pixels and in the middle, and classes."""
    from diffusers import UNet2DModel

    def build():
        return UNet2DModel(
            sample_size=SIDE,
            out_channels=6,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            attention_head_dim=8,
            norm_num_groups=8,
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=classes,
        )

    network = seeded(build, seed)
    backbone = ADM(network, schedule="linear", null_class=classes and classes - 1, device=device)
    return Restorer(backbone, "tiny", **options)


def image(batch: int = 1, side: int = SIDE) -> torch.Tensor:
    """Smooth pictures (B, 3, side, side)."""
    coarse = torch.rand(batch, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")


class Shifted(operators.Operator):
    """An operator that states only A."""

    name = "shifted"

    def A(self, x):
        return 0.6 * x + 0.4 * x.roll(1, -1)


class Bare:
    """An operator of another library: A and A_adjoint, nothing else."""

    noise = NOISE

    def A(self, x):
        return 0.5 * x

    def A_adjoint(self, y):
        return 0.5 * y


def masks(n: int, side: int = SIDE) -> torch.Tensor:
    drawn = torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(2))
    return (drawn > 0.4).float()


def kernels(n: int) -> torch.Tensor:
    drawn = torch.rand(n, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    return drawn / drawn.sum((1, 2), keepdim=True)


LINEAR = {
    "denoising": lambda: operators.Denoising(noise=NOISE),
    "mask": lambda: operators.Inpainting(masks(1), noise=NOISE),
    "masks": lambda: operators.Inpainting(masks(2), noise=NOISE),
    "bicubic": lambda: operators.SuperResolution(2, noise=NOISE),
    "average": lambda: operators.SuperResolution(4, method="average", noise=NOISE),
    "gaussian": lambda: operators.GaussianBlur(5, 1.0, noise=NOISE),
    "gaussian-circular": lambda: operators.GaussianBlur(5, 1.0, border="circular", noise=NOISE),
    "motion": lambda: operators.MotionBlur(5, noise=NOISE),
    "kernels": lambda: operators.Blur(kernels(2), noise=NOISE),
    "kernels-circular": lambda: operators.Blur(kernels(2), border="circular", noise=NOISE),
    "motion-unknown": lambda: operators.MotionBlur(5, border="unknown", noise=NOISE),
    "grey": lambda: operators.Colorization(noise=NOISE),
    "blur-and-smaller": lambda: operators.Compose(
        operators.GaussianBlur(5, 1.0), operators.SuperResolution(2), noise=NOISE
    ),
    "motion-and-smaller": lambda: operators.Compose(operators.MotionBlur(5), operators.SuperResolution(2), noise=NOISE),
    "jpeg": lambda: operators.JPEG(60),
    "own": lambda: Shifted(noise=NOISE),
    "bare": Bare,
}
WITH_SVD = {"denoising", "mask", "masks", "bicubic", "average", "gaussian", "gaussian-circular", "kernels-circular"}
WITH_SVD |= {"grey", "blur-and-smaller"}
OTHERS = {
    "poisson": lambda: operators.Denoising(noise=operators.PoissonNoise(1.0)),
    "clipping": lambda: operators.Clipping(noise=NOISE),
    "phase": lambda: operators.PhaseRetrieval(noise=NOISE),
}
OPERATORS = LINEAR | OTHERS
LATENTS = {
    "psld": {"eta": 0.5, "gamma": 0.1},
    "resample": {"every": 2, "travel": 1, "pixel_iterations": 3, "latent_iterations": 3},
    "flowdps": {"step_size": 0.5},
    "dps": {"zeta": 0.3},
    "diffpir": {"start_from": "noise"},
    "daps": {"mcmc_steps": 3, "ode_steps": 2, "tau": 0.5},
    "fastdips": {},
    "reddiff": {"start_from": "adjoint"},
}
# Own settings of the samplers where they need or deserve some; everything small enough to stay finite.
PIXELS = {
    "dps": {"zeta": 0.3},
    "diffpir": {"start_from": "noise"},
    "dpir": {},
    "ddrm": {},
    "ddnm": {},
    "pigdm": {},
    "daps": {"mcmc_steps": 3, "ode_steps": 2, "tau": 0.5},
    "fastdips": {},
    "reddiff": {"start_from": "adjoint"},
    "pnpdm": {"iterations": 3, "steps": "karras:6"},
}
ANY_OPERATOR = {"dps", "daps", "reddiff", "fastdips"}


def measure(operator, batch: int = 2, side: int = SIDE) -> torch.Tensor:
    """A measurement of `image`, noisy where the operator has noise."""
    generator = [torch.Generator().manual_seed(10 + i) for i in range(batch)]
    x = image(batch, side)
    return operator(x, generator) if callable(operator) else operator.A(x)


def held(value):
    """What sim tensors in a structure hold, on the CPU; others unchanged."""
    return torch.utils._pytree.tree_map(lambda v: v.held if isinstance(v, SimTensor) else v, value)


class Steps:
    """A callback that remembers the counts after each step."""

    def __init__(self, counts) -> None:
        self.counts, self.marks = counts, []

    def __call__(self, step: dict) -> None:
        self.marks.append(self.counts.snapshot())

    def per_step(self) -> tuple[int, int, int]:
        """The most (launches, syncs, uploads) of a step between the first, which makes what the others use, and the
        last, which asks whether the sample is finite."""
        steps = [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in pairwise(self.marks[:-1])]
        return tuple(max(column) for column in zip(*steps, strict=True))


def assert_same(here, there) -> None:
    """Equal to the bit, and `there` is on the device."""
    pairs = {"samples": (here.samples, there.samples), "residual": (here.residual, there.residual)}
    for name, (a, b) in pairs.items():
        assert isinstance(b, SimTensor), name
        assert torch.isfinite(a).all() and torch.equal(a, b.held), (name, float((a - b.held).abs().max()))
    different = {
        "device",
        "arithmetic",
        "code",
    }  # code: the class of the tensors that an operator keeps is of sim_device
    keys = (here.protocol.keys() | there.protocol.keys()) - different
    assert {k: there.protocol.get(k) for k in keys} == {k: here.protocol.get(k) for k in keys}


class Plain(Pixels):
    """A prior of hardly any launches of its own, to count those of samplers: eps is a convolution of x_t."""

    attention, channels, resolution, multiple, null_condition = {}, 3, 64, 1, None

    def __init__(self, device: str = "cpu") -> None:
        self.network = seeded(lambda: torch.nn.Conv2d(self.channels, self.channels, 1), 4).requires_grad_(False)
        self.network, self.dtype = self.network.to(device), torch.float32
        self.schedule = Schedule.from_config({})

    def predict(self, x_t, t, condition=None):
        alpha, sigma = self.schedule.levels(t, x_t)
        return Prediction.of("eps", self.network(x_t), x_t, alpha, sigma)


class PlainLatent(Plain):
    """The same on squares of 2 × 2 pixels as the channels of a latent."""

    channels, resolution, downscale, bounded = 12, 32, 2, False
    vae = torch.nn.Identity()
    vae.config = SimpleNamespace(out_channels=3)

    def encode(self, image, noise=None):
        return torch.nn.functional.pixel_unshuffle(image, 2)

    def decode(self, z):
        return torch.nn.functional.pixel_shuffle(z, 2)


def plain_prior(kind: type, device: str = "cpu") -> Restorer:
    return Restorer(kind(device), "plain")
