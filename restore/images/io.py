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

from operators import RestoreError
from restore import disk
from restore.images import metadata, sixteen
from restore.images.formats import FORMATS, READ_FORMATS, WRITABLE_SUFFIXES, find_format, pillow_heif
from restore.images.metadata import ORIENTATION, Metadata
from restore.images.samples import convert_samples, describe_tiff, has_alpha, measure_depth, read_samples

UNREADABLE = "it may be truncated or of another type"
_SAVE = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95, "method": 4}}
_SAVE |= {"TIFF": {"compression": "tiff_adobe_deflate"}, "PNG": {"optimize": False}}
_SAVE_EXACTLY = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True, "exact": True}}
_LEVELS = {"bool": 1, "uint16": 65535}  # other integers: 255


@dataclass(frozen=True)
class ImageRecord:
    """A photo read from a file, with what is needed to write its restored version in the same way.

    pixels: (1, 3, H, W) float32 in [-1, 1], upright. alpha: (1, 1, H, W) in [0, 1] or None. path: the file read.
    format: Pillow's name. grey: without colour channels. bits: 8 or 16. metadata: what it says beside its pixels.
    """

    pixels: torch.Tensor = field(repr=False)
    path: Path
    format: str
    grey: bool = False
    bits: int = 8
    alpha: torch.Tensor | None = field(default=None, repr=False)
    metadata: Metadata = Metadata()

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
    except PIL.Image.DecompressionBombError as error:  # the whole picture is read before any memory is planned
        most = 2 * PIL.Image.MAX_IMAGE_PIXELS / 1e6
        raise RestoreError(f"{path} must have at most {most:.0f} million pixels, got more; cut it in parts") from error
    except Exception as error:  # decoders raise anything for damaged files
        raise RestoreError(f"{path} is not a readable {kind} ({error}): {hint}") from error


@contextmanager
def open_image(path: Path) -> Iterator[PIL.Image.Image]:
    """Open a file with Pillow, its pixels not yet read. Raises RestoreError if it is missing or no picture."""
    hint = UNREADABLE if pillow_heif or path.suffix.lower() not in (".heic", ".heif") else "install pillow-heif"
    with explain_errors(path, "image", hint):
        try:
            image = PIL.Image.open(path, formats=READ_FORMATS)
        except PIL.UnidentifiedImageError:
            if (given := describe_tiff(path)) is None:
                raise
            raise RestoreError(f"{path} must be a TIFF file of a usual kind, got {given}; convert it to RGB") from None
        with image:
            yield image


def read_image(path: str | Path) -> ImageRecord:
    """Read a photo: 8 or 16 bits, grey, RGB, palette or CMYK (without its profile), with or without alpha.

    The EXIF orientation is applied. Raises RestoreError if the file is missing, truncated or no image, has several
    frames or pages, or stores anything that would be read as other values, such as 32-bit or signed numbers.
    """
    path = Path(path)
    with open_image(path) as image:
        check_readable(image, path)
        samples = read_samples(image, path)
        exif = image.getexif()  # after loading: a PNG file may hold it behind the pixels
        orientation, channels = exif.get(ORIENTATION, 1), samples.shape[2]
        about = metadata.read_metadata(image, exif, path, grey=channels <= 2)
        image_format = "JPEG" if image.format == "MPO" else image.format
    samples = apply_orientation(samples, orientation)
    bits = 16 if samples.dtype == np.uint16 else 8
    values = torch.from_numpy(np.ascontiguousarray(samples).astype(np.float32))
    values = values.permute(2, 0, 1)[None] / (255 if bits == 8 else 65535)
    colour = values[:, :1].expand(-1, 3, -1, -1) if channels <= 2 else values[:, :3]
    pixels, alpha = (colour * 2 - 1).contiguous(), values[:, -1:].contiguous() if channels in (2, 4) else None
    return ImageRecord(pixels, path, image_format or "PNG", channels <= 2, bits, alpha, about)


def check_readable(image: PIL.Image.Image, path: Path) -> None:
    """Raise RestoreError if an opened file has several frames or pages or samples that cannot be read as they are."""
    frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1  # MPO: a phone's JPEG with extras
    if frames > 1:
        raise RestoreError(f"{path} must hold one image, got {frames} frames or pages; extract the one to restore")
    measure_depth(image, path)


def write_image(
    path: str | Path, image: torch.Tensor, like: ImageRecord | None = None, colour: bool = False, exact: bool = False
) -> None:
    """Write the file of `encode_image` atomically. Raises RestoreError also as `disk.open_atomic` does."""
    disk.write_bytes(path, encode_image(path, image, like, colour, exact))


def encode_image(
    path: str | Path, image: torch.Tensor, like: ImageRecord | None = None, colour: bool = False, exact: bool = False
) -> bytes:
    """Return the file of `image`, (3, H, W) or (1, 3, H, W) in about [-1, 1] (clamped), in the format of the suffix.

    like: the photo it was made from: grey, alpha (resized if the size changed), 16 bits, colour profile, EXIF, XMP,
        resolution and gamma are carried over as far as the format holds them, see `list_lost`. colour=True keeps
        colours although `like` is grey.
    exact: JPEG of quality 100 and lossless WebP instead of quality 95. JPEG is written without chroma subsampling.
    Raises RestoreError for NaN or infinite pixels, an unknown suffix, alpha in a format without it, and more pixels
    than the format can hold.
    """
    path = Path(path)
    image_format, samples = require_format(path), _require_image(image)
    if like is not None and like.grey and not colour:
        samples = _to_grey(samples)
    samples = (samples + 1) / 2
    alpha = like.alpha if like is not None else None
    if alpha is not None:
        if "alpha" not in FORMATS[image_format].holds:
            raise RestoreError(_explain_alpha(like.path, path))
        if alpha.shape[-2:] != samples.shape[-2:]:
            alpha = F.interpolate(alpha, samples.shape[-2:], mode="bilinear", antialias=True)
        if image_format == "TIFF" and samples.shape[1] == 1:  # few programs open grey + alpha TIFF files
            samples = samples.expand(-1, 3, -1, -1)
        samples = torch.cat([samples, alpha], 1)
    deep = like is not None and like.bits == 16 and "16 bits" in FORMATS[image_format].holds
    array = _quantise(samples[0].permute(1, 2, 0), 65535 if deep else 255)
    parts = {} if like is None else _list_metadata(image_format, like, colour)
    if deep and image_format == "PPM":
        return sixteen.encode_pnm(array)
    if deep and image_format == "PNG":
        return sixteen.encode_png(array, metadata.list_png_chunks(parts))
    if image_format == "TIFF" and (deep or parts):
        return sixteen.encode_tiff(array, metadata.list_tiff_tags(parts))
    options = _SAVE.get(image_format, {}) | (_SAVE_EXACTLY.get(image_format, {}) if exact else {})
    buffer = io.BytesIO()
    picture = PIL.Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    try:
        picture.save(buffer, image_format, **options, **metadata.list_options(image_format, parts))
    except (OSError, ValueError) as error:  # more pixels than the format can address
        raise RestoreError(f"cannot write {path} as {image_format}: {error}; write a PNG") from error
    return buffer.getvalue()


def list_lost(path: str | Path, like: ImageRecord, colour: bool = False) -> list[str]:
    """Return, in words, what `encode_image` with these arguments does not keep of the photo; [] if it keeps all."""
    image_format = require_format(Path(path))
    bits = ["16 bits"] * (like.bits == 16 and "16 bits" not in FORMATS[image_format].holds)
    return bits + like.metadata.list_lost(_list_metadata(image_format, like, colour))


def require_format(path: Path) -> str:
    """Return the format to write to `path`. Raises RestoreError for a suffix of no format that can be written."""
    image_format = find_format(path)
    if image_format is None:
        raise RestoreError(f"cannot write {path}: the name must end in one of {' '.join(WRITABLE_SUFFIXES)}")
    return image_format


def detect_format(path: Path) -> str:
    """Return Pillow's name of a file's format, by its content. Raises RestoreError if it is not an image."""
    with open_image(path) as image:
        return image.format


def check_source(source: Path, target: Path) -> None:
    """Raise RestoreError, by the header, if `source` cannot be read or has transparency and `target`'s format not."""
    with open_image(source) as image:
        check_readable(image, source)
        if "alpha" not in FORMATS[require_format(target)].holds and has_alpha(image):
            raise RestoreError(_explain_alpha(source, target))


def check_size(target: Path, size: tuple[int, int]) -> None:
    """Raise RestoreError if the format of `target` cannot hold a picture of this size (H, W)."""
    image_format = require_format(target)
    longest = FORMATS[image_format].longest
    if longest is not None and max(size) > longest:
        given = f"{size[1]} x {size[0]} for {target}; write a PNG (png=True)"
        raise RestoreError(f"a {image_format} file must have at most {longest} pixels a side, got {given}")


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
        image = np.asarray(image).astype(np.uint16) if deep else convert_samples(image, "the PIL image")
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
        return values if values.shape[1] == 1 else _to_grey(values)
    return values.expand(-1, 3, -1, -1).contiguous()


def _to_grey(values: torch.Tensor) -> torch.Tensor:
    """ITU-R BT.601, as Pillow's "L"."""
    from kornia.color import rgb_to_grayscale  # half a second, which only grey pictures take

    return rgb_to_grayscale(values)


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


def _list_metadata(image_format: str, like: ImageRecord, colour: bool) -> dict[str, Any]:
    """The metadata of `like` that a file of this format holds."""
    holds = FORMATS[image_format].holds
    stored_grey = like.grey and not colour and "grey" in holds
    if image_format == "TIFF" and like.alpha is not None:
        stored_grey = False
    return like.metadata.list_for(image_format, stored_grey, holds)


def _explain_alpha(source: Path, target: Path) -> str:
    return f"cannot write {target}: its format has no transparency and {source} has; write a PNG"


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
