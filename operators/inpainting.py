"""Missing pixels: y = mask x. In every mask 1 is a known pixel and 0 a hole."""

from __future__ import annotations

import torch

from operators import spectral, validate
from operators.base import Operator
from operators.errors import RestoreError


class Inpainting(Operator):
    """y = mask * x, (B, C, H, W) -> (B, C, H, W); holes are 0 (mid-grey), and are noisy if there is noise.

    mask: see `as_mask`; (1, 1, H, W) for the whole batch or (B, 1, H, W) for one per image.
    adjoint="reference": the identity, `transpose` of the DPS and PSLD repositories.
    Raises RestoreError for images of another size, and as `as_mask` does.
    """

    name = "inpainting"
    has_reference = True

    def __init__(self, mask, *, noise=None, image_size=None, adjoint="exact"):
        self.mask = as_mask(mask)
        height, width = self.mask.shape[2:]
        super().__init__(noise=noise, image_size=(height, width) if image_size is None else image_size, adjoint=adjoint)
        if self.image_size != (height, width):
            expected = "{} x {}".format(*self.image_size)
            raise RestoreError(f"mask must be {expected} (height x width), the image_size, got {height} x {width}")

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self._check_image(x)
        validate.require_count(self.mask, "mask", x)
        return self._buffer(("mask",), lambda: self.mask, x.dtype, x.device) * x

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.adjoint == "reference" else self.A(y)

    A_dagger = A  # a mask is its own pseudo-inverse

    def decompose(self, image_shape, full: bool):
        return spectral.KroneckerSVD(self.mask.double())

    def __getitem__(self, rows) -> Inpainting:
        return self if len(self.mask) == 1 else self._with(mask=validate.select_images(self.mask, rows, "masks"))


def as_mask(mask) -> torch.Tensor:
    """Return a float32 mask (1 or B, 1, H, W), 1 = known.

    mask: bool, or 0 and 1, or uint8 0 and 255; tensor or array of shape (H, W), (1, H, W) or (B, 1, H, W).
    Raises RestoreError for anything else, and if a mask has no known pixel or no hole.
    """
    mask = validate.require_tensor(mask, "mask")
    shape = tuple(mask.shape)
    if mask.ndim in (2, 3) and mask.numel():
        mask = mask.reshape(-1, 1, *shape[-2:])
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.numel() == 0 or (len(shape) == 3 and shape[0] != 1):
        raise RestoreError(f"mask must have one channel, (H, W), (1, H, W) or (B, 1, H, W), got {shape}")
    if mask.dtype == torch.uint8 and mask.max() == 255:
        mask = mask / 255
    mask = mask.to(torch.float32)
    other = mask[(mask != 0) & (mask != 1)]
    if len(other):
        raise RestoreError(f"mask must hold only 0 (hole) and 1 (known), got {other[0]:g}; try a threshold")
    known = mask.flatten(1).mean(dim=1)
    if (known == 0).any():
        raise RestoreError("mask must have a known pixel (1), got only holes (0); try 1 - mask if it is inverted")
    if (known == 1).any():
        raise RestoreError("mask must have a hole (0), got only known pixels (1); try denoising")
    return mask


def box_mask(image_size, *, size=None, margin=None, top=None, left=None, seed: int = 0) -> torch.Tensor:
    """Return a mask (1, 1, H, W) with one rectangular hole, at random from `seed` unless top and left are given.

    As in DPS, top is uniform on the integers of [margin, H - size - margin), left likewise.

    image_size: H = W, or (H, W). size: of the hole, one number or (height, width); None: half the image. margin: least
    distance to the border, one number or (vertical, horizontal); None: 1/16 of the image (DPS's at 256 pixels).
    top, left: ignore margin and seed. Raises RestoreError if the hole does not fit.
    """
    image_size = validate.require_size(image_size)
    size = validate.require_size(tuple(max(side // 2, 1) for side in image_size) if size is None else size, "size")
    margin = tuple(side // 16 for side in image_size) if margin is None else margin
    margin = margin if isinstance(margin, (list, tuple)) else (margin, margin)
    random = validate.make_random_state(seed)
    corner = []
    for side, length, gap, given in zip(image_size, size, margin, (top, left), strict=True):
        gap = validate.require_integer(gap, "margin", minimum=0)
        last = side - length if given is not None else side - length - gap - 1
        start = gap if given is None else validate.require_integer(given, "top and left", minimum=0)
        if start > last:
            given = f"{size} with margin {gap}; try a smaller size or margin, or another top and left"
            raise RestoreError(f"size must fit into the image of {image_size}, got {given}")
        corner.append(random.randint(gap, last + 1) if given is None else start)
    mask = torch.ones(1, 1, *image_size, dtype=torch.float32)
    mask[..., corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]] = 0
    return mask


def random_mask(image_size, *, fraction=(0.3, 0.7), seed: int = 0) -> torch.Tensor:
    """Return a mask (1, 1, H, W) with single missing pixels, shared by the channels.

    As in DPS, p is uniform on `fraction` = (low, high) (or equal to it, if it is one number), and
    exactly int(H W p) pixels, drawn without replacement, are holes.
    """
    height, width = validate.require_size(image_size)
    low, high = fraction if isinstance(fraction, (list, tuple)) else (fraction, fraction)
    low = validate.require_number(low, "fraction", low=0.0, high=1.0)
    high = validate.require_number(high, "fraction", low=low, high=1.0)
    random = validate.make_random_state(seed)
    holes = int(height * width * random.uniform(low, high))
    mask = torch.ones(height * width, dtype=torch.float32)
    mask[torch.from_numpy(random.choice(height * width, holes, replace=False))] = 0
    return mask.reshape(1, 1, height, width)
