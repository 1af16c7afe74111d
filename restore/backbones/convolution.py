"""3 x 3 convolutions in fewer products, of features that lie channels last, without gradients.

`convolve_tiles` is Winograd's F(4 x 4, 3 x 3) (Lavin & Gray 2016, arXiv 1509.09308), as GPU libraries choose it by
themselves: 36 products in place of 144 for 4 x 4 values of a pair of channels, and errors of 1e-5 of the largest value
in place of 1e-6. `convolve_enlarged` follows an enlargement by 2 to nearest neighbours: 16 products in place of 36 for
2 x 2 values, because of three neighbours in a row two are equal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# From 6 x 6 values of a tile, from 3 x 3 weights, and to 4 x 4 values: points 0, 1, -1, 2, -2 and infinity.
FROM_TILE = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
]
FROM_TILE += [[0, 4, 0, -5, 0, 1]]
FROM_WEIGHTS = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6]]
FROM_WEIGHTS += [[1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
TO_TILE = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
TILES = 64  # computed together, so that what is made of them stays in the processor's cache
# Of two neighbours in the enlarged image, what each takes from two of the image: of (left, here) and of (here, right).
PHASES = [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]


def _square(matrix: list) -> torch.Tensor:
    """Return the matrix of a separable map in two dimensions from that in one, float64."""
    one = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(one, one)


TILE, WEIGHTS, VALUES = (_square(matrix).float() for matrix in (FROM_TILE, FROM_WEIGHTS, TO_TILE))


def is_wide(c: int, k: int) -> bool:
    """Whether c channels to k make `convolve_tiles` faster, whose transforms take time, too (measured)."""
    return c * k > 46 * c + 22 * k


def can_tile(x: torch.Tensor, channels: int) -> bool:
    """Whether `convolve_tiles` fits x (B, C, H, W) and is faster for so many channels of its result."""
    b, c, h, w = x.shape
    return b * h * w >= 16 * 16 and is_wide(c, channels) and h % 4 == w % 4 == 0


def order_tiles(weight: torch.Tensor) -> torch.Tensor:
    """Return the (36, C, K) that `convolve_tiles` takes, of a weight (K, C, 3, 3)."""
    k, c = weight.shape[:2]
    return (WEIGHTS @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, c, k)


def convolve_tiles(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the convolution of x (B, C, H, W), sides divisible by 4, with zeros around: (B, K, H, W), channels last.

    weight: of `order_tiles`.
    """
    (b, c, h, w), k = x.shape, weight.shape[2]
    rows, columns, out = h // 4, w // 4, x.new_empty(b, h // 4, 4, w // 4, 4, k)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    image, row, column, _ = padded.stride()
    images = min(b, max(1, TILES // (rows * columns)))
    together = min(rows, max(1, TILES // columns))
    for first in range(0, b, images):
        for top in range(0, rows, together):
            part = out[first : first + images, top : top + together]
            size, strides = (6, 6, *part.shape[:2], columns, c), (row, column, image, 4 * row, 4 * column, 1)
            tiles = padded.as_strided(size, strides, first * image + top * 4 * row).reshape(36, -1)
            products = torch.bmm((TILE @ tiles).view(36, -1, c), weight)
            values = (VALUES @ products.view(36, -1)).view(4, 4, *part.shape[:2], columns, k).permute(2, 3, 0, 4, 1, 5)
            part.copy_(values) if bias is None else torch.add(values, bias, out=part)
    return out.view(b, h, w, k).permute(0, 3, 1, 2)


def order_enlarged(weight: torch.Tensor) -> torch.Tensor:
    """Return the (4 K, C, 2, 2) that `convolve_enlarged` takes, of a weight (K, C, 3, 3)."""
    phases = torch.tensor(PHASES, dtype=weight.dtype)
    parts = torch.einsum("pia,qjb,kcab->pqkcij", phases, phases, weight)
    return parts.reshape(-1, weight.shape[1], 2, 2).contiguous(memory_format=torch.channels_last)


def convolve_enlarged(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the convolution, with zeros around, of x (B, C, H, W) enlarged by 2: (B, K, 2 H, 2 W), channels last.

    weight: of `order_enlarged`.
    """
    b, _, h, w = x.shape
    k = len(weight) // 4
    phases = F.conv2d(x, weight, padding=1).permute(0, 2, 3, 1).unflatten(-1, (2, 2, k))
    out = x.new_empty(b, h, 2, w, 2, k)
    for i in range(2):
        for j in range(2):
            phase, part = phases[:, i : i + h, j : j + w, i, j], out[:, :, i, :, j]
            part.copy_(phase) if bias is None else torch.add(phase, bias, out=part)
    return out.view(b, 2 * h, 2 * w, k).permute(0, 3, 1, 2)
