"""Sets of true images that results are compared with: files, or an .npz of guided-diffusion's evaluator."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from operators import RestoreError
from restore import disk
from restore.images.folder import list_images, read_image_size, read_rgb

FEATURES = 2048  # of Inception's last pooling layer, whose statistics an .npz holds


@dataclass(frozen=True)
class ReferenceSet:
    """Images, and the statistics of a larger set if an .npz has them.

    paths: image files. archive: in their place an .npz with `arr_0`, uint8 (N, H, W, 3), or `mu` and `sigma`, the mean
    (2048,) and covariance (2048, 2048) of Inception's features, or all of these (guided-diffusion's reference batches).
    size: side in pixels to which every image is brought, see `crop_center`; None: as it is.
    """

    paths: tuple[Path, ...] = ()
    archive: Path | None = None
    size: int | None = None

    def __len__(self) -> int:
        return len(self.paths) if self.archive is None else len(self._arrays.get("arr_0", ()))

    @property
    def place(self) -> Path | None:
        """The folder or the .npz."""
        return self.archive or (self.paths[0].parent if self.paths else None)

    @property
    def statistics(self) -> dict[str, np.ndarray] | None:
        """`mu` and `sigma` of the .npz, None without."""
        if self.archive is None or "mu" not in self._arrays:
            return None
        return {key: self._arrays[key] for key in ("mu", "sigma")}

    def read(self, first: int, last: int) -> list[np.ndarray]:
        """Return images first to last - 1 as uint8 (H, W, 3)."""
        if self.archive is None:
            images = [read_rgb(path) for path in self.paths[first:last]]
        else:
            images = list(self._arrays["arr_0"][first:last])
        return images if self.size is None else [crop_center(image, self.size) for image in images]

    def hash(self) -> str:
        """Return a hash of the files' contents, and of `size` if that is set."""
        digest = disk.hash_files(list(self.paths)) if self.archive is None else disk.hash_file(self.archive)
        return digest if self.size is None else f"{digest}-{self.size}"

    def describe(self) -> dict[str, Any]:
        """Return the protocol's entry: how many images, of which contents, and how they were brought to one size."""
        entry: dict[str, Any] = {"count": len(self), "sha256": self.hash()}
        if self.size is not None:
            entry["resized"] = f"shorter side to {self.size} pixels (halved by box filter, then bicubic), centre crop"
        if self.statistics is not None:
            entry["fid"] = "against mu and sigma of the .npz"
        return entry

    def check_one_size(self) -> None:
        """Raise RestoreError, naming the images of another size than most, unless all have one or `size` is set."""
        if self.size is not None or self.archive is not None:
            return
        sizes: dict[tuple[int, int], list[str]] = {}
        for path in self.paths:
            sizes.setdefault(read_image_size(path), []).append(path.name)
        most = max(sizes, key=lambda size: len(sizes[size]), default=None)
        others = [f"{name} ({size[1]} x {size[0]})" for size, names in sizes.items() if size != most for name in names]
        if others:
            shown = ", ".join(others[:10] + ["..."] * (len(others) > 10))
            raise RestoreError(
                f"the images in {self.place} must have one size, most have {most[1]} x {most[0]}, got {shown}; bring"
                " them to one, remove them, or for a reference give reference_size=PIXELS"
            )

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        return _read_archive(self.archive)


def load_reference(place: str | os.PathLike, size: int | None = None) -> ReferenceSet:
    """Return the reference in a folder or an .npz. size: see ReferenceSet. Raises RestoreError if there is none."""
    if size is not None and size < 1:
        raise RestoreError(f"reference_size must be a whole number of pixels from 1 on, or null, got {size}")
    path = Path(place).expanduser()
    if path.suffix.lower() == ".npz":
        reference = ReferenceSet(archive=path, size=size)
        len(reference)  # read and checked now
        return reference
    return ReferenceSet(tuple(list_images(path)[0].values()), size=size)


def as_reference(images: ReferenceSet | Sequence[Path] | None) -> ReferenceSet:
    """Return files as a ReferenceSet; one that is one already is returned unchanged."""
    return images if isinstance(images, ReferenceSet) else ReferenceSet(tuple(images or ()))


def crop_center(image: np.ndarray, size: int) -> np.ndarray:
    """Return the square in the centre of an image (H, W, 3) uint8, `size` pixels wide: the shorter side is halved by a
    box filter while it is twice as long or more, then brought to `size` by bicubic interpolation (the rule by which
    guided-diffusion prepares ImageNet)."""
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(tuple(round(side * scale) for side in picture.size), Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in picture.size)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in ("arr_0", "mu", "sigma") if key in archive.files}
    except FileNotFoundError:
        raise RestoreError(f"the reference {path} does not exist") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RestoreError(f"the reference {path} is not a readable .npz: {str(error).splitlines()[0]}") from None
    images = arrays.get("arr_0")
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3):
        raise RestoreError(f"arr_0 of {path} must be uint8 (N, H, W, 3), got {images.dtype} {images.shape}")
    shapes = {"mu": (FEATURES,), "sigma": (FEATURES, FEATURES)}
    for key, shape in shapes.items():
        if any(name in arrays for name in shapes) and (key not in arrays or arrays[key].shape != shape):
            raise RestoreError(
                f"{path} must hold {key} of shape {shape}, got {getattr(arrays.get(key), 'shape', 'none')}"
            )
    if not arrays:
        raise RestoreError(
            f"{path} must hold arr_0, or mu and sigma, as guided-diffusion's reference batches, got neither"
        )
    return arrays


def to_batch(images: Sequence[np.ndarray], device: str) -> torch.Tensor:
    """Return images of one size as uint8 (B, 3, H, W) on a device."""
    return torch.stack([torch.from_numpy(image.copy()).permute(2, 0, 1) for image in images]).to(device)
