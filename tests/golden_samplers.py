"""The authors' trajectories of tests/golden/samplers_*: their cases, operators, networks and noise."""

import json
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from tiny_sd import SCHEDULER

import operators
from restore.backbones.adm import ADM
from restore.backbones.schedule import Schedule
from restore.backbones.sizes import Sized
from restore.backbones.stable_diffusion import StableDiffusion

GOLDEN = Path(__file__).parent / "golden"


def relative(a, b):
    return float((a - b).norm() / b.norm())


def cases(*names):
    return [(name, case) for name in names for case in _sidecar(name)["cases"]]


def arrange(name, case):
    """(tensors, the side-car's hyper-parameters, operator)."""
    stored = load_file(GOLDEN / f"samplers_{name}.safetensors")
    tensors = {key.split(".", 1)[1]: value for key, value in stored.items() if key.startswith(case + ".")}
    config = _sidecar(name)["cases"][case]
    kind, sigma = config["operator"], next(v for k, v in config.items() if k.startswith("sigma_y"))
    noise = operators.GaussianNoise(sigma)
    if kind["kind"] == "box":
        operator = operators.Inpainting(tensors["mask"].float(), noise=noise)
    elif kind["kind"] == "bicubic":
        operator = operators.SuperResolution(kind["factor"], noise=noise)
    else:
        operator = operators.GaussianBlur(kind["kernel_size"], kind["std"], noise=noise)
    return tensors, config["hyper_parameters"], operator


def adm_prior():
    return Sized(ADM.load(GOLDEN / "nets" / "adm_a.safetensors", head_channels=16), 32, 32)


def sd_prior():
    """Unguided with the condition "context"; its null condition is the authors' empty prompt."""
    nets = []
    for cls, name in ((UNet2DConditionModel, "sd_unet"), (AutoencoderKL, "sd_vae")):
        net = cls.from_config(json.loads((GOLDEN / "nets" / f"{name}_config.json").read_text()))
        net.load_state_dict({k: v.float() for k, v in load_file(GOLDEN / "nets" / f"{name}.safetensors").items()})
        nets.append(net)
    null = load_file(GOLDEN / "psld_pag_loop.safetensors")["uncond_context"]
    return Sized(StableDiffusion(*nets, Schedule.from_config(SCHEDULER), null), 64, 64)


def noise_bank():
    return load_file(GOLDEN / "noise_bank.safetensors")["noise"]


def latent_bank():
    """(draws, context)"""
    shared = load_file(GOLDEN / "psld_loop.safetensors")
    return shared["noise.latent"], shared["context"]


class Clipping:
    """y = clip(gain x, -1, 1): a nonlinear operator with A and its noise alone."""

    linear = False

    def __init__(self, gain, noise=None):
        self.gain, self.noise = gain, noise

    def A(self, x):
        return (self.gain * x).clamp(-1, 1)


def _sidecar(name):
    return json.loads((GOLDEN / f"samplers_{name}.json").read_text())
