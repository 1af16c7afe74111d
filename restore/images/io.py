"""Pixels in, pixels out: files, PIL and numpy on one side, float tensors in [-1, 1] on the other.

Nothing is ever stretched: 8 bits are round((x + 1) * 127.5) clamped to 0..255, 16 bits likewise.
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

try:  # phones' HEIC files, where it is installed
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:
    pillow_heif = None

_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP", ".bmp": "BMP"}
_FORMATS |= {".png": "PNG", ".ppm": "PPM", ".pgm": "PPM"}
_SAVE = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95, "method": 4}}
_SAVE |= {"TIFF": {"compression": "tiff_adobe_deflate"}, "PNG": {"optimize": False}}
_ORIENTATION, _EXIF_IFD, _EXIF_SIZES = 0x0112, 0x8769, (0xA002, 0xA003)
_OPAQUE = ("JPEG", "PPM")
UNREADABLE = "it may be truncated or of another type"
_LEVELS = {"bool": 1, "uint16": 65535}  # of the other integers 255


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
def explain_errors(path: Path, kind: str, hint: str) -> Iterator[None]:
    """Within the block, what the readers of files raise becomes one sentence."""
    try:
        yield
    except RestoreError:
        raise
    except FileNotFoundError as error:
        raise RestoreError(f"There is no file {path}.") from error
    except Exception as error:  # readers of damaged files raise anything
        raise RestoreError(f"{path} is not a readable {kind} ({error}): {hint}.") from error


def read_image(path: str | Path) -> ImageRecord:
    """Read a photo: 8 or 16 bits, grey, RGB, palette, CMYK (its profile is dropped), with or without alpha.

    EXIF orientation is applied. Raises RestoreError, naming the file, when it is missing, no image,
    truncated, animated or multi-page, or stored as 32-bit numbers.
    """
    path = Path(path)
    hint = UNREADABLE if pillow_heif or path.suffix.lower() not in (".heic", ".heif") else "install pillow-heif"
    with explain_errors(path, "image", hint), PIL.Image.open(path) as opened:
        frames = getattr(opened, "n_frames", 1) if opened.format != "MPO" else 1  # MPO: a phone's JPEG with extras
        if frames > 1:
            raise RestoreError(f"{path} holds {frames} frames or pages: extract the one to restore into its own file.")
        bits = 16 if sixteen.is_sixteen_bit(opened) else 8
        if bits == 8 or opened.format != "TIFF":  # Pillow turns a loaded TIFF file upright
            opened.load()
        samples = _eight_bit_samples(opened, path) if bits == 8 else sixteen.read_samples(path, opened)
        exif = opened.getexif()  # after loading: a PNG file may hold it behind the pixels
        icc = opened.info.get("icc_profile") if opened.mode != "CMYK" else None
        image_format = "JPEG" if opened.format == "MPO" else opened.format
    orientation = exif.get(_ORIENTATION, 1)
    values = torch.from_numpy(np.ascontiguousarray(apply_orientation(samples, orientation)).astype(np.float32))
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
    """Write what `encoded` makes of this, atomically (see `disk.open_atomic`). RestoreError also for a full disk."""
    disk.write_bytes(path, encode_image(path, image, like, colour))


def encode_image(path: str | Path, image: torch.Tensor, like: ImageRecord | None = None, colour: bool = False) -> bytes:
    """The file of `image`, (3, H, W) or (1, 3, H, W) in about [-1, 1] (clamped), in the format of `path`'s suffix.

    like: the photo it was made from: greyscale, alpha (resized if the size changed), 16 bits, colour
    profile and EXIF are carried over as far as the format can hold them. colour=True keeps colours
    although `like` was grey (colorization). JPEG and WebP are written at quality 95, JPEG without chroma subsampling.
    Raises RestoreError for NaN or infinite pixels, an unknown suffix, alpha into a JPEG, more pixels than the format
    can hold.
    """
    path = Path(path)
    image_format = _FORMATS.get(path.suffix.lower())
    if image_format is None:
        raise RestoreError(f"Cannot write {path}: the name must end in one of {' '.join(_FORMATS)}.")
    samples = _checked(image)
    if like is not None and like.grey and not colour:
        samples = rgb_to_grayscale(samples)  # ITU-R BT.601, as Pillow's "L"
    samples = (samples + 1) / 2
    alpha = like.alpha if like is not None else None
    if alpha is not None:
        if image_format in _OPAQUE:
            raise RestoreError(_no_alpha(path, like.path))
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
    options = {"icc_profile": icc} if icc else {}
    options |= {"exif": exif} if exif else {}
    buffer = io.BytesIO()
    picture = PIL.Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    try:
        picture.save(buffer, image_format, **_SAVE.get(image_format, {}), **options)
    except (OSError, ValueError) as error:  # more pixels than the format can address
        raise RestoreError(f"Cannot write {path} as {image_format}: {error}; write a PNG.") from error
    return buffer.getvalue()


def detect_format(path: Path) -> str:
    """Pillow's name of a file's format, by its content. RestoreError where it is no image."""
    with explain_errors(path, "image", UNREADABLE), PIL.Image.open(path) as opened:
        return opened.format


def check_alpha(source: Path, target: Path) -> None:
    """Raises RestoreError where `target`'s format cannot hold the transparency of `source`; reads its header only."""
    if _FORMATS.get(target.suffix.lower()) not in _OPAQUE:
        return
    with explain_errors(source, "image", UNREADABLE), PIL.Image.open(source) as opened:
        if _transparent(opened):
            raise RestoreError(_no_alpha(target, source))


def to_tensor(image: Any, *, channels: int | None = 3, largest: float = 8.0) -> torch.Tensor:
    """(B, C, H, W) float32 in [-1, 1] from whatever an image may be; the one door for pixels that are no file's.

    image: a PIL image of any 8-bit mode or 16-bit grey; a path; numpy (H, W), (H, W, C) or (B, H, W, C); torch
        (C, H, W) or (B, C, H, W); or a list of these, all of one size. Integers count 0..255 (uint16: 0..65535,
        bool: 0 and 1), floats of numpy lie in [0, 1], floats of torch in about [-1, 1].
    channels: 3: grey is repeated, alpha dropped. 1: grey by the luma of ITU-R BT.601. None: a measurement, its channels
        as they are (grey files and pictures have one, alpha is dropped; a float tensor may have any shape (B, ...)).
    largest: a tensor beyond +-largest is refused as one on another range. Noise of sigma = 1 on an image crosses the
        default of 8 once in 1e12 pixels; a picture on 0..255 stays below it only where it is all but black.
    Raises RestoreError for NaN, another shape or type, nothing at all, and values that cannot be on that range.
    """
    if isinstance(image, (list, tuple)):
        return _stacked([to_tensor(item, channels=channels, largest=largest) for item in image])
    if isinstance(image, (str, Path)):
        record = read_image(image)
        return convert_channels(record.pixels[:, :1] if record.grey else record.pixels, channels)
    if isinstance(image, PIL.Image.Image):
        sixteen_bit = image.mode.startswith("I;16")
        image = np.asarray(image).astype(np.uint16) if sixteen_bit else _eight_bit_samples(image, "The picture")
    if isinstance(image, np.ndarray):
        image = image[:, :, None] if image.ndim == 2 else image
        if image.ndim not in (3, 4) or image.shape[-1] not in (1, 2, 3, 4):
            raise RestoreError(f"A numpy image must be (H, W), (H, W, C) or (B, H, W, C), not {image.shape}.")
        if image.dtype.kind not in "biuf":
            raise RestoreError(f"A numpy image must hold integers, booleans or floats, not {image.dtype}.")
        values = torch.from_numpy(np.ascontiguousarray(image).astype(np.float32)).movedim(-1, -3)
        whole = _LEVELS.get(str(image.dtype), 255) if image.dtype.kind != "f" else 1
        if whole == 1 and values.numel() and not (values.min() >= -1e-6 and values.max() <= 1 + 1e-6):  # NaN too
            raise RestoreError(
                f"A float numpy image must lie in [0, 1], this one {_span(values)}: rescale it, or pass a torch tensor "
                "in [-1, 1]."
            )
        values = values[..., : 1 if values.shape[-3] < 3 else 3, :, :]
    elif isinstance(image, torch.Tensor):
        if image.is_complex() or image.is_quantized:
            raise RestoreError(f"An image tensor must hold integers, booleans or floats, not {image.dtype}.")
        values, whole = image.detach().float(), _LEVELS.get(str(image.dtype).removeprefix("torch."), 255)
        if image.is_floating_point():
            if not torch.isfinite(values).all():
                raise RestoreError("The image holds NaN or infinite pixels: find out which step made them.")
            if values.numel() and values.abs().max() > largest:
                raise RestoreError(
                    f"A float tensor is taken as [-1, 1], this one {_span(values)}: divide 0..255 by 127.5 and "
                    "subtract 1."
                )
            return convert_channels(values, channels)
    else:
        raise RestoreError(
            f"An image must be a PIL image, a path, a numpy array, a torch tensor or a list of them, "
            f"not {type(image).__name__}."
        )
    if values.numel() and not (values.min() >= -1e-6 and values.max() <= whole + 1e-6):
        raise RestoreError(f"An image of integers counts 0..{whole}, this one {_span(values)}.")
    return convert_channels(values / whole * 2 - 1, channels)


def convert_channels(values: torch.Tensor, channels: int | None) -> torch.Tensor:
    """(B, C, H, W) from (C, H, W) or (B, C, H, W) pixels, with as many channels as `to_tensor` says. RestoreError."""
    values = values[None] if values.ndim == 3 and values.shape[0] in (1, 2, 3, 4) else values
    if not values.numel():
        raise RestoreError(f"There is no image in a batch of shape {tuple(values.shape)}.")
    if channels is None:
        return values
    if values.ndim != 4 or values.shape[1] not in (1, 2, 3, 4):
        raise RestoreError(f"An image must be (C, H, W) or (B, C, H, W) of 1 to 4 channels, not {tuple(values.shape)}.")
    values = values[:, : 1 if values.shape[1] < 3 else 3]
    if channels == 1:
        return values if values.shape[1] == 1 else rgb_to_grayscale(values)
    return values.expand(-1, 3, -1, -1).contiguous()


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


def apply_orientation(samples: np.ndarray, orientation: int) -> np.ndarray:
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
    transparent = _transparent(image)
    grey = image.mode in ("1", "L", "LA", "La")
    mode = ("LA" if transparent else "L") if grey else ("RGBA" if transparent else "RGB")
    if grey and transparent and image.mode not in ("LA", "La"):
        image = image.convert("RGBA")  # Pillow turns a transparent grey value into alpha only this way
    array = np.asarray(image.convert(mode))
    return array[:, :, None] if array.ndim == 2 else array


def _transparent(image: PIL.Image.Image) -> bool:
    return image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info


def _no_alpha(target: Path, source: Path) -> str:
    return f"Cannot write {target}: its format has no transparency and {source} has; write a PNG."


def _upright_exif(exif: PIL.Image.Exif) -> bytes | None:
    if not len(exif):
        return None
    try:
        exif.pop(_ORIENTATION, None)
        for tag in _EXIF_SIZES:  # the restored photo may have another size
            exif.get_ifd(_EXIF_IFD).pop(tag, None)
        block = exif.tobytes()
    except Exception:  # cameras write broken EXIF; the photo matters more
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


def _stacked(images: list[torch.Tensor]) -> torch.Tensor:
    if not images:
        raise RestoreError("There is no image in an empty list.")
    shapes = {tuple(image.shape[1:]) for image in images}
    if len(shapes) > 1:
        sizes = " and ".join(" x ".join(map(str, shape)) for shape in sorted(shapes)[:2])
        raise RestoreError(f"The images of one list must have one size, not {sizes}: pass them one by one.")
    return torch.cat(images)


def _span(values: torch.Tensor) -> str:
    return f"spans {values.min():.4g} to {values.max():.4g}"


def _quantise(unit: torch.Tensor, levels: int) -> np.ndarray:
    """Clamp [0, 1] and round to 0..levels."""
    # float64: at 65535 levels float32 would leave a rounding margin of a few hundredths only
    array = unit.to(torch.float64, copy=True).clamp_(0, 1).mul_(levels).round_().numpy()
    return array.astype(np.uint8 if levels == 255 else np.uint16)
