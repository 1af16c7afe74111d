"""Many images degraded by one task, with the same bytes in every batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import operators
from operators import RestoreError
from restore.backbones.ambient import neutral_state
from restore.samplers.noise import derive_seed, measurement_generator


@neutral_state("cpu")
def measure_batch(
    config: Mapping[str, Any], x: torch.Tensor, image_ids: Sequence[str], *, seed: int = 0, per_image: bool = False
) -> tuple[Any, torch.Tensor]:
    """Degrade images (B, 3, H, W) and return (operator, y).

    config: as operators.build_operator takes it. per_image: a random mask or kernel of its own for every image.
    Each image's operator and noise depend only on (seed, its id): y has the same bytes in every batch and on every
    device.
    Raises RestoreError for operators that cannot share a batch.
    """
    size = tuple(x.shape[-2:])
    check_sharing(config, per_image, len(image_ids))
    if per_image:
        # numpy's legacy generators, which the masks' published law uses, take 32-bit seeds.
        seeds = [derive_seed(seed, image_id, "operator") % 2**32 for image_id in image_ids]
        each = [operators.build_operator({**config, "seed": own}, image_size=size) for own in seeds]
    else:
        each = [operators.build_operator(dict(config), image_size=size)] * len(image_ids)
    y = [A(x[b : b + 1], measurement_generator(seed, image_ids[b])) for b, A in enumerate(each)]
    return join_operators(each) if per_image else each[0], torch.cat(y)


@neutral_state("cpu")
def check_operator(config: Mapping[str, Any], size: tuple[int, int], *, per_image: bool, count: int) -> None:
    """Raise RestoreError if `measure_batch` could not make the operator of `count` images of size (H, W)."""
    check_sharing(config, per_image, count)
    A = operators.build_operator({**config, "seed": 0} if per_image else dict(config), image_size=size)
    if per_image and count > 1:
        join_operators([A, A])


def check_sharing(config: Mapping[str, Any], per_image: bool, count: int) -> None:
    """Raise RestoreError if images cannot share a batch of `count` because each has a margin of its own."""
    if per_image and count > 1 and any(operators.read_extent(config)[1]):
        raise RestoreError(
            "border must be 'reflect' or 'circular' for per_image=true, got 'unknown': each kernel has a margin of its "
            "own, and images of different sizes cannot share a batch; try batch=1"
        )


def join_operators(each: Sequence[Any]) -> Any:
    """Return one operator for a batch of images with masks or kernels of their own.

    Raises RestoreError for other operators.
    """
    first = each[0]
    if len(each) == 1:
        return first
    common = {"noise": first.noise, "image_size": first.image_size, "adjoint": first.adjoint}
    if isinstance(first, operators.Inpainting):
        joined = operators.Inpainting(torch.cat([a.mask for a in each]), **common)
    elif isinstance(first, operators.Blur) and first.linear:
        joined = operators.Blur(torch.stack([a.kernel for a in each]), border=first.border, **common)
    else:
        raise RestoreError(f"operators of {first.name} cannot share a batch; give batch=1, or per_image=false")
    joined.name = first.name  # by which presets are found
    return joined
