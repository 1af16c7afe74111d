"""An operator from a mapping, such as a file of configs/task."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence

import torch

from operators import validate
from operators.base import Compose, Operator
from operators.blur import Blur, GaussianBlur, MotionBlur
from operators.errors import RestoreError
from operators.inpainting import Inpainting, box_mask, random_mask
from operators.noise import GaussianNoise, PoissonNoise
from operators.pointwise import BT601, Colorization, Denoising
from operators.super_resolution import SuperResolution


def build(mapping: Mapping, *, image_size=None) -> Operator:
    """{"name": ..., option: value, ..., "noise": {"name": "gaussian", "sigma": 0.05}} -> Operator.

    Names and options (besides noise, image_size and adjoint, which all have):
        inpainting_box      size, margin, top, left, seed         (`box_mask`; needs image_size)
        inpainting_random   fraction, seed                        (`random_mask`; needs image_size)
        inpainting_mask     mask                                  (`Inpainting`)
        super_resolution    factor, method                        (`SuperResolution`)
        gaussian_blur       kernel_size, std                      (`GaussianBlur`)
        motion_blur         kernel_size, intensity, seed          (`MotionBlur`)
        blur                kernel, normalize                     (`Blur`)
        denoising
        colorization        weights                               (`Colorization`)
        compose             operators: list of such mappings, the first is applied first (`Compose`)
    Noise: None, {"name": "none"}, {"name": "gaussian", "sigma"}, {"name": "poisson", "rate", "clip"},
    or a noise model.

    image_size: (H, W) of the images, unless the mapping has one.
    Raises RestoreError for an unknown name or option (with the nearest known one) and a missing option.
    """
    options = _options(mapping, "an operator")
    builder = _lookup(OPERATORS, options.pop("name"), "operator")
    if image_size is not None and options.get("image_size") is None:
        options["image_size"] = image_size
    options["noise"] = build_noise(options.get("noise"))
    return _call(builder, options, mapping["name"])


def options(name: str) -> list[str]:
    """The options of the operator `name`, without noise, image_size and adjoint. RestoreError if unknown."""
    common = ("noise", "image_size", "adjoint")
    return [key for key in inspect.signature(_lookup(OPERATORS, name, "operator")).parameters if key not in common]


def build_noise(mapping):
    """A noise model from its mapping, see `build`."""
    if mapping is None or isinstance(mapping, (GaussianNoise, PoissonNoise)):
        return mapping
    options = _options(mapping, "noise")
    return _call(_lookup(NOISES, options.pop("name"), "noise"), options, mapping["name"])


def _inpainting_box(
    *, image_size, size=None, margin=None, top=None, left=None, seed=0, noise=None, adjoint="exact"
) -> Operator:
    mask = box_mask(image_size, size=size, margin=margin, top=top, left=left, seed=seed)
    return Inpainting(mask, noise=noise, adjoint=adjoint)


def _inpainting_random(*, image_size, fraction=(0.3, 0.7), seed=0, noise=None, adjoint="exact") -> Operator:
    return Inpainting(random_mask(image_size, fraction=fraction, seed=seed), noise=noise, adjoint=adjoint)


def _inpainting_mask(*, mask, noise=None, image_size=None, adjoint="exact") -> Operator:
    return Inpainting(mask, noise=noise, image_size=image_size, adjoint=adjoint)


def _super_resolution(*, factor, method="bicubic", noise=None, image_size=None, adjoint="exact") -> Operator:
    return SuperResolution(factor, method=method, noise=noise, image_size=image_size, adjoint=adjoint)


def _gaussian_blur(*, kernel_size=61, std=3.0, noise=None, image_size=None, adjoint="exact") -> Operator:
    return GaussianBlur(kernel_size, std, noise=noise, image_size=image_size, adjoint=adjoint)


def _motion_blur(*, kernel_size=61, intensity=0.5, seed=0, noise=None, image_size=None, adjoint="exact") -> Operator:
    return MotionBlur(kernel_size, intensity, seed, noise=noise, image_size=image_size, adjoint=adjoint)


def _blur(*, kernel, normalize=False, noise=None, image_size=None, adjoint="exact") -> Operator:
    return Blur(kernel, normalize=normalize, noise=noise, image_size=image_size, adjoint=adjoint)


def _denoising(*, noise=None, image_size=None, adjoint="exact") -> Operator:
    return Denoising(noise=noise, image_size=image_size, adjoint=adjoint)


def _colorization(*, weights=BT601, noise=None, image_size=None, adjoint="exact") -> Operator:
    return Colorization(weights=weights, noise=noise, image_size=image_size, adjoint=adjoint)


def _compose(*, operators, noise=None, image_size=None, adjoint="exact") -> Operator:
    if not isinstance(operators, (Sequence, tuple)) or isinstance(operators, str) or not len(operators):
        raise RestoreError("compose needs the option 'operators': a list of operator mappings, not empty.")
    chain, size = [], image_size
    for mapping in operators:
        chain.append(build({"adjoint": adjoint, **_options(mapping, "an operator")}, image_size=size))
        if size is not None:  # the next operator sees what this one makes of the image
            size = tuple(chain[-1].A(torch.zeros(1, 3, *validate.size_pair(size))).shape[2:])
    return Compose(*chain, noise=noise)


OPERATORS = {
    "inpainting_box": _inpainting_box,
    "inpainting_random": _inpainting_random,
    "inpainting_mask": _inpainting_mask,
    "super_resolution": _super_resolution,
    "gaussian_blur": _gaussian_blur,
    "motion_blur": _motion_blur,
    "blur": _blur,
    "denoising": _denoising,
    "colorization": _colorization,
    "compose": _compose,
}
NOISES = {"none": lambda: None, "gaussian": GaussianNoise, "poisson": PoissonNoise}


def _options(mapping, what: str) -> dict:
    if not isinstance(mapping, Mapping) or "name" not in mapping:
        raise RestoreError(f"{what} must be a mapping with a 'name', got {mapping!r}.")
    return {str(key): _plain(mapping[key]) for key in mapping}


def _plain(value):
    """Sequences of a configuration library as lists; arrays, tensors and mappings as they are."""
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return [_plain(item) for item in value] if is_list else value


def _lookup(table: Mapping, name, what: str):
    if not isinstance(name, str) or name not in table:
        raise RestoreError(f"unknown {what} {name!r}; {_nearest(name, table)}.")
    return table[name]


def _call(builder, options: dict, name: str):
    parameters = inspect.signature(builder).parameters
    for option in options:
        if option not in parameters:
            raise RestoreError(f"{name} has no option {option!r}; {_nearest(option, parameters)}.")
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and options.get(option) is None:
            raise RestoreError(f"{name} needs the option {option!r}.")
    return builder(**options)


def _nearest(name, known) -> str:
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(known) or 'none'}"
