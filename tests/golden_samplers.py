"""Trajectories of the official samplers (tests/golden/samplers_*), and how to walk along them with ours.

All in float64: it is the algorithms that are compared, and the result does not depend on a machine's rounding.
"""

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

import operators
from restore.backbones.adm import ADM
from restore.backbones.sizes import Sized
from restore.paths import configs_dir

GOLDEN = Path(__file__).parent / "golden"
STORED = (1, 2, 5, 6, 10, 11)  # numbers of steps after which the iterate is stored


class Case:
    """One case: its side-car's entry by [...], its tensors as attributes, `operator`, `sigma_y` and `noise(j)`."""

    def __init__(self, name: str, case: str):
        self.name, self.config = case, json.loads((GOLDEN / f"samplers_{name}.json").read_text())["cases"][case]
        tensors = wide(load_file(GOLDEN / f"samplers_{name}.safetensors"))
        self.tensors = {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(case + ".")}
        sigma = [value for key, value in self.config.items() if key.startswith("sigma_y_in_[-1,1]")][0]
        self.operator = operator_of(self.config["operator"], self.tensors, operators.GaussianNoise(sigma))
        self.bank = load_file(GOLDEN / "noise_bank.safetensors")["noise"].double()

    def __getitem__(self, key):
        return self.config[key]

    def __getattr__(self, name):
        return self.tensors[name]

    def setting(self, words: str):
        """A hyper-parameter by the beginning of its name."""
        (found,) = [value for key, value in self.config["hyper_parameters"].items() if key.startswith(words)]
        return found

    def draw(self, j: int) -> torch.Tensor:
        return self.bank[j].reshape(1, 3, 32, 32)


def reference(sampler: str) -> dict:
    """The parameters that make a sampler compute what its authors' code does."""
    return yaml.safe_load((configs_dir() / "method" / f"{sampler}.yaml").read_text())["reference"]["parameters"]


def cases(name: str) -> list[str]:
    return list(json.loads((GOLDEN / f"samplers_{name}.json").read_text())["cases"])


def operator_of(config: dict, tensors: dict, noise) -> operators.Operator:
    kind = config["kind"]
    if kind == "box":
        return operators.Inpainting(tensors["mask"].float(), noise=noise)
    if kind in ("average", "bicubic"):
        return operators.SuperResolution(config["factor"], method=kind, noise=noise)
    return operators.GaussianBlur(config["kernel_size"], config["std"], border=config["border"], noise=noise)


def network(double: bool = True) -> Sized:
    adm = ADM.load(GOLDEN / "nets" / "adm_a.safetensors", head_channels=16)
    if double:
        adm.network.double()
    return Sized(adm, 32, 32)


def wide(tensors: dict) -> dict:
    return {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}


def walk(sampler, prior, case: Case, steps, start: torch.Tensor, first: int = 0, **own) -> list[dict]:
    """The callback's dicts of a run from the noise `start` on, whose first step is the official one number `first`."""
    states = []

    def noise(k, shape, kind):
        return start if kind == "start" else case.draw(first + k + 1)

    y = case.tensors["y"]
    sampler(prior, case.operator, y, steps=steps, noise=noise, callback=states.append, **own)
    return states


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def check_whole(case: Case, states: list[dict], bound: float = 1e-4) -> None:
    """x after every stored step, the norm after all, and x0_hat of the fifth."""
    for k in STORED:
        assert relative(states[k - 1]["x_t"], case.tensors[f"x_after_{k}"]) < bound, k
    n = len(case.x_norms)
    norms = torch.tensor([float(state["x_t"].norm()) for state in states[:n]])
    assert relative(norms, case.x_norms) < bound
    assert relative(states[n - 1]["x_t"], case.x_final) < bound
    assert relative(states[4]["x0_hat"], case.x0_hat_5) < bound
