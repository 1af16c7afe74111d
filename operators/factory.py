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
from operators.jpeg import JPEG
from operators.noise import GaussianNoise, PoissonNoise
from operators.nonlinear import Clipping, JPEGRounding, NonlinearBlur, PhaseRetrieval
from operators.pointwise import Colorization, Denoising
from operators.super_resolution import SuperResolution

COMMON = ("noise", "image_size", "adjoint")


def build_operator(mapping: Mapping, *, image_size=None) -> Operator:
    """Return the operator of {"name": ..., option: value, ..., "noise": {"name": "gaussian", "sigma": 0.05}}.

    name: one of OPERATORS, or "module:attribute", a class or function of the user's that makes an operator (an
        `Operator` or anything with A and A_adjoint). Options are the parameters of its signature (`operator_options`);
        those of this package also take noise, image_size and adjoint. "compose" has `operators`: a list of such
        mappings, the first is applied first.
    noise: None, {"name": "none"}, {"name": "gaussian", "sigma"}, {"name": "poisson", "rate", "clip"}, or a noise model.
    image_size: (H, W) of the images, unless the mapping has one; inpainting_box and inpainting_random need it.
    Raises RestoreError for an unknown name or option (with the nearest known one) and a missing option.
    """
    options = _read_mapping(mapping, "operator")
    maker = find_operator(options.pop("name"))
    known = inspect.signature(maker).parameters
    if image_size is not None and options.get("image_size") is None and "image_size" in known:
        options["image_size"] = image_size
    noise = build_noise(options.pop("noise", None))
    if noise is not None and ("noise" in known or _accepts_any(known)):
        options["noise"], noise = noise, None
    # what takes no noise itself carries it as a wrapped object
    return as_operator(_make(maker, options, mapping["name"]), noise=noise)


def read_extent(mapping: Mapping) -> tuple[int, tuple[int, int]]:
    """Return what the operator of a mapping makes of sizes: (factor, margin), by which a picture of `factor` times the
    measurement's sides is enlarged, and what its images extend beyond that at each side, in rows and columns."""
    if mapping["name"] == "compose":
        factor, rows, columns = 1, 0, 0
        for part in read_parts(mapping):
            own, margin = read_extent(part)
            rows, columns = rows + factor * margin[0], columns + factor * margin[1]
            factor *= own
        return factor, (rows, columns)
    unknown = mapping.get("border") == "unknown"
    bare = {key: mapping[key] for key in mapping if key not in COMMON}
    margin = build_operator(bare).margin if unknown else (0, 0)
    maker = find_operator(mapping["name"])
    if not getattr(maker, "enlarges", False):
        return 1, margin
    option = inspect.signature(maker).parameters.get("factor")
    if option is None:
        raise RestoreError(f"{mapping['name']} enlarges and must have the option 'factor'")
    factor = mapping.get("factor", option.default)
    if factor is option.empty:
        build_operator(bare)  # says that it is missing, or misspelt
    return validate.require_integer(factor, "factor"), margin


def read_parts(mapping: Mapping) -> list[dict]:
    """Return the mappings of a composition's operators. Raises RestoreError if they are no list of mappings."""
    parts = mapping.get("operators")
    if not isinstance(parts, Sequence) or isinstance(parts, str) or not len(parts):
        raise RestoreError(f"operators of compose must be a list of operator mappings, not empty, got {parts!r}")
    return [_read_mapping(part, "operator") for part in parts]


def forget_border(mapping: Mapping) -> dict:
    """Return the mapping with an unknown border for every blur that names none, as of a picture that a camera took."""
    if mapping["name"] == "compose":
        return {**mapping, "operators": [forget_border(part) for part in read_parts(mapping)]}
    maker = find_operator(mapping["name"])
    is_blur = isinstance(maker, type) and issubclass(maker, Blur) and mapping.get("border") is None
    return {**mapping, "border": "unknown"} if is_blur else dict(mapping)


def build_noise(mapping):
    """Return a noise model from its mapping, see `build_operator`."""
    if mapping is None or isinstance(mapping, (GaussianNoise, PoissonNoise)):
        return mapping
    options = _read_mapping(mapping, "noise")
    return _make(naming.lookup(options.pop("name"), NOISES, "noise"), options, mapping["name"])


def find_operator(name) -> Callable:
    """Return the class or function that makes the operator `name`.

    Also accepted: hyphens, as in the names of tasks ("gaussian-blur"), and "inpainting" for "inpainting_mask".
    Raises RestoreError if the name is unknown or stands for something else.
    """
    known = str(name).replace("-", "_")
    known = "inpainting_mask" if known == "inpainting" else known
    maker = naming.lookup(known if known in OPERATORS else name, OPERATORS, "operator")
    if not callable(maker) or isinstance(maker, Operator):
        raise RestoreError(f"operator '{name}' must be a class or function that makes an operator, got {maker!r}")
    return maker


def operator_options(name: str) -> list[str]:
    """Return the options of the operator `name` except noise, image_size and adjoint. RestoreError if unknown."""
    return [option for option in inspect.signature(find_operator(name)).parameters if option not in COMMON]


def make_box_inpainting(
    *, image_size, size=None, margin=None, top=None, left=None, seed=0, noise=None, adjoint="exact"
):
    mask = box_mask(image_size, size=size, margin=margin, top=top, left=left, seed=seed)
    return Inpainting(mask, noise=noise, adjoint=adjoint)


def make_random_inpainting(*, image_size, fraction=(0.3, 0.7), seed=0, noise=None, adjoint="exact"):
    return Inpainting(random_mask(image_size, fraction=fraction, seed=seed), noise=noise, adjoint=adjoint)


def make_composition(*, operators, noise=None, image_size=None, adjoint="exact") -> Compose:
    chain, size = [], image_size
    for mapping in read_parts({"operators": operators}):
        chain.append(build_operator(mapping, image_size=size))
        if size is not None:  # the next operator's images are this one's measurements
            size = tuple(chain[-1].A(torch.zeros(1, 3, *validate.require_size(size), dtype=torch.float32)).shape[2:])
    chain = Compose(*chain, noise=noise)
    return chain if adjoint == "exact" else chain.with_adjoint(adjoint)


OPERATORS = {
    "inpainting_box": make_box_inpainting,
    "inpainting_random": make_random_inpainting,
    "inpainting_mask": Inpainting,
    **{kind.name: kind for kind in (SuperResolution, GaussianBlur, MotionBlur, Blur, Denoising)},
    **{kind.name: kind for kind in (Colorization, Clipping, PhaseRetrieval, NonlinearBlur, JPEG, JPEGRounding)},
    "compose": make_composition,
}
NOISES = {"none": lambda: None, "gaussian": GaussianNoise, "poisson": PoissonNoise}


def _read_mapping(mapping, what: str) -> dict:
    if not isinstance(mapping, Mapping) or "name" not in mapping:
        raise RestoreError(f"{what} must be a mapping with a 'name', got {mapping!r}")
    return {str(key): _to_plain(mapping[key]) for key in mapping}


def _to_plain(value):
    """Sequences of a configuration library as lists; arrays, tensors and mappings as they are."""
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return [_to_plain(item) for item in value] if is_list else value


def _make(maker: Callable, options: dict, name: str):
    parameters = inspect.signature(maker).parameters
    if not _accepts_any(parameters):
        naming.check_known(options, parameters, f"{name} has no option")
    for option, parameter in parameters.items():
        named = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if named and parameter.default is parameter.empty and options.get(option) is None:
            raise RestoreError(f"{name} needs the option '{option}'")
    return maker(**options)


def _accepts_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
