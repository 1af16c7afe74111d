"""Restorer: one backbone, one sampler, one guidance, wired for images of any size and number."""

from __future__ import annotations

import copy
import difflib
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from operators import RestoreError
from restore import method, zoo
from restore.backbones.base import LatentBackbone
from restore.backbones.latent_size import ForImageSize
from restore.backbones.sizes import AnySize
from restore.images import io
from restore.samplers.dps import DATA_NORMS, dps
from restore.samplers.generate import generate
from restore.samplers.noise import ImageNoise
from restore.samplers.psld import psld, psld_timesteps
from restore.samplers.steps import respace

# What the sampler's signature holds that is not a hyper-parameter of the method.
_WIRING = {"backbone", "operator", "y", "x_T", "z_T", "timesteps", "noise", "guidance", "condition", "callback"}


@dataclass
class Restoration:
    """The result of one call of a Restorer for B measurements and K samples each.

    samples: (B, K, 3, H, W) in [-1, 1], clamped; sample k does not depend on K.
    residual: ||y - A(x)||_2 of every sample, (B, K); residual_ratio: the same divided by
        sigma_y sqrt(m), near 1 for a sample that explains y up to its noise; None when sigma_y is unknown.
    nfe: network evaluations per sample, weak passes included. seconds: wall time of the call.
    protocol: everything that determines the result, ready for JSON.
    """

    samples: torch.Tensor
    residual: torch.Tensor
    residual_ratio: torch.Tensor | None
    nfe: int
    seconds: float
    protocol: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[Image.Image]:
        """The first sample of every measurement as PIL images."""
        return [io.to_pil(x) for x in self.samples[:, 0]]

    @property
    def mean(self) -> torch.Tensor:
        """Mean over the samples, (B, 3, H, W): the estimate of least squared error."""
        return self.samples.mean(dim=1)

    @property
    def spread(self) -> torch.Tensor:
        """Standard deviation over the samples per pixel, (B, 3, H, W); zero for a single sample."""
        return self.samples.std(dim=1, correction=0)


def load(
    name: str | Path = "embedded",
    *,
    device: str = "auto",
    precision: str = "fp32",
    offline: bool = False,
    checkpointing: bool = False,
    overlap: float = 0.5,
    max_windows: int = 16,
    vae_slicing: bool = False,
    vae_tiling: bool = False,
) -> Restorer:
    """A Restorer for a model of `restore models list`, a diffusers folder or a checkpoint file.

    device: "auto" (CUDA, else MPS, else CPU) or torch's name. precision: "fp32", "bf16" or "fp16" of the
    network's arithmetic. offline: never download. checkpointing: less memory, more time. overlap,
    max_windows: see AnySize. vae_slicing, vae_tiling: decode one image, one tile at a time (latent models; a
    tile's borders are blended, so the result differs a little). Raises RestoreError for an unknown name or
    weights that do not load.
    """
    found, backbone = zoo.load_backbone(
        name,
        device=choose_device(device),
        precision=precision,
        offline=offline or None,
        checkpointing=checkpointing,
        vae_slicing=vae_slicing,
        vae_tiling=vae_tiling,
    )
    return Restorer(backbone, found.name, overlap=overlap, max_windows=max_windows, checkpointing=checkpointing)


def choose_device(device: str) -> torch.device:
    """ "auto" or a torch device name. Raises RestoreError when this machine does not have it."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise RestoreError(f"device '{device}' is not available: {str(error).splitlines()[0]}") from None
    return chosen


class Restorer:
    """Restores measurements with a diffusion prior.

    backbone: see restore.backbones.base. name: looks presets up. overlap, max_windows and
    checkpointing concern images beyond the trained resolution and memory, see AnySize.
    """

    def __init__(self, backbone, name: str = "custom", *, overlap=0.5, max_windows=16, checkpointing=False) -> None:
        self.backbone = AnySize(backbone, overlap=overlap, max_windows=max_windows, checkpointing=checkpointing)
        self.name = name
        self.latent = isinstance(backbone, LatentBackbone)
        self.device = next(backbone.network.parameters()).device
        self.default_sampler = "psld" if self.latent else "dps"

    def default_layers(self) -> list[str]:
        """PAG's layers for this backbone: those of its first preset with PAG, else the middle block's."""
        layers = method.default_layers(self.name)
        return layers or [path for path in self.backbone.attention if path.startswith("mid_block")][:1]

    def layer_table(self) -> list[str]:
        """One line per self-attention layer: short name, paper's name, diffusers path, heads, resolution."""
        lines = [f"{'short':6} {'paper':18} {'diffusers path':60} heads  width  side"]
        for layer in self.backbone.attention.values():
            side = self.backbone.resolution // layer.downsampling
            row = f"{layer.short:6} {layer.paper:18} {layer.path:60} {layer.heads:5}  {layer.channels:5}  {side:4}"
            lines.append(row)
        return lines

    def __call__(
        self,
        y: Any,
        operator: Any,
        *,
        sampler: str | None = None,
        guidance: Any = "preset",
        steps: int | str | None = None,
        samples: int = 1,
        seed: int = 0,
        image_ids: Sequence[str] | None = None,
        batch_size: int = 1,
        condition: torch.Tensor | None = None,
        data: str | None = None,
        reference: bool = False,
        callback: Callable[[dict], None] | None = None,
        **parameters: Any,
    ) -> Restoration:
        """Restore y = A(x) + n.

        y: measurement (B, ...) on the range [-1, 1], or a PIL image. operator: an `operators.Operator`
            or anything with A and A_adjoint, such as a deepinv physics; A_adjoint(y) tells the image's size.
        sampler, steps, guidance, parameters (zeta, ddim_eta, data_norm; eta, gamma, ...): what is not
            given comes from the preset of (backbone, task); guidance=None is the plain sampler.
        zeta is calibrated at the trained resolution and scaled by the square root of the number of
            pixels at other sizes, because the norm it multiplies grows with that root.
        samples: posterior samples per measurement. seed, image_ids: noise is a function of (seed,
            image id, sample index); ids default to "0", "1", ...
        batch_size: samples computed together. With 1 (default) a result has the same bytes whatever
            else is computed; larger batches are equal to rounding, which DPS can magnify where a pixel
            crosses the clamp of x0_hat, and faster on a GPU.
        condition: class labels (B,) for class-conditional backbones.
        data: "ffhq" or "imagenet", where presets were published for both with one backbone.
        reference: compute what the sampler's authors' code does, beyond the paper (PSLD: noise on the
            predicted measurement, sampled encoding, shifted indices, approximate transposes).
        callback: receives the sampler's dict plus `first`, `count` and `total` (samples).
        Raises RestoreError for unknown parameters, sizes that do not fit, non-finite input or
        samples, and memory that does not suffice.
        """
        y = (y if isinstance(y, torch.Tensor) else io.to_tensor(y)).float().to(self.device)
        if not torch.isfinite(y).all():
            raise RestoreError("the measurement holds NaN or infinite values")
        if samples < 1 or batch_size < 1:
            raise RestoreError("samples and batch_size must be at least 1")
        ids = [str(i) for i in range(len(y))] if image_ids is None else [str(i) for i in image_ids]
        if len(ids) != len(y) or len(set(ids)) != len(ids):
            raise RestoreError(f"{len(y)} measurements need {len(y)} different image_ids, got {ids}")

        task = getattr(operator, "name", type(operator).__name__)
        preset = method.find(self.name, task, sampler or self.default_sampler, data)
        steps = preset.steps if steps is None else steps
        guidance = method.build_guidance(preset.guidance) if isinstance(guidance, str) else guidance
        function = {"dps": dps, "psld": psld}[preset.sampler]
        if (function is psld) != self.latent:
            kind = "latent" if self.latent else "pixel"
            raise RestoreError(f"sampler {preset.sampler} does not work with the {kind} backbone {self.name}")
        chosen = preset.parameters_for(guidance)
        if reference:
            chosen |= method.reference(preset.sampler)
            operator = with_reference_adjoint(operator)
        parameters = {**chosen, **check_parameters(function, parameters)}
        protocol = self._protocol(operator, preset, steps, guidance, parameters, seed, samples)

        started, evaluations = time.perf_counter(), self.backbone.evaluations
        items = [(b, k) for b in range(len(y)) for k in range(samples)]
        results, calls = [], 0
        for first in range(0, len(items), batch_size):
            chunk = items[first : first + batch_size]
            rows = [b for b, _ in chunk]
            keys = [(seed, ids[b], k) for b, k in chunk]
            progress = _with_progress(callback, first, len(chunk), len(items))
            labels = None if condition is None else condition[rows]
            with explain_out_of_memory():
                x = self._sample(function, y[rows], operator, keys, steps, guidance, labels, progress, parameters)
            results.append(x.float())
            calls += 1
        x = torch.cat(results)
        flat = (y[[b for b, _ in items]] - operator.A(x.to(y.dtype))).flatten(1)
        residual = torch.linalg.vector_norm(flat, dim=1).view(len(y), samples)
        sigma = getattr(getattr(operator, "noise", None), "sigma", None)
        ratio = residual / (float(sigma) * flat.shape[1] ** 0.5) if sigma else None
        return Restoration(
            samples=x.clamp(-1, 1).view(len(y), samples, *x.shape[1:]),
            residual=residual,
            residual_ratio=ratio,
            nfe=(self.backbone.evaluations - evaluations) // calls,
            seconds=time.perf_counter() - started,
            protocol=protocol,
        )

    def _sample(self, function, y, operator, keys, steps, guidance, condition, callback, parameters) -> torch.Tensor:
        train_steps = len(self.backbone.alphas_cumprod)
        if function is dps:
            timesteps = respace(train_steps, steps)
        else:
            timesteps = psld_timesteps(steps, train_steps, reference=bool(parameters.get("index_shift")))
        noise = ImageNoise(keys, self.device)
        shape = image_shape(operator, y)
        common = {"guidance": guidance, "condition": condition, "noise": noise, "callback": callback}
        if function is dps:
            options = dict(parameters)
            options["data_norm"] = DATA_NORMS[options.get("data_norm", "l2")]
            options["zeta"] = options["zeta"] * (shape[-2] * shape[-1]) ** 0.5 / self.backbone.resolution
            x_T = noise(0, shape, "start")
            return dps(self.backbone, operator, y, x_T=x_T, timesteps=timesteps, **common, **options)
        sized = ForImageSize(self.backbone.inner, *shape[-2:], predictor=self.backbone)
        z_T = noise(0, sized.latent_shape(len(y)), "start")
        z_0 = psld(sized, operator, y, z_T=z_T, timesteps=timesteps, **common, **parameters)
        with torch.no_grad():
            return sized.decode(z_0)

    def _protocol(self, operator, preset, steps, guidance, parameters, seed, samples) -> dict[str, Any]:
        noise = getattr(operator, "noise", None)
        return {
            "backbone": self.name,
            "operator": repr(operator),
            "noise": repr(noise) if noise is not None else None,
            "range": "[-1, 1]",
            "sampler": preset.sampler,
            "steps": steps,
            "guidance": None if guidance is None else repr(guidance),
            "parameters": parameters,
            "preset_source": preset.source,
            "seed": seed,
            "samples": samples,
        }

    def generate(
        self,
        n: int = 1,
        *,
        guidance: Any = None,
        steps: int | str = 250,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        labels: Sequence[int] | None = None,
        ddim_eta: float | None = None,
        batch_size: int = 1,
        callback: Callable[[dict], None] | None = None,
    ) -> torch.Tensor:
        """n unconditional (or, with `labels`, class-conditional) samples (n, 3, H, W) in [-1, 1].

        Sample i depends on (seed, i) alone. size: (H, W), the trained resolution by default.
        """
        if n < 1 or batch_size < 1:
            raise RestoreError("the number of images and batch_size must be at least 1")
        if labels is not None and len(labels) != n:
            raise RestoreError(f"{n} images need {n} class labels, got {len(labels)}")
        side = self.backbone.resolution
        results = []
        for first in range(0, n, batch_size):
            indices = list(range(first, min(first + batch_size, n)))
            noise = ImageNoise([(seed, "generate", i) for i in indices], self.device)
            shape = (len(indices), self.backbone.channels, *(size or (side, side)))
            condition = None if labels is None else torch.tensor([labels[i] for i in indices], device=self.device)
            with explain_out_of_memory():
                x = generate(
                    self.backbone,
                    x_T=noise(0, shape, "start"),
                    timesteps=respace(len(self.backbone.alphas_cumprod), steps),
                    noise=noise,
                    guidance=guidance,
                    condition=condition,
                    ddim_eta=ddim_eta,
                    clip=not self.latent,
                    callback=_with_progress(callback, first, len(indices), n),
                )
                if self.latent:
                    x = self.backbone.inner.decode(x)
            results.append(x.float().clamp(-1, 1))
        return torch.cat(results)


def with_reference_adjoint(operator: Any) -> Any:
    """A copy of an `operators.Operator` whose A_adjoint is the authors' approximate transpose."""
    if not hasattr(operator, "adjoint"):
        raise RestoreError(f"reference=True needs an operator of this package, not a {type(operator).__name__}")
    changed = copy.copy(operator)
    changed.adjoint = "reference"
    return changed


def image_shape(operator: Any, y: torch.Tensor) -> tuple[int, ...]:
    """Shape (B, 3, H, W) of the image behind the measurement. Raises RestoreError when it is none."""
    try:
        shape = tuple(operator.A_adjoint(y).shape)
    except RuntimeError as error:
        raise RestoreError(f"the measurement of shape {tuple(y.shape)} does not fit the operator: {error}") from None
    if len(shape) != 4 or shape[1] != 3:
        raise RestoreError(f"the operator's images must be (B, 3, H, W), got {shape} from y of {tuple(y.shape)}")
    return shape


def check_parameters(function: Callable, parameters: dict[str, Any]) -> dict[str, Any]:
    """The given hyper-parameters, after checking that the sampler has them. Raises RestoreError otherwise."""
    known = [name for name in inspect.signature(function).parameters if name not in _WIRING]
    for name in parameters:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise RestoreError(f"sampler {function.__name__} has no parameter '{name}'; {hint}")
    norm = parameters.get("data_norm")
    if norm is not None and norm not in DATA_NORMS:
        raise RestoreError(f"unknown data_norm '{norm}'; known: {', '.join(DATA_NORMS)}")
    return parameters


class explain_out_of_memory:
    """Context manager that turns an allocation failure into a RestoreError naming what lowers the memory."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, traceback) -> None:
        text = str(error)
        failed = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if failed or (isinstance(error, RuntimeError) and "can't allocate memory" in text):
            raise RestoreError(
                "out of memory; use --checkpointing, a smaller --batch-size or --max-windows, or --precision bf16"
            ) from error


def _with_progress(callback, first: int, count: int, total: int):
    if callback is None:
        return None
    return lambda step: callback({**step, "first": first, "count": count, "total": total})
