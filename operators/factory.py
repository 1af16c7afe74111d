"""An operator from a mapping, such as a file of configs/task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import torch

from operators import naming, validate
from operators.adapters import as_operator
from operators.base import Operator
from operators.blur import Blur, GaussianBlur, MotionBlur
from operators.compose import Compose
from operators.errors import RestoreError
from operators.inpainting import Inpainting, box_mask, random_mask
from operators.noise import GaussianNoise, PoissonNoise
from operators.nonlinear import Clipping, PhaseRetrieval
from operators.pointwise import Colorization, Denoising
from operators.super_resolution import SuperResolution

COMMON = ("noise", "image_size", "adjoint")


def build_operator(mapping: Mapping, *, image_size=None) -> Operator:
    """{"name": ..., option: value, ..., "noise": {"name": "gaussian", "sigma": 0.05}} -> Operator.

    name: one of OPERATORS, or "module:attribute", a class or function of the user's that makes an operator (an
    `Operator` or anything with A and A_adjoint). Options are the parameters of its signature (`operator_options`);
    those of this package also take noise, image_size and adjoint. "compose" has `operators`: a list of such mappings,
    the first is applied first. inpainting_box and inpainting_random need image_size.
    Noise: None, {"name": "none"}, {"name": "gaussian", "sigma"}, {"name": "poisson", "rate", "clip"},
    or a noise model.

    image_size: (H, W) of the images, unless the mapping has one.
    Raises RestoreError for an unknown name or option (with the nearest known one) and a missing option.
    """
    given = _options(mapping, "an operator")
    builder = _builder(given.pop("name"))
    known = inspect.signature(builder).parameters
    if image_size is not None and given.get("image_size") is None and "image_size" in known:
        given["image_size"] = image_size
    noise = build_noise(given.pop("noise", None))
    if noise is not None and ("noise" in known or _takes_anything(known)):
        given["noise"], noise = noise, None
    # what takes no noise itself carries it as a wrapped object
    return as_operator(_call(builder, given, mapping["name"]), noise=noise)


def operator_options(name: str) -> list[str]:
    """The options of the operator `name`, without noise, image_size and adjoint. RestoreError if unknown."""
    return [option for option in inspect.signature(_builder(name)).parameters if option not in COMMON]


def build_noise(mapping):
    """A noise model from its mapping, see `build_operator`."""
    if mapping is None or isinstance(mapping, (GaussianNoise, PoissonNoise)):
        return mapping
    given = _options(mapping, "noise")
    return _call(naming.lookup(given.pop("name"), NOISES, "noise"), given, mapping["name"])


def inpainting_box(*, image_size, size=None, margin=None, top=None, left=None, seed=0, noise=None, adjoint="exact"):
    mask = box_mask(image_size, size=size, margin=margin, top=top, left=left, seed=seed)
    return Inpainting(mask, noise=noise, adjoint=adjoint)


def inpainting_random(*, image_size, fraction=(0.3, 0.7), seed=0, noise=None, adjoint="exact"):
    return Inpainting(random_mask(image_size, fraction=fraction, seed=seed), noise=noise, adjoint=adjoint)


def compose(*, operators, noise=None, image_size=None, adjoint="exact") -> Compose:
    if not isinstance(operators, Sequence) or isinstance(operators, str) or not len(operators):
        raise RestoreError("compose needs the option 'operators': a list of operator mappings, not empty.")
    chain, size = [], image_size
    for mapping in operators:
        chain.append(build_operator(_options(mapping, "an operator"), image_size=size))
        if size is not None:  # the next operator sees what this one makes of the image
            size = tuple(chain[-1].A(torch.zeros(1, 3, *validate.require_size(size))).shape[2:])
    chain = Compose(*chain, noise=noise)
    return chain if adjoint == "exact" else chain.with_adjoint(adjoint)


OPERATORS = {
    "inpainting_box": inpainting_box,
    "inpainting_random": inpainting_random,
    "inpainting_mask": Inpainting,
    "super_resolution": SuperResolution,
    "gaussian_blur": GaussianBlur,
    "motion_blur": MotionBlur,
    "blur": Blur,
    "denoising": Denoising,
    "colorization": Colorization,
    "clipping": Clipping,
    "phase_retrieval": PhaseRetrieval,
    "compose": compose,
}
NOISES = {"none": lambda: None, "gaussian": GaussianNoise, "poisson": PoissonNoise}


def _builder(name) -> Callable:
    builder = naming.lookup(name, OPERATORS, "operator")
    if not callable(builder) or isinstance(builder, Operator):
        raise RestoreError(f"'{name}' must be a class or function that makes an operator, not {builder!r}.")
    return builder


def _options(mapping, what: str) -> dict:
    if not isinstance(mapping, Mapping) or "name" not in mapping:
        raise RestoreError(f"{what} must be a mapping with a 'name', got {mapping!r}.")
    return {str(key): _plain(mapping[key]) for key in mapping}


def _plain(value):
    """Sequences of a configuration library as lists; arrays, tensors and mappings as they are."""
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return [_plain(item) for item in value] if is_list else value


def _call(builder: Callable, given: dict, name: str):
    parameters = inspect.signature(builder).parameters
    if not _takes_anything(parameters):
        naming.check_known(given, parameters, f"{name} has no option")
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and not _variadic(parameter) and given.get(option) is None:
            raise RestoreError(f"{name} needs the option '{option}'.")
    return builder(**given)


def _takes_anything(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _variadic(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
