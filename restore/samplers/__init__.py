"""Posterior samplers: one flat function per algorithm, each of the form

    name(prior, operator, y, *, noise, steps, guidance=None, condition=None, callback=None, **own) -> images

`own` are the algorithm's hyper-parameters; those without default must be given. A sampler is named in SAMPLERS,
or is any callable of that form ("module:function" where only text can be written).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from operators import RestoreError
from operators.naming import check_known, lookup
from restore.samplers.daps import daps
from restore.samplers.ddnm import ddnm
from restore.samplers.ddrm import ddrm
from restore.samplers.diffpir import diffpir
from restore.samplers.dpir import dpir
from restore.samplers.dps import dps
from restore.samplers.flowdps import flowdps
from restore.samplers.pigdm import pigdm
from restore.samplers.pnpdm import pnpdm
from restore.samplers.psld import psld
from restore.samplers.reddiff import reddiff
from restore.samplers.resample import resample

SAMPLERS: dict[str, Callable] = {
    "daps": daps,
    "ddnm": ddnm,
    "ddrm": ddrm,
    "diffpir": diffpir,
    "dpir": dpir,
    "dps": dps,
    "flowdps": flowdps,
    "pigdm": pigdm,
    "pnpdm": pnpdm,
    "psld": psld,
    "reddiff": reddiff,
    "resample": resample,
}

DETERMINISTIC = ("dpir",)  # they draw nothing: a second sample would be the first

_CONTRACT = ("prior", "operator", "y", "noise", "steps", "guidance", "condition", "callback")


def find(sampler: str | Callable) -> Callable:
    """The function of a name in SAMPLERS or of "module:function"; a function itself. RestoreError if unknown."""
    return sampler if callable(sampler) else lookup(sampler, SAMPLERS, "sampler")


def name_of(sampler: str | Callable) -> str:
    """How a sampler is written down: its name in SAMPLERS, else "module:function"."""
    if isinstance(sampler, str):
        return sampler
    named = [name for name, function in SAMPLERS.items() if function is sampler]
    return named[0] if named else f"{sampler.__module__}:{sampler.__qualname__}"


def parameters_of(sampler: str | Callable) -> dict[str, inspect.Parameter]:
    """A sampler's own hyper-parameters by name."""
    found = inspect.signature(find(sampler)).parameters
    return {name: parameter for name, parameter in found.items() if name not in _CONTRACT}


def check_parameters(sampler: str | Callable, parameters: Mapping[str, Any], complete: bool = True) -> None:
    """Raises RestoreError for a parameter the sampler does not have, and, if `complete`, for a missing one."""
    own = parameters_of(sampler)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
        return
    check_known(parameters, own, f"sampler {name_of(sampler)} has no parameter")
    for name, parameter in own.items():
        if complete and parameter.default is parameter.empty and parameters.get(name) is None:
            raise RestoreError(f"sampler {name_of(sampler)} needs the parameter '{name}', which no preset gives")
