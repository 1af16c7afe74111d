"""Conversion between files, PIL and numpy images and float tensors in [-1, 1].

8-bit values are round((x + 1) * 127.5) clamped to 0..255, 16-bit values likewise; ranges are never stretched.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale

from operators import RestoreError
from restore import disk
from restore.images import sixteen

try:  # HEIC files of phones
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:
    pillow_heif = None

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP"}
_FORMATS |= {".bmp": "BMP", ".ppm": "PPM", ".pgm": "PPM"}
WRITABLE_SUFFIXES = tuple(_FORMATS)
READABLE_SUFFIXES = (*WRITABLE_SUFFIXES, ".gif", ".heic", ".heif", ".avif")
UNREADABLE = "it may be truncated or of another type"
ORIENTATION, _EXIF_IFD, _EXIF_SIZES = 0x0112, 0x8769, (0xA002, 0xA003)
_SAVE = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95, "method": 4}}
_SAVE |= {"TIFF": {"compression": "tiff_adobe_deflate"}, "PNG": {"optimize": False}}
_OPAQUE = ("JPEG", "PPM")
_LEVELS = {"bool": 1, "uint16": 65535}  # other integers: 255


@dataclass(frozen=True)
class ImageRecord:
    """A photo read from a file, with what is needed to write its restored version in the same way.

    pixels: (1, 3, H, W) float32 in [-1, 1], upright. alpha: (1, 1, H, W) in [0, 1] or None. path: the file read.
    format: Pillow's name. grey: without colour channels. bits: 8 or 16. icc, exif: profile and EXIF block without
    orientation, or None.
    """

    pixels: torch.Tensor = field(repr=False)
    path: Path
    format: str
    grey: bool = False
    bits: int = 8
    alpha: torch.Tensor | None = field(default=None, repr=False)
    icc: bytes | None = field(default=None, repr=False)
    exif: bytes | None = field(default=None, repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[-2], self.pixels.shape[-1]


@contextmanager
def explain_errors(path: Path, kind: str, hint: str) -> Iterator[None]:
    """Turn any exception raised while reading `path` into a RestoreError of one sentence."""
    try:
        yield
    except RestoreError:
        raise
    except FileNotFoundError as error:
        raise RestoreError(f"there is no file {path}") from error
    except Exception as error:  # decoders raise anything for damaged files
        raise RestoreError(f"{path} is not a readable {kind} ({error}): {hint}") from error


def read_image(path: str | Path) -> ImageRecord:
    """Read a photo: 8 or 16 bits, grey, RGB, palette or CMYK (without its profile), with or without alpha.

    The EXIF orientation is applied. Raises RestoreError if the file is missing, truncated or no image, has several
    frames or pages, or stores 32-bit numbers.
    """
    path = Path(path)
    hint = UNREADABLE if pillow_heif or path.suffix.lower() not in (".heic", ".heif") else "install pillow-heif"
    with explain_errors(path, "image", hint), PIL.Image.open(path) as image:
        frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1  # MPO: a phone's JPEG with extras
        if frames > 1:
            raise RestoreError(f"{path} must hold one image, got {frames} frames or pages; extract the one to restore")
        bits = 16 if sixteen.is_sixteen_bit(image) else 8
        if bits == 8 or image.format != "TIFF":  # loading a TIFF file applies and removes its orientation
            image.load()
        samples = sixteen.read_samples(path, image) if bits == 16 else _read_samples(image, path)
        exif = image.getexif()  # after loading: a PNG file may hold it behind the pixels
        icc = image.info.get("icc_profile") if image.mode != "CMYK" else None
        image_format = "JPEG" if image.format == "MPO" else image.format
    samples = apply_orientation(samples, exif.get(ORIENTATION, 1))
    values = torch.from_numpy(np.ascontiguousarray(samples).astype(np.float32))
    values = values.permute(2, 0, 1)[None] / (255 if bits == 8 else 65535)
    channels = values.shape[1]
    colour = values[:, :1].expand(-1, 3, -1, -1) if channels <= 2 else values[:, :3]
    pixels, alpha = (colour * 2 - 1).contiguous(), values[:, -1:].contiguous() if channels in (2, 4) else None
    exif = _clean_exif(exif) if image_format in ("JPEG", "PNG", "WEBP") else None
    return ImageRecord(pixels, path, image_format or "PNG", channels <= 2, bits, alpha, icc, exif)


def write_image(path: str | Path, image: torch.Tensor, like: ImageRecord | None = None, colour: bool = False) -> None:
    """Write the file of `encode_image` atomically. Raises RestoreError also as `disk.open_atomic` does."""
    disk.write_bytes(path, encode_image(path, image, like, colour))


def encode_image(path: str | Path, image: torch.Tensor, like: ImageRecord | None = None, colour: bool = False) -> bytes:
    """Return the file of `image`, (3, H, W) or (1, 3, H, W) in about [-1, 1] (clamped), in the format of the suffix.

    like: the photo it was made from: grey, alpha (resized if the size changed), 16 bits, colour profile and EXIF are
        carried over as far as the format can hold them. colour=True keeps colours although `like` is grey.
    JPEG and WebP have quality 95, JPEG without chroma subsampling. Raises RestoreError for NaN or infinite pixels, an
    unknown suffix, alpha in a format without it, and more pixels than the format can hold.
    """
    path = Path(path)
    image_format = _FORMATS.get(path.suffix.lower())
    if image_format is None:
        raise RestoreError(f"cannot write {path}: the name must end in one of {' '.join(WRITABLE_SUFFIXES)}")
    samples = _require_image(image)
    if like is not None and like.grey and not colour:
        samples = rgb_to_grayscale(samples)  # ITU-R BT.601, as Pillow's "L"
    samples = (samples + 1) / 2
    alpha = like.alpha if like is not None else None
    if alpha is not None:
        if image_format in _OPAQUE:
            raise RestoreError(f"cannot write {path}: its format has no transparency and {like.path} has; write a PNG")
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
        return sixteen.encode_png(array, icc, exif) if image_format == "PNG" else sixteen.encode_tiff(array, icc)
    options = ({"icc_profile": icc} if icc else {}) | ({"exif": exif} if exif else {})
    buffer = io.BytesIO()
    picture = PIL.Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    try:
        picture.save(buffer, image_format, **_SAVE.get(image_format, {}), **options)
    except (OSError, ValueError) as error:  # more pixels than the format can address
        raise RestoreError(f"cannot write {path} as {image_format}: {error}; write a PNG") from error
    return buffer.getvalue()


def detect_format(path: Path) -> str:
    """Return Pillow's name of a file's format, by its content. Raises RestoreError if it is not an image."""
    with explain_errors(path, "image", UNREADABLE), PIL.Image.open(path) as image:
        return image.format


def check_alpha(source: Path, target: Path) -> None:
    """Raise RestoreError if the image `source` has transparency, by its header, and `target`'s format has not."""
    if _FORMATS.get(target.suffix.lower()) not in _OPAQUE:
        return
    with explain_errors(source, "image", UNREADABLE), PIL.Image.open(source) as image:
        if _has_alpha(image):
            raise RestoreError(f"cannot write {target}: its format has no transparency and {source} has; write a PNG")


def to_tensor(image: Any, *, channels: int | None = 3, largest: float = 8.0) -> torch.Tensor:
    """Return any kind of image as a tensor (B, C, H, W) float32 in [-1, 1].

    image: a PIL image of any 8-bit mode or 16-bit grey; a path; numpy (H, W), (H, W, C) or (B, H, W, C); torch
        (C, H, W) or (B, C, H, W); or a list of these of one size. Integers are 0..255 (uint16: 0..65535, bool: 0 and
        1), numpy floats in [0, 1], torch floats in about [-1, 1].
    channels: 3: grey is repeated, alpha dropped. 1: grey by the luma of ITU-R BT.601. None: a measurement; its channels
        are kept (1 for grey files, alpha is dropped; a float tensor may have any shape (B, ...)).
    largest: the largest absolute value of a float tensor; noise of sigma = 1 exceeds 8 once in 1e12 pixels.
    Raises RestoreError for NaN, other shapes and types, an empty batch and values outside the range.
    """
    if isinstance(image, (list, tuple)):
        return _stack([to_tensor(item, channels=channels, largest=largest) for item in image])
    if isinstance(image, (str, Path)):
        record = read_image(image)
        return convert_channels(record.pixels[:, :1] if record.grey else record.pixels, channels)
    if isinstance(image, PIL.Image.Image):
        deep = image.mode.startswith("I;16")
        image = np.asarray(image).astype(np.uint16) if deep else _read_samples(image, "the PIL image")
    if isinstance(image, np.ndarray):
        image = image[:, :, None] if image.ndim == 2 else image
        if image.ndim not in (3, 4) or image.shape[-1] not in (1, 2, 3, 4):
            raise RestoreError(f"a numpy image must be (H, W), (H, W, C) or (B, H, W, C), got {image.shape}")
        if image.dtype.kind not in "biuf":
            raise RestoreError(f"a numpy image must hold integers, booleans or floats, got {image.dtype}")
        values = torch.from_numpy(np.ascontiguousarray(image).astype(np.float32)).movedim(-1, -3)
        white = _LEVELS.get(str(image.dtype), 255) if image.dtype.kind != "f" else 1
        if white == 1 and values.numel() and not (values.min() >= -1e-6 and values.max() <= 1 + 1e-6):  # NaN too
            given = f"{_describe_range(values)}; rescale it or give a torch tensor in [-1, 1]"
            raise RestoreError(f"a numpy image of floats must be in [0, 1], got {given}")
        values = values[..., : 1 if values.shape[-3] < 3 else 3, :, :]
    elif isinstance(image, torch.Tensor):
        if image.is_complex() or image.is_quantized:
            raise RestoreError(f"an image tensor must hold integers, booleans or floats, got {image.dtype}")
        values, white = image.detach().float(), _LEVELS.get(str(image.dtype).removeprefix("torch."), 255)
        if image.is_floating_point():
            if not torch.isfinite(values).all():
                raise RestoreError("an image must be finite, got NaN or infinite pixels")
            if values.numel() and values.abs().max() > largest:
                given = f"{_describe_range(values)}; divide 0..255 by 127.5 and subtract 1"
                raise RestoreError(f"a float tensor must be in about [-1, 1], got {given}")
            return convert_channels(values, channels)
    else:
        kinds = "a PIL image, a path, a numpy array, a torch tensor or a list of them"
        raise RestoreError(f"an image must be {kinds}, got {type(image).__name__}")
    if values.numel() and not (values.min() >= -1e-6 and values.max() <= white + 1e-6):
        raise RestoreError(f"an image of integers must be in 0..{white}, got {_describe_range(values)}")
    return convert_channels(values / white * 2 - 1, channels)


def convert_channels(values: torch.Tensor, channels: int | None) -> torch.Tensor:
    """Return pixels (C, H, W) or (B, C, H, W) as (B, C, H, W) with `channels`, and errors, as in `to_tensor`."""
    values = values[None] if values.ndim == 3 and values.shape[0] in (1, 2, 3, 4) else values
    if not values.numel():
        raise RestoreError(f"images must not be empty, got a batch of shape {tuple(values.shape)}")
    if channels is None:
        return values
    if values.ndim != 4 or values.shape[1] not in (1, 2, 3, 4):
        raise RestoreError(f"an image must be (C, H, W) or (B, C, H, W) of 1 to 4 channels, got {tuple(values.shape)}")
    values = values[:, : 1 if values.shape[1] < 3 else 3]
    if channels == 1:
        return values if values.shape[1] == 1 else rgb_to_grayscale(values)
    return values.expand(-1, 3, -1, -1).contiguous()


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """Clamp and round (3, H, W) or (B, 3, H, W) in [-1, 1] to uint8 (H, W, 3) or (B, H, W, 3). RestoreError for NaN."""
    if image.ndim not in (3, 4) or image.shape[-3] != 3:
        raise RestoreError(f"an image tensor must be (3, H, W) or (B, 3, H, W), got {tuple(image.shape)}")
    return _quantise((_require_finite(image).movedim(-3, -1) + 1) / 2, 255)


def to_pil(image: torch.Tensor) -> PIL.Image.Image:
    """Clamp and round one image tensor, (3, H, W) or (1, 3, H, W) in [-1, 1], to an RGB PIL image."""
    return PIL.Image.fromarray(to_uint8(_require_image(image)[0]))


def apply_orientation(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Return an array (H, W, ...) upright, given its EXIF orientation (1 to 8, TIFF 6.0 tag 274)."""
    samples = samples.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else samples
    samples = samples[:, ::-1] if orientation in (2, 3, 6, 7) else samples
    return samples[::-1] if orientation in (3, 4, 7, 8) else samples


def _read_samples(image: PIL.Image.Image, name: str | Path) -> np.ndarray:
    """uint8 (H, W, C): 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; a transparent palette entry or colour becomes alpha."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise RestoreError(f"{name} must have 8 or 16 bits per channel, got 32-bit numbers; convert it")
    alpha = _has_alpha(image)
    grey = image.mode in ("1", "L", "LA", "La")
    mode = ("LA" if alpha else "L") if grey else ("RGBA" if alpha else "RGB")
    if grey and alpha and image.mode not in ("LA", "La"):
        image = image.convert("RGBA")  # Pillow turns a transparent grey value into alpha only this way
    return np.atleast_3d(np.asarray(image.convert(mode)))


def _has_alpha(image: PIL.Image.Image) -> bool:
    return image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info


def _clean_exif(exif: PIL.Image.Exif) -> bytes | None:
    """The EXIF block without orientation and pixel sizes; None if there is none or it does not fit into a JPEG."""
    if not len(exif):
        return None
    try:
        exif.pop(ORIENTATION, None)
        for tag in _EXIF_SIZES:
            exif.get_ifd(_EXIF_IFD).pop(tag, None)
        block = exif.tobytes()
    except Exception:  # cameras write broken EXIF; the photo matters more
        return None
    return block if len(block) < 65000 else None  # a JPEG segment ends at 65535


def _require_image(image: torch.Tensor) -> torch.Tensor:
    """One finite image as (1, 3, H, W) float32 on the CPU."""
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or image.shape[:2] != (1, 3):
        raise RestoreError(f"one image tensor must be (3, H, W) or (1, 3, H, W), got {tuple(image.shape)}")
    return _require_finite(image)


def _require_finite(image: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(image).all():
        raise RestoreError("an image must be finite, got NaN or infinite pixels: the run diverged; try smaller steps")
    return image.detach().float().cpu()


def _stack(images: list[torch.Tensor]) -> torch.Tensor:
    if not images:
        raise RestoreError("a list of images must not be empty")
    shapes = {tuple(image.shape[1:]) for image in images}
    if len(shapes) > 1:
        sizes = " and ".join(" x ".join(map(str, shape)) for shape in sorted(shapes)[:2])
        raise RestoreError(f"images of a list must have one size, got {sizes}; pass them one by one")
    return torch.cat(images)


def _describe_range(values: torch.Tensor) -> str:
    return f"{values.min():.4g} to {values.max():.4g}"


def _quantise(unit: torch.Tensor, levels: int) -> np.ndarray:
    """Clamp to [0, 1] and round to 0..levels."""
    # float64: with 65535 levels float32 leaves a rounding margin of only a few hundredths
    array = unit.to(torch.float64, copy=True).clamp_(0, 1).mul_(levels).round_().numpy()
    return array.astype(np.uint8 if levels == 255 else np.uint16)
