"""Missing pixels: y = mask x. In every mask 1 is a known pixel and 0 a hole."""

from __future__ import annotations

import copy

import torch

from operators import spectral, validate
from operators.base import Operator
from operators.errors import RestoreError


class Inpainting(Operator):
    """y = mask * x, (B, C, H, W) -> (B, C, H, W); holes are 0 (mid-grey), and are noisy if there is noise.

    mask: see `as_mask`; (1, 1, H, W) for the whole batch or (B, 1, H, W) for one per image.
        `box_mask` and `random_mask` make the usual ones.
    adjoint="reference": the identity, `transpose` of the DPS and PSLD repositories.

    Raises RestoreError for a mask without holes or without known pixels, with NaN or values other
    than 0 and 1, and for images of another size.
    """

    name = "inpainting"
    has_reference = True

    def __init__(self, mask, *, noise=None, image_size=None, adjoint: str = "exact"):
        self.mask = as_mask(mask)
        size = tuple(self.mask.shape[2:])
        super().__init__(noise=noise, image_size=size if image_size is None else image_size, adjoint=adjoint)
        if self.image_size != size:
            raise RestoreError(
                f"the mask is {size[0]} x {size[1]} (height x width), but the image is {self.image_size[0]} x "
                f"{self.image_size[1]}; give a mask of the image's size."
            )

    def A(self, x: torch.Tensor) -> torch.Tensor:
        return self._mask(x) * x

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.adjoint == "reference" else self._mask(y) * y

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        """Closed form: a mask is its own pseudo-inverse."""
        return self._mask(y) * y

    def decompose(self, image_shape, full: bool):
        identity = (None, None, None)
        return spectral.KroneckerSVD(self.mask.double(), identity, identity)

    def __getitem__(self, rows) -> Inpainting:
        if len(self.mask) == 1:
            return self
        chosen = copy.copy(self)
        chosen.mask = validate.select_images(self.mask, rows, "masks")
        return chosen

    def _mask(self, x: torch.Tensor) -> torch.Tensor:
        validate.require_images(x)
        if tuple(x.shape[2:]) != self.image_size:
            raise RestoreError(
                f"the mask is {self.image_size[0]} x {self.image_size[1]} (height x width), but the image is "
                f"{x.shape[2]} x {x.shape[3]}; give a mask of the image's size."
            )
        if len(self.mask) not in (1, len(x)):
            raise RestoreError(f"there are {len(self.mask)} masks for {len(x)} images; give one, or one per image.")
        return self._buffer(("mask",), lambda: self.mask, x)


def as_mask(mask) -> torch.Tensor:
    """A checked float32 mask (1 or B, 1, H, W), 1 = known.

    mask: bool, or 0 and 1, or uint8 0 and 255; tensor or array of shape (H, W), (1, H, W) or (B, 1, H, W).
    Raises RestoreError for anything else, and where a mask has no known pixel or no hole.
    """
    try:
        mask = torch.as_tensor(mask).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise RestoreError(f"the mask must be a tensor or array, got {type(mask).__name__}.") from None
    shape = tuple(mask.shape)
    if mask.ndim in (2, 3) and mask.numel():
        mask = mask.reshape(-1, 1, *shape[-2:])
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.numel() == 0 or (len(shape) == 3 and shape[0] != 1):
        raise RestoreError(f"the mask must have one channel: (H, W), (1, H, W) or (B, 1, H, W), got {shape}.")
    if mask.dtype == torch.uint8 and mask.max() == 255:
        mask = mask / 255
    mask = mask.to(torch.float32)
    if torch.isnan(mask).any():
        raise RestoreError("the mask holds NaN; expected only 0 (hole) and 1 (known).")
    other = mask[(mask != 0) & (mask != 1)]
    if len(other):
        raise RestoreError(f"the mask must hold only 0 (hole) and 1 (known), found {other[0]:g}; threshold it first.")
    known = mask.flatten(1).mean(dim=1)
    if (known == 0).any():
        raise RestoreError("the mask has no known pixel (1 is known, 0 a hole); if it is inverted, use 1 - mask.")
    if (known == 1).any():
        raise RestoreError("the mask has no hole (1 is known, 0 a hole), so there is nothing to fill; use denoising.")
    return mask


def box_mask(image_size, *, size=None, margin=None, top=None, left=None, seed: int = 0) -> torch.Tensor:
    """A mask (1, 1, H, W) with one rectangular hole, at random from `seed` unless top and left are given.

    The law of DPS: top is uniform on the integers of [margin, H - size - margin), left likewise.

    image_size: H = W, or (H, W). size: of the hole, one number or (height, width); half the image by
    default. margin: smallest distance to the border, one number or (vertical, horizontal); 1/16 of the
    image by default. At 256 pixels these are DPS's 128 and 16. top, left: ignore margin and seed.
    Raises RestoreError where the hole does not fit.
    """
    image_size = validate.require_size(image_size)
    size = (
        tuple(max(side // 2, 1) for side in image_size) if size is None else validate.require_size(size, "the box size")
    )
    if margin is None:
        margin = tuple(side // 16 for side in image_size)
    else:
        margin = (margin, margin) if not isinstance(margin, (list, tuple)) else tuple(margin)
        margin = tuple(validate.require_integer(m, "the box margin", minimum=0) for m in margin)
    random = validate.make_random_state(seed)
    corner = []
    for side, length, gap, given in zip(image_size, size, margin, (top, left), strict=True):
        if given is not None:
            start = validate.require_integer(given, "the box corner", minimum=0)
            fits = start + length <= side
        else:
            fits = side - length - gap > gap
            start = random.randint(gap, side - length - gap) if fits else 0
        if not fits:
            raise RestoreError(
                f"a box of {size[0]} x {size[1]} with margin {gap} does not fit into an image of "
                f"{image_size[0]} x {image_size[1]}; choose a smaller size or margin, or another corner."
            )
        corner.append(start)
    mask = torch.ones(1, 1, *image_size)
    mask[..., corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]] = 0
    return mask


def random_mask(image_size, *, fraction=(0.3, 0.7), seed: int = 0) -> torch.Tensor:
    """A mask (1, 1, H, W) with single missing pixels, shared by the channels.

    The law of DPS: p is uniform on `fraction` = (low, high) (or equal to it, if it is one number), and
    exactly int(H W p) pixels, drawn without replacement, are holes.
    """
    height, width = validate.require_size(image_size)
    low, high = fraction if isinstance(fraction, (list, tuple)) else (fraction, fraction)
    low = validate.require_number(low, "the fraction of holes", low=0.0, high=1.0)
    high = validate.require_number(high, "the fraction of holes", low=low, high=1.0)
    random = validate.make_random_state(seed)
    holes = int(height * width * random.uniform(low, high))
    mask = torch.ones(height * width)
    mask[torch.from_numpy(random.choice(height * width, holes, replace=False))] = 0
    return mask.reshape(1, 1, height, width)
