"""Restorer: one backbone, one Method, wired for images of any size and number."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import operators
from operators import RestoreError
from restore import method, samplers, zoo
from restore.backbones.sizes import Sized
from restore.guidance import Guidance
from restore.guidance.layers import table
from restore.images import io
from restore.method import Method
from restore.restoration import Restoration, choose_device, class_index, explain_out_of_memory, rows_of, watching
from restore.samplers.generate import generate
from restore.samplers.likelihood import is_linear_gaussian
from restore.samplers.noise import ImageNoise


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
    vae: str | Path | None = None,
) -> Restorer:
    """A Restorer for a model of `restore models list`, a diffusers folder or a checkpoint file.

    device: "auto" (CUDA, else MPS, else CPU) or torch's name. precision: "fp32", "bf16" or "fp16" of the
    network's arithmetic. offline: never download. checkpointing: less memory, more time. overlap,
    max_windows: see Sized. vae_slicing, vae_tiling: decode one image, one tile at a time (latent models; a
    tile's borders are blended, so the result differs a little). vae: "tiny" for the distilled autoencoder of a latent
    model (TAESD), or the name or folder of another one. Raises RestoreError for unknown names and broken weights.
    """
    with torch.inference_mode(False):  # weights made in inference mode could never be differentiated through
        found, backbone = zoo.load_backbone(
            name,
            device=choose_device(device),
            precision=precision,
            offline=offline or None,
            checkpointing=checkpointing,
            vae_slicing=vae_slicing,
            vae_tiling=vae_tiling,
            vae=vae,
        )
    return Restorer(backbone, found.name, overlap=overlap, max_windows=max_windows, checkpointing=checkpointing)


class Restorer:
    """Restores measurements with a diffusion prior.

    backbone: see restore.backbones.base. name: looks presets up. overlap, max_windows and
    checkpointing concern images beyond the trained resolution and memory, see Sized.
    One Restorer may be used from several threads.
    """

    def __init__(self, backbone, name: str = "custom", *, overlap=0.5, max_windows=16, checkpointing=False) -> None:
        self.backbone, self.name = backbone, name
        self.windows = {"overlap": overlap, "max_windows": max_windows, "checkpointing": checkpointing}
        self.kind = "pixels" if backbone.downscale == 1 else "latents"
        self.device = next(backbone.network.parameters()).device

    def sized(self, height: int, width: int) -> Sized:
        """The prior of images of this size, as samplers see it."""
        return Sized(self.backbone, height, width, **self.windows)

    def method(
        self,
        operator: Any,
        *,
        task: str | None = None,
        sampler: Any = None,
        data: str | None = None,
        quality: str | None = None,
        reference: bool = False,
        size: tuple[int, int] | None = None,
        samples: int = 1,
        parameters: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Method:
        """The preset of (this backbone, task or operator, sampler), with what a caller changes (Method.changed).

        size: (H, W) of the images and samples: how many of each, where no sampler is named (see method.find).
        Raises RestoreError for several samples by a sampler that draws nothing.
        """
        name = getattr(operator, "name", type(operator).__name__)
        linear = is_linear_gaussian(operator)
        size = size or getattr(operator, "image_size", None) or (0, 0)
        windows = max(size) > self.backbone.resolution * self.backbone.downscale
        found = method.find(self.name, task, name, sampler, data, self.kind, quality, linear, windows, samples > 1)
        if samples > 1 and samplers.sampler_name(found.sampler) in samplers.DETERMINISTIC:
            raise RestoreError(
                f"sampler {samplers.sampler_name(found.sampler)} draws nothing, its samples would be equal: "
                "give samples=1"
            )
        more = method.reference(found.sampler) if reference else {}
        chosen = found.changed(parameters={**more, **(parameters or {})}, **changes)
        if chosen.steps is None:
            raise RestoreError(f"sampler {samplers.sampler_name(chosen.sampler)} has no preset here: give steps=N")
        return chosen

    def default_layers(self) -> list[str]:
        """PAG's layers for this backbone: those of its first preset with PAG, else the middle block's."""
        layers = method.default_layers(self.name)
        return layers or [path for path in self.backbone.attention if path.startswith("mid_block")][:1]

    def layer_table(self, layers: str | Sequence[str] | None = None) -> list[str]:
        """One line per self-attention layer: short name, paper's name, diffusers path, heads, resolution.

        layers: only what this choice selects (as guidance takes it, "i5:0,3,m1"), with the heads it selects.
        """
        return table(self.backbone.attention, self.backbone.resolution, layers)

    def __call__(
        self,
        y: Any,
        operator: Any,
        *,
        task: str | None = None,
        sampler: str | Callable | None = None,
        guidance: Guidance | None | str = "preset",
        steps: int | str | None = None,
        samples: int = 1,
        seed: int = 0,
        image_ids: Sequence[str] | None = None,
        batch_size: int = 1,
        condition: torch.Tensor | None = None,
        label: int | str | None = None,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        data: str | None = None,
        quality: str | None = None,
        reference: bool = False,
        callback: Callable[[dict], None] | None = None,
        **parameters: Any,
    ) -> Restoration:
        """Restore y = A(x) + n.

        y: measurement (B, ...) on the range [-1, 1], or images in any form that io.to_tensor takes. operator: an
            `operators.Operator` or anything with A and A_adjoint, such as a deepinv physics; A_adjoint(y) tells the
            image's size.
        sampler (a name, "module:function" or a function), steps, guidance, parameters (zeta, ddim_eta, ...): what is
            not given comes from the preset of (backbone, task or operator, sampler); guidance=None is the plain
            sampler, task a name of configs/task.
        quality: "fast", "balanced" or "best" in place of a sampler: each names one, with its steps.
        samples: posterior samples per measurement. seed, image_ids: noise is a function of (seed,
            image id, sample index); ids default to "0", "1", ...
        batch_size: samples computed together. With 1 (default) a result has the same bytes whatever
            else is computed; larger batches are equal to rounding, which DPS can magnify where a pixel
            crosses the clamp of x0_hat, and faster on a GPU.
        condition: class labels (B,), or embeddings (B or 1, tokens, width). In its place, label: one class, by its
            number or name; prompt, negative_prompt: text, and text in place of the empty prompt of CFG's weak branch,
            for backbones with a text encoder.
        data: "ffhq" or "imagenet", where presets were published for both with one backbone.
        reference: compute what the sampler's authors' code does, beyond the paper (PSLD: noise on the
            predicted measurement, sampled encoding, shifted indices, approximate transposes).
        callback: receives the sampler's dict plus `first`, `count` and `total` (samples), and, where there is guidance,
            `signals`: for each term the step's last |eps − eps_weak|, averaged over the channels, (B, 1, h, w) as x_t,
            or None where it was off.
        Works inside torch.no_grad() and torch.inference_mode(). Raises RestoreError for unknown parameters, sizes
        that do not fit, non-finite input or samples, and memory that does not suffice.
        """
        with torch.inference_mode(False), torch.enable_grad():
            y, shape = self._measurement(y, operator)
            if samples < 1 or batch_size < 1:
                raise RestoreError("samples and batch_size must be at least 1")
            ids = [str(i) for i in range(len(y))] if image_ids is None else [str(i) for i in image_ids]
            if len(ids) != len(y) or len(set(ids)) != len(ids):
                raise RestoreError(f"{len(y)} measurements need {len(y)} different image_ids, got {ids}")
            if shape[1] != 3:
                raise RestoreError(f"the operator's images must be (B, 3, H, W), got {tuple(shape)}")
            chosen = self.method(
                operator,
                task=task,
                sampler=sampler,
                data=data,
                quality=quality,
                reference=reference,
                size=shape[-2:],
                samples=samples,
                steps=steps,
                guidance=guidance,
                parameters=parameters,
            )
            if reference:
                operator = operators.with_adjoint(operator, "reference")
            prior = self.sized(*shape[-2:])
            if label is not None and (condition is not None or prompt is not None):
                raise RestoreError("give either a label or another condition, not both")
            condition = condition if label is None else self._classes([label])
            condition = self._condition(condition, prompt, negative_prompt, prior)
            return self._restore(y, operator, prior, chosen, ids, samples, seed, batch_size, condition, callback)

    def _measurement(self, y: Any, operator: Any) -> tuple[torch.Tensor, tuple[int, ...]]:
        """y on the network's device, its images' shape. A grey picture counts as colour where its images would be grey;
        numbers far outside of [-1, 1] are refused where y is a picture, not for other kinds of measurement."""
        if isinstance(y, torch.Tensor) and y.is_floating_point() and y.dim() not in (3, 4):
            if not torch.isfinite(y).all():
                raise RestoreError("the measurement holds NaN or infinite values")
            y = y.float()
        else:
            picture = isinstance(operator, operators.Operator) and operator.linear
            y = io.to_tensor(y, channels=None, largest=8.0 if picture else float("inf"))
        y = y.to(self.device)
        shape = operators.image_shape(operator, y)
        if shape[1] != 1:
            return y, shape
        y = y.expand(-1, 3, -1, -1)
        return y, operators.image_shape(operator, y)

    def _restore(
        self, y, operator, prior, chosen: Method, ids, samples, seed, batch_size, condition, callback
    ) -> Restoration:
        function, used = samplers.find_sampler(chosen.sampler), {}
        started = time.perf_counter()
        items = [(b, k) for b in range(len(y)) for k in range(samples)]
        results, calls = [], 0
        for first in range(0, len(items), batch_size):
            chunk = items[first : first + batch_size]
            rows = [b for b, _ in chunk]
            guidance, watch = watching(callback, chosen.guidance, used, first, len(chunk), len(items))
            with explain_out_of_memory():
                x = function(
                    prior,
                    operators.select_rows(operator, rows),
                    y[rows],
                    noise=ImageNoise([(seed, ids[b], k) for b, k in chunk], self.device),
                    steps=chosen.steps,
                    guidance=guidance,
                    condition=rows_of(condition, rows),
                    callback=watch,
                    **chosen.parameters,
                )
            results.append(x.detach().float())
            calls += 1
        x = torch.cat(results)
        rows = [b for b, _ in items]
        with torch.no_grad():
            flat = (y[rows] - operators.select_rows(operator, rows).A(x.to(y.dtype))).flatten(1)
        residual = torch.linalg.vector_norm(flat, dim=1).view(len(y), samples)
        sigma = getattr(getattr(operator, "noise", None), "sigma", None)
        return Restoration(
            samples=x.clamp(-1, 1).view(len(y), samples, *x.shape[1:]),
            residual=residual,
            residual_ratio=residual / (float(sigma) * flat.shape[1] ** 0.5) if sigma else None,
            nfe=prior.evaluations // calls,
            seconds=time.perf_counter() - started,
            protocol={**self.protocol(operator, chosen, seed=seed, batch_size=batch_size), "samples": samples}
            | ({"used": used} if used else {}),
        )

    def protocol(self, operator: Any, chosen: Method, **more: Any) -> dict[str, Any]:
        """Everything that determines a result, ready for JSON: the method, the operator, the network's weights (hash)
        and precision, and what rounding depends on (torch's version, device, number of threads). What a sampler
        scales by itself is added as `used`."""
        noise = getattr(operator, "noise", None)
        dtype = getattr(self.backbone, "dtype", None) or self.backbone.network.dtype
        return {
            "backbone": self.name,
            "weights": self.weights_hash(),
            **({"autoencoder": type(self.backbone.vae).__name__} if self.kind == "latents" else {}),
            "precision": str(dtype).removeprefix("torch."),
            "operator": repr(operator),
            "noise": repr(noise) if noise is not None else None,
            "range": "[-1, 1]",
            "method": chosen.describe(),
            "windows": {key: value for key, value in self.windows.items() if key != "checkpointing"},
            "torch": torch.__version__,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            **more,
        }

    def weights_hash(self) -> str:
        """Twelve hexadecimal digits of the network's (and autoencoder's) weights in memory, whatever file they are
        from; computed once."""
        if not hasattr(self, "_weights_hash"):
            digest = hashlib.blake2b(digest_size=6)
            for network in (self.backbone.network, getattr(self.backbone, "vae", None)):
                for name, tensor in sorted(network.state_dict().items()) if network is not None else ():
                    flat = tensor.detach().contiguous().reshape(-1).cpu()
                    digest.update(name.encode())
                    digest.update(flat.view(torch.uint8).numpy())
            self._weights_hash = digest.hexdigest()
        return self._weights_hash

    def _classes(self, labels: Sequence[int | str]) -> torch.Tensor:
        """The classes of these numbers or names (n,). Raises RestoreError where the backbone has none of them."""
        classes, names = (getattr(self.backbone, name, None) for name in ("classes", "labels"))
        if classes is None:
            raise RestoreError(f"backbone {self.name} has no classes: it takes no label")
        return torch.tensor([class_index(label, classes, names or ()) for label in labels], device=self.device)

    def _condition(self, condition, prompt, negative_prompt, prior: Sized):
        """The condition of the strong pass; `negative_prompt` becomes the null condition of this call's prior."""
        encode = getattr(self.backbone, "encode_prompt", None)
        if (prompt is not None or negative_prompt is not None) and encode is None:
            raise RestoreError(f"backbone {self.name} has no text encoder: it takes no prompt")
        if prompt is not None and condition is not None:
            raise RestoreError("give either a prompt or a condition, not both")
        if negative_prompt is not None:
            prior.null_condition = encode(negative_prompt).to(self.device)
        return condition if prompt is None else encode(prompt).to(self.device)

    def generate(
        self,
        n: int = 1,
        *,
        guidance: Guidance | None = None,
        steps: int | str = 250,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        labels: Sequence[int | str] | None = None,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        ddim_eta: float | None = None,
        batch_size: int = 1,
        first: int = 0,
        callback: Callable[[dict], None] | None = None,
    ) -> torch.Tensor:
        """n samples of the prior (with `labels` or a prompt, of its conditional) (n, 3, H, W) in [-1, 1].

        Sample i depends on (seed, first + i) alone. size: (H, W) in pixels, the trained resolution by default.
        labels: one class per image, by number or name. The other arguments are those of a restoration.
        """
        if n < 1 or batch_size < 1:
            raise RestoreError("the number of images and batch_size must be at least 1")
        if labels is not None and len(labels) != n:
            raise RestoreError(f"{n} images need {n} class labels, got {len(labels)}")
        side = self.backbone.resolution * self.backbone.downscale
        results = []
        with torch.inference_mode(False):
            prior = self.sized(*(size or (side, side)))
            given = None if labels is None else self._classes(labels)
            condition = self._condition(given, prompt, negative_prompt, prior)
            guidance = method.guidances.chosen(guidance, None)
            for start in range(0, n, batch_size):
                rows = list(range(start, min(start + batch_size, n)))
                own, watch = watching(callback, guidance, {}, start, len(rows), n)
                with explain_out_of_memory():
                    x = generate(
                        prior,
                        len(rows),
                        noise=ImageNoise([(seed, "generate", first + i) for i in rows], self.device),
                        steps=steps,
                        guidance=own,
                        condition=rows_of(condition, rows),
                        ddim_eta=ddim_eta,
                        callback=watch,
                    )
                results.append(x.float().clamp(-1, 1))
        return torch.cat(results)
