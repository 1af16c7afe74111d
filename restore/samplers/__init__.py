"""Samplers: one flat function per algorithm, called as

    sampler(prior, operator, y, *, noise, steps, guidance=None, condition=None, callback=None, **own) -> images

prior: a backbone of the image's size (`restore.backbones.sizes.Sized`), which predicts at x_t = alpha x_0 + sigma n.
    `encode` and `decode` are the identity for pixel priors, so that a sampler does not ask what x is; on latents x0_hat
    is decoded before it is compared with y.
operator: y = A(x) + n for images x (B, 3, H, W) in [-1, 1]. Every sampler states what it needs of it: a differentiable
    `A`, `A_adjoint`, a proximal step (`operators.prox_l2`) or singular vectors (`operators.svd`).
y: measurement (B, ...).
noise: noise(k, shape, kind) -> standard normal numbers of this shape, k counting the steps from the noisiest one. kind
    is "start" for the first x, drawn once with k = 0, "latent" for the steps, or one that the sampler states. See
    `restore.samplers.noise.ImageNoise`.
steps: the times to visit, as `Schedule.timesteps` takes them, unless the sampler says otherwise.
guidance: a `restore.guidance.Guidance` for the update; terms against the data see the unguided estimate if the sampler
    says so (Ahn et al. 2024, App. A.3 and C.1). None is the plain algorithm.
condition: what the prior takes as such: classes (B,), embeddings, None for none.
callback: called after every step with one dict, see `restore.samplers.steps.report`.

`own` are the algorithm's parameters; those without default must be given. Their annotations are their ranges (see
`operators.ranges`), which every call checks. Some mean the same in every sampler:

sigma_y: standard deviation of the Gaussian noise of y, on [-1, 1]; None: that of the operator's noise, 0 if it has
    none. Raises RestoreError if y = A x + n is not linear and Gaussian.
clip: clamp x0_hat to [-1, 1]; None: if the prior's x_0 lies there (`prior.bounded`).
start_from: where the first x comes from, see `restore.samplers.steps.reconstruct`.
data_norm: norm of y - A(x) per image, see `restore.samplers.likelihood.find_data_norm`.
decoder_sigma: on latents, see `restore.samplers.consistency.decode_consistently`.

Returns images (B, 3, H, W), not clamped. Raises RestoreError if the iterate is no longer finite or an option does not
apply.

No sampler imports another. A sampler is named in SAMPLERS, or is any callable of that form ("module:function" in text).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from operators import RestoreError
from operators.naming import check_known, lookup
from operators.ranges import check_values, read_hints

SAMPLERS = {  # imported when used
    "daps": "restore.samplers.daps:daps",
    "ddnm": "restore.samplers.ddnm:ddnm",
    "ddrm": "restore.samplers.ddrm:ddrm",
    "diffpir": "restore.samplers.diffpir:diffpir",
    "dpir": "restore.samplers.dpir:dpir",
    "dps": "restore.samplers.dps:dps",
    "fastdips": "restore.samplers.fastdips:fastdips",
    "flowdps": "restore.samplers.flowdps:flowdps",
    "pigdm": "restore.samplers.pigdm:pigdm",
    "pnpdm": "restore.samplers.pnpdm:pnpdm",
    "psld": "restore.samplers.psld:psld",
    "reddiff": "restore.samplers.reddiff:reddiff",
    "resample": "restore.samplers.resample:resample",
}

DETERMINISTIC = ("dpir",)  # a second sample would equal the first
# Those whose data step at a pixel is its own, whatever the estimates of others are. A norm over all of y has noise
# where nothing was estimated.
REGIONAL = ("ddnm", "ddrm", "diffpir")

_CONTRACT = ("prior", "operator", "y", "noise", "steps", "guidance", "condition", "callback")


def find_sampler(sampler: str | Callable) -> Callable:
    """Return the function named in SAMPLERS or written "module:function"; a function is returned unchanged. Raises
    RestoreError if there is none of that name."""
    return sampler if callable(sampler) else lookup(SAMPLERS.get(str(sampler), sampler), SAMPLERS, "sampler")


def sampler_name(sampler: str | Callable) -> str:
    """Return the name of a sampler in SAMPLERS, else "module:function"."""
    if isinstance(sampler, str):
        return sampler
    path = f"{sampler.__module__}:{sampler.__qualname__}"
    return next((name for name, known in SAMPLERS.items() if known == path), path)


def sampler_parameters(sampler: str | Callable) -> dict[str, inspect.Parameter]:
    """Return the sampler's own parameters by name, without the arguments that all samplers have."""
    parameters = inspect.signature(find_sampler(sampler)).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in _CONTRACT}


def check_parameters(sampler: str | Callable, parameters: Mapping[str, Any], complete: bool = True) -> None:
    """Raise RestoreError for a parameter that the sampler does not have, a value outside of its range and, if
    `complete`, a missing parameter."""
    own = sampler_parameters(sampler)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
        check_known(parameters, own, f"sampler {sampler_name(sampler)} has no parameter")
        for name, parameter in own.items():
            if complete and parameter.default is parameter.empty and parameters.get(name) is None:
                raise RestoreError(
                    f"sampler {sampler_name(sampler)} needs the parameter '{name}', which no preset gives"
                )
    check_values(parameters, read_hints(find_sampler(sampler)))
