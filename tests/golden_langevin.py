"""More of the authors' trajectories (DAPS, RED-diff, ReSample): cases, latent networks, noise."""

import json
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from golden_samplers import operator_of, wide
from safetensors.torch import load_file
from tiny_sd import SCHEDULER

import operators
from restore.backbones.schedule import Schedule
from restore.backbones.sizes import Sized
from restore.backbones.stable_diffusion import StableDiffusion

GOLDEN = Path(__file__).parent / "golden"


def cases(*names):
    return [(name, case) for name in names for case in _sidecar(name)["cases"]]


def arrange(name, case):
    """(tensors, the side-car's hyper-parameters, operator)."""
    stored = wide(load_file(GOLDEN / f"samplers_{name}.safetensors"))
    tensors = {key.split(".", 1)[1]: value for key, value in stored.items() if key.startswith(case + ".")}
    config = _sidecar(name)["cases"][case]
    sigma = next(value for key, value in config.items() if key.startswith("sigma_y"))
    operator = operator_of(config["operator"], tensors, operators.GaussianNoise(sigma))
    return tensors, config["hyper_parameters"], operator


def sd_prior():
    """Unguided with the condition "context"; its null condition is the authors' empty prompt."""
    nets = []
    for cls, name in ((UNet2DConditionModel, "sd_unet"), (AutoencoderKL, "sd_vae")):
        net = cls.from_config(json.loads((GOLDEN / "nets" / f"{name}_config.json").read_text()))
        net.load_state_dict({k: v.float() for k, v in load_file(GOLDEN / "nets" / f"{name}.safetensors").items()})
        nets.append(net.double())
    null = load_file(GOLDEN / "psld_pag_loop.safetensors")["uncond_context"].double()
    return Sized(StableDiffusion(*nets, Schedule.from_config(SCHEDULER), null), 64, 64)


def noise_bank():
    return load_file(GOLDEN / "noise_bank.safetensors")["noise"].double()


def latent_bank():
    """(draws, context)"""
    shared = load_file(GOLDEN / "psld_loop.safetensors")
    return shared["noise.latent"].double(), shared["context"].double()


def _sidecar(name):
    return json.loads((GOLDEN / f"samplers_{name}.json").read_text())
