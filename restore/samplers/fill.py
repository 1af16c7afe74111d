"""Holes filled without a network, for samplers to start from: the surface of a thin plate under tension."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sparse
import scipy.sparse.linalg as linalg
import torch

from operators import RestoreError

TENSION = 0.1  # share of the membrane: dots are bridged as by a plate, holes of many pixels as by a membrane
DIRECT = 20_000  # missing pixels that are solved for at once; more of them by conjugate gradients


def fill_holes(y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return y (B, C, H, W) with values where the mask (1 or B, 1, H, W) is 0, those that minimise

        sum (L u)^2 + TENSION sum |grad u|^2,

    L being the Laplacian of the pixels' grid: a spline in tension (Schweikert 1966), between the biharmonic surface
    (best for single pixels) and the harmonic one (best for holes, where the former overshoots).
    """
    filled = y.detach().cpu().double().numpy().copy()
    for b in range(len(filled)):
        known = mask[b if len(mask) > 1 else 0, 0].cpu().numpy() > 0.5
        _fill(filled[b], known)
    return torch.from_numpy(filled).to(y)


def require_mask(operator, setting: str) -> torch.Tensor:
    """Return the mask of an inpainting operator. Raises RestoreError for another one."""
    mask = getattr(operator, "mask", None)
    if mask is None:
        raise RestoreError(f"{setting} fills holes and needs an inpainting operator, got {type(operator).__name__}")
    return mask


def _fill(image: np.ndarray, known: np.ndarray) -> None:
    """Fill an image (C, H, W) in place."""
    holes = ~known.ravel()
    height, width = known.shape
    steps = [sparse.diags([-1.0, 1.0], [0, 1], shape=(n - 1, n)) for n in (height, width)]
    gradient = sparse.vstack(
        [sparse.kron(steps[0], sparse.identity(width)), sparse.kron(sparse.identity(height), steps[1])]
    )
    laplacian = (gradient.T @ gradient).tocsr()
    rows = laplacian[holes] @ laplacian + TENSION * laplacian[holes]
    inner, pixels = rows[:, holes].tocsc(), image.reshape(len(image), -1)
    right = -(rows[:, ~holes] @ pixels[:, ~holes].T)
    if holes.sum() <= DIRECT:
        solution = linalg.splu(inner).solve(right)
    else:
        start = pixels[:, ~holes].mean(axis=1)
        scale = sparse.diags(1 / inner.diagonal())
        options = {"rtol": 1e-4, "maxiter": 1000, "M": scale}
        solution = np.stack(
            [linalg.cg(inner, right[:, c], np.full(len(right), start[c]), **options)[0] for c in range(len(image))], 1
        )
    pixels[:, holes] = solution.T
