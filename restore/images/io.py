"""Pixels in, pixels out: files, PIL and numpy on one side, float tensors in [-1, 1] on the other.

Nothing is ever stretched: 8 bits are round((x + 1) * 127.5) clamped to 0..255, 16 bits likewise.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from operators import RestoreError
from restore import atomic
from restore.images import sixteen

_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP", ".bmp": "BMP"}
_FORMATS |= {".png": "PNG", ".ppm": "PPM", ".pgm": "PPM"}
_SAVE = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95, "method": 4}}
_SAVE |= {"TIFF": {"compression": "tiff_adobe_deflate"}, "PNG": {"optimize": False}}
_ORIENTATION, _EXIF_IFD, _EXIF_SIZES = 0x0112, 0x8769, (0xA002, 0xA003)
_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # ITU-R BT.601, as Pillow's "L"
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    KeyError,
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
)


@dataclass(frozen=True)
class ImageRecord:
    """A photo read from a file, with what is needed to write its restored version back in kind.

    pixels: (1, 3, H, W) float32 in [-1, 1], upright. alpha: (1, 1, H, W) in [0, 1] or None.
    path, format: where it came from and Pillow's format name. grey: it had no colour. bits: 8 or 16.
    icc, exif: embedded profile and EXIF block (orientation removed), or None.
    orientation: the EXIF orientation (1 to 8) the file had; already applied to `pixels`.
    """

    pixels: torch.Tensor = field(repr=False)
    path: Path
    format: str
    grey: bool = False
    bits: int = 8
    alpha: torch.Tensor | None = field(default=None, repr=False)
    icc: bytes | None = field(default=None, repr=False)
    exif: bytes | None = field(default=None, repr=False)
    orientation: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[-2], self.pixels.shape[-1]


@contextmanager
def _explained(path: Path, kind: str, hint: str) -> Iterator[None]:
    """Within the block, what the readers of files raise becomes one sentence."""
    try:
        yield
    except RestoreError:
        raise
    except FileNotFoundError as error:
        raise RestoreError(f"There is no file {path}.") from error
    except _BROKEN as error:
        raise RestoreError(f"{path} is not a readable {kind} ({error}): {hint}.") from error


def read_image(path: str | Path) -> ImageRecord:
    """Read a photo: 8 or 16 bits, grey, RGB, palette, CMYK (its profile is dropped), with or without alpha.

    EXIF orientation is applied. Raises RestoreError, naming the file, when it is missing, no image,
    truncated, animated or multi-page, or stored as 32-bit numbers.
    """
    path = Path(path)
    with _explained(path, "image", "it may be truncated or of another type"), PIL.Image.open(path) as opened:
        frames = getattr(opened, "n_frames", 1) if opened.format != "MPO" else 1  # MPO: a phone's JPEG with extras
        if frames > 1:
            raise RestoreError(f"{path} holds {frames} frames or pages: extract the one to restore into its own file.")
        bits = 16 if sixteen.is_sixteen_bit(opened) else 8
        if bits == 8:
            samples, image = None, opened
            image.load()
        else:
            samples, image = sixteen.read(path)
        if samples is None:
            samples = _eight_bit_samples(image, path)
        exif = image.getexif()  # after loading: PNG keeps it behind the pixels, TIFF has applied it by now
        icc = image.info.get("icc_profile") if image.mode != "CMYK" else None
        image_format = "JPEG" if opened.format == "MPO" else opened.format
    orientation = exif.get(_ORIENTATION, 1)
    values = torch.from_numpy(np.ascontiguousarray(upright(samples, orientation)).astype(np.float32))
    values = values.permute(2, 0, 1)[None] / (255 if bits == 8 else 65535)
    channels = values.shape[1]
    colour = values[:, :1].expand(-1, 3, -1, -1) if channels <= 2 else values[:, :3]
    return ImageRecord(
        pixels=(colour * 2 - 1).contiguous(),
        path=path,
        format=image_format or "PNG",
        grey=channels <= 2,
        bits=bits,
        alpha=values[:, -1:].contiguous() if channels in (2, 4) else None,
        icc=icc,
        exif=_upright_exif(exif) if image_format in ("JPEG", "PNG", "WEBP") else None,
        orientation=orientation if orientation in range(1, 9) else 1,
    )


def write_image(path: str | Path, image: torch.Tensor, like: ImageRecord | None = None, colour: bool = False) -> None:
    """Write `image`, (3, H, W) or (1, 3, H, W) in about [-1, 1] (clamped), in the format of `path`'s suffix.

    like: the photo it was made from: greyscale, alpha (resized if the size changed), 16 bits, colour
    profile and EXIF are carried over as far as the format can hold them. colour=True keeps colours
    although `like` was grey (colorization). JPEG and WebP are written at quality 95, JPEG without
    chroma subsampling. Atomic (see `atomic.writing`).
    Raises RestoreError for NaN or infinite pixels, an unknown suffix, alpha into a JPEG, more
    pixels than the format can hold, a full disk.
    """
    path = Path(path)
    image_format = _FORMATS.get(path.suffix.lower())
    if image_format is None:
        raise RestoreError(f"Cannot write {path}: the name must end in one of {' '.join(_FORMATS)}.")
    samples = _checked(image)
    if like is not None and like.grey and not colour:
        samples = (samples * _LUMA).sum(1, keepdim=True)
    samples = (samples + 1) / 2
    alpha = like.alpha if like is not None else None
    if alpha is not None:
        if image_format in ("JPEG", "PPM"):
            raise RestoreError(
                f"Cannot write {path}: {image_format} has no transparency and {like.path} has; write a PNG."
            )
        if alpha.shape[-2:] != samples.shape[-2:]:
            alpha = F.interpolate(alpha, samples.shape[-2:], mode="bilinear", antialias=True)
        if image_format == "TIFF" and samples.shape[1] == 1:  # few programs open grey + alpha TIFF files
            samples = samples.expand(-1, 3, -1, -1)
        samples = torch.cat([samples, alpha], 1)
    deep = like is not None and like.bits == 16 and image_format in ("PNG", "TIFF")
    array = _quantise(samples[0].permute(1, 2, 0), 65535 if deep else 255)
    icc = like.icc if like is not None and (not like.grey or not colour) else None  # a grey profile fits no RGB
    exif = like.exif if like is not None and image_format in ("JPEG", "PNG", "WEBP") else None
    if deep:
        content = sixteen.png_bytes(array, icc, exif) if image_format == "PNG" else sixteen.tiff_bytes(array, icc)
    else:
        options = {"icc_profile": icc} if icc else {}
        options |= {"exif": exif} if exif else {}
        buffer = io.BytesIO()
        picture = PIL.Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
        try:
            picture.save(buffer, image_format, **_SAVE.get(image_format, {}), **options)
        except (OSError, ValueError) as error:  # more pixels than the format can address
            raise RestoreError(f"Cannot write {path} as {image_format}: {error}; write a PNG.") from error
        content = buffer.getvalue()
    atomic.write_bytes(path, content)


def to_tensor(image: PIL.Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) float32 in [-1, 1] from a PIL image, a numpy array or a tensor; grey becomes three channels.

    PIL: any 8-bit mode, alpha dropped. numpy, (H, W), (H, W, C) or (B, H, W, C): uint8 counts 0..255,
    uint16 0..65535, floats must lie in [0, 1]. torch, (C, H, W) or (B, C, H, W): uint8 counts 0..255,
    floats are taken as [-1, 1] already (a noisy measurement may leave it). C is 1, 3 or 4 (alpha dropped).
    Raises RestoreError for NaN, another shape or type, or values that cannot be on that range.
    """
    if isinstance(image, PIL.Image.Image):
        sixteen_bit = image.mode.startswith("I;16")
        return to_tensor(
            np.asarray(image).astype(np.uint16) if sixteen_bit else _eight_bit_samples(image, "The picture")
        )
    if isinstance(image, np.ndarray):
        if image.ndim == 2:
            image = image[:, :, None]
        if image.ndim not in (3, 4) or image.shape[-1] not in (1, 2, 3, 4):
            raise RestoreError(f"A numpy image must be (H, W), (H, W, C) or (B, H, W, C), not {image.shape}.")
        scale = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0, np.dtype(bool): 1.0}.get(image.dtype)
        if scale is None and image.dtype.kind != "f":
            raise RestoreError(f"A numpy image must be uint8, uint16, bool or float, not {image.dtype}.")
        if scale is None and not (image.min() >= -1e-6 and image.max() <= 1 + 1e-6):  # also catches NaN
            raise RestoreError(
                f"A float numpy image must lie in [0, 1], this one spans {image.min():.4g} to {image.max():.4g}: "
                "rescale it, or pass a torch tensor in [-1, 1]."
            )
        values = torch.from_numpy(np.ascontiguousarray(image).astype(np.float32)) / (scale or 1.0) * 2 - 1
        return _three_channels(values.movedim(-1, -3))
    if not isinstance(image, torch.Tensor):
        raise RestoreError(
            f"An image must be a PIL image, a numpy array or a torch tensor, not {type(image).__name__}."
        )
    values = image.float() / 127.5 - 1 if image.dtype == torch.uint8 else image
    if not values.is_floating_point():
        raise RestoreError(f"An image tensor must be uint8 or float, not {image.dtype}.")
    if not torch.isfinite(values).all():
        raise RestoreError("The image holds NaN or infinite pixels: find out which step made them.")
    if values.numel() and values.abs().max() > 16:  # far beyond any noise on [-1, 1]: surely 0..255
        raise RestoreError(
            f"A float tensor is taken as [-1, 1], not up to {values.abs().max():.4g}: divide by 127.5, subtract 1."
        )
    return _three_channels(values.float())


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """uint8 (H, W, 3), or (B, H, W, 3) for a batch, from [-1, 1]: clamp and round. RestoreError for NaN."""
    if image.ndim not in (3, 4) or image.shape[-3] != 3:
        raise RestoreError(f"Expected an image tensor (3, H, W) or (B, 3, H, W), not {tuple(image.shape)}.")
    if not torch.isfinite(image).all():
        raise RestoreError("The image holds NaN or infinite pixels: the run diverged; try a smaller step size.")
    return _quantise((image.detach().float().cpu().movedim(-3, -1) + 1) / 2, 255)


def to_pil(image: torch.Tensor) -> PIL.Image.Image:
    """An RGB picture from one image tensor, (3, H, W) or (1, 3, H, W) in [-1, 1]: clamp and round."""
    return PIL.Image.fromarray(to_uint8(_checked(image)[0]))


def read_mask(path: str | Path, size: tuple[int, int] | None = None, threshold: int | None = None) -> torch.Tensor:
    """An inpainting mask (1, 1, H, W) float32: 1 (white, 255) where the pixel is known, 0 (black) where it is missing.

    size: the photo's (height, width), which the mask must have. threshold: for a mask with grey edges,
    count values above it (0 to 254) as white; without it any value but 0 and 255 is an error.
    Raises RestoreError also for a mask with colours or transparency, or that is all white or all black.
    """
    record = read_image(path)
    pixels = (record.pixels + 1) * 127.5
    if record.alpha is not None and bool((record.alpha < 1).any()):
        raise RestoreError(f"The mask {path} has transparent parts: save it as black (missing) and white (known).")
    if not torch.equal(pixels[:, :1], pixels[:, 1:2]) or not torch.equal(pixels[:, :1], pixels[:, 2:]):
        raise RestoreError(f"The mask {path} has colours: save it as black (missing) and white (known).")
    if size is not None and record.size != tuple(size):
        expected, found = (f"{width} x {height}" for height, width in (size, record.size))
        raise RestoreError(
            f"The mask {path} is {found} pixels and the photo is {expected}: they must be the same size."
        )
    mask = pixels[:, :1]
    if threshold is None:
        between = ((mask > 0.5) & (mask < 254.5)).double().mean().item()
        if between:
            raise RestoreError(
                f"The mask {path} must be black (0: missing) and white (255: known) only, but {between:.2%} of it lies "
                "between: draw it without soft edges and save it as PNG, or set a threshold."
            )
    mask = (mask > (127 if threshold is None else threshold)).float()
    if mask.min() == mask.max():
        what = "white: nothing is missing" if mask.max() else "black: no pixel is known"
        raise RestoreError(f"The mask {path} is all {what}; paint what is to be restored black and the rest white.")
    return mask


def read_kernel(path: str | Path) -> torch.Tensor:
    """A blur kernel (kh, kw) float64 from .npy, .txt, .csv (numbers as they are) or a grey picture.

    Numbers must sum to one within 1e-3 and are not rescaled: a kernel that brightens is a mistake more
    often than a wish. A picture's 8- or 16-bit grey values cannot sum to one, so they are divided by
    their sum. Raises RestoreError for NaN, a wrong sum, more than two dimensions, an unreadable file.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    with _explained(path, "kernel", "expected .npy, .txt, .csv or a grey picture"):
        if suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        elif suffix in (".txt", ".csv"):
            text = path.read_text(encoding="utf-8").replace(",", " ").replace(";", " ")
            values = np.loadtxt(io.StringIO(text), ndmin=2)
        else:
            record = read_image(path)
            if not record.grey and not torch.equal(record.pixels[:, 0], record.pixels[:, 1]):
                raise RestoreError(f"The kernel picture {path} has colours: a kernel must be grey.")
            values = record.pixels[0, 0].double().add(1).div(2).numpy()
            if values.sum() == 0:
                raise RestoreError(f"The kernel picture {path} is all black.")
            values = values / values.sum()
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "fiu":
        raise RestoreError(f"The kernel {path} must be a table of numbers, not {values.dtype} of shape {values.shape}.")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise RestoreError(f"The kernel {path} holds NaN or infinite values.")
    if abs(values.sum() - 1) > 1e-3:
        raise RestoreError(f"The kernel {path} sums to {values.sum():.6g} instead of 1: divide it by its sum.")
    return torch.from_numpy(values)


def upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (1 to 8, TIFF 6.0 tag 274) on an array (H, W, ...)."""
    flips = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }
    return flips[orientation](samples) if orientation in flips else samples


def _eight_bit_samples(image: PIL.Image.Image, path: str | Path) -> np.ndarray:
    """uint8 (H, W, C) with C = 1 grey, 2 grey + alpha, 3, 4; transparent palettes and colours become alpha."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise RestoreError(f"{path} stores 32-bit numbers with no agreed range: convert it to 8 or 16 bits a channel.")
    transparent = image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info
    grey = image.mode in ("1", "L", "LA", "La")
    mode = ("LA" if transparent else "L") if grey else ("RGBA" if transparent else "RGB")
    if grey and transparent and image.mode not in ("LA", "La"):
        image = image.convert("RGBA")  # Pillow turns a transparent grey value into alpha only this way
    array = np.asarray(image.convert(mode))
    return array[:, :, None] if array.ndim == 2 else array


def _upright_exif(exif: PIL.Image.Exif) -> bytes | None:
    if not len(exif):
        return None
    try:
        exif.pop(_ORIENTATION, None)
        for tag in _EXIF_SIZES:  # the restored photo may have another size
            exif.get_ifd(_EXIF_IFD).pop(tag, None)
        block = exif.tobytes()
    except (*_BROKEN, TypeError):  # cameras write broken EXIF; the photo matters more
        return None
    return block if len(block) < 65000 else None  # a JPEG segment ends at 65535


def _checked(image: torch.Tensor) -> torch.Tensor:
    """One finite image as (1, 3, H, W) float32 on the CPU."""
    if image.ndim == 3:
        image = image[None]
    if image.ndim != 4 or image.shape[:2] != (1, 3):
        raise RestoreError(f"Expected one image tensor (3, H, W) or (1, 3, H, W), not {tuple(image.shape)}.")
    if not torch.isfinite(image).all():
        raise RestoreError("The image holds NaN or infinite pixels: the run diverged; try a smaller step size.")
    return image.detach().float().cpu()


def _three_channels(values: torch.Tensor) -> torch.Tensor:
    values = values if values.ndim == 4 else values[None]
    if values.ndim != 4 or values.shape[1] not in (1, 2, 3, 4) or 0 in values.shape:
        raise RestoreError(
            f"An image must have 1 to 4 channels and at least one pixel, not shape {tuple(values.shape)}."
        )
    return values[:, :3] if values.shape[1] >= 3 else values[:, :1].expand(-1, 3, -1, -1).contiguous()


def _quantise(unit: torch.Tensor, levels: int) -> np.ndarray:
    """Clamp [0, 1] and round to 0..levels."""
    # float64: at 65535 levels float32 would leave a rounding margin of a few hundredths only
    array = (unit.double().clamp(0, 1) * levels).round().numpy()
    return array.astype(np.uint8 if levels == 255 else np.uint16)
