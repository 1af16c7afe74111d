"""Restorer: runs one Method on one backbone, for images of any size and number."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import operators
from operators import RestoreError
from restore import method as methods
from restore import samplers, zoo
from restore.backbones.ambient import neutral_state
from restore.backbones.base import count_image_channels
from restore.backbones.lean import run_lean
from restore.backbones.memory_options import enable_block_checkpointing, enable_vae_slicing, enable_vae_tiling
from restore.backbones.sizes import Sized, default_overlap
from restore.guidance import Guidance, resolve_guidance
from restore.guidance.layers import format_layer_table
from restore.method import Method, Situation
from restore.protocol import describe_run, fingerprint_backbone, hash_backbone
from restore.restoration import (
    Restoration,
    check_batches,
    check_clash,
    check_region,
    choose_device,
    encode_condition,
    explain_out_of_memory,
    find_batch_size,
    join_channels,
    measure_residual,
    observe_run,
    prepare_measurement,
    select_condition,
    split_channels,
)
from restore.samplers.generate import generate
from restore.samplers.likelihood import gaussian_sigma, is_linear_gaussian
from restore.samplers.noise import ImageNoise
from restore.zoo.sharing import SharedPrior


def load(
    name: str | Path = "embedded",
    *,
    device: str = "auto",
    precision: str | None = "fp32",
    offline: bool = False,
    checkpointing: bool = False,
    overlap: float | None = None,
    max_windows: int = 16,
    vae_slicing: bool = False,
    vae_tiling: bool = False,
    vae: str | Path | None = None,
    per_channel: bool = False,
    **options: Any,
) -> Restorer:
    """Return a Restorer for a model of `restore models list`, a diffusers folder or a checkpoint file.

    device: "auto" (CUDA, else MPS, else CPU) or torch's name. precision: of the network's arithmetic, "fp32", "bf16",
    "fp16", or "auto": bf16 where the device has it natively, else fp32; None: as `restore run`, "auto" for priors
    measured to restore as well. offline: never download. checkpointing: less memory, more time. overlap, max_windows:
    see Sized. vae_slicing, vae_tiling: decode one image, one tile at a time (latent models; a tile's borders are
    blended: another result). vae: "tiny" for the distilled autoencoder of a latent model (TAESD), or the name or folder
    of another one. per_channel: a prior of grey images restores colour channel by channel. options: what weights do not
    tell, such as heads, head_channels, attention_order, schedule, prediction_type and scale_factor, see zoo.options.
    Raises RestoreError for unknown names, broken weights and a file that does not tell what is needed, which is named.
    """
    chosen = choose_device(device)
    with neutral_state(chosen):  # weights made in inference mode could never be differentiated through
        where = {"device": chosen, "precision": precision, "offline": offline or None}
        found, backbone = zoo.load_backbone(name, **where, vae=vae, options=options)
    if checkpointing:
        enable_block_checkpointing(backbone)
    if vae_slicing:
        enable_vae_slicing(backbone)
    if vae_tiling:
        enable_vae_tiling(backbone)
    windows = {"overlap": overlap, "max_windows": max_windows, "recompute_windows": checkpointing}
    return Restorer(backbone, found.name, **windows, per_channel=per_channel).note_source(found, options, vae)


class Restorer(SharedPrior):
    """Restores measurements with a diffusion prior.

    backbone: see restore.backbones.base. name: looks presets up. overlap, max_windows and recompute_windows concern
    images beyond the trained resolution and memory, see Sized. per_channel: if the prior is of grey images, restore
    those of three channels one channel after another, all with the same noise. channels: of the prior's images, 3 or 1.
    options: what its loader needed to know; given: the caller's part of it.
    One Restorer may be used from several threads.
    """

    def __init__(
        self, backbone, name="custom", *, overlap=None, max_windows=16, recompute_windows=False, per_channel=False
    ) -> None:
        self.backbone, self.name, self.per_channel = backbone, name, per_channel
        self.channels, self.options, self.given = count_image_channels(backbone), {}, {}
        if self.channels not in (1, 3):
            raise RestoreError(f"the prior's images must be grey or colour, of 1 or 3 channels, got {self.channels}")
        if per_channel and self.channels != 1:
            raise RestoreError("per_channel must be False for a prior of colour images")
        overlap = default_overlap(backbone) if overlap is None else overlap
        self.windows = {"overlap": overlap, "max_windows": max_windows, "recompute_windows": recompute_windows}
        self.kind = "pixels" if backbone.downscale == 1 else "latents"
        self.device = next(backbone.network.parameters()).device

    def prior(self, height: int, width: int) -> Sized:
        """Return the prior of images of this size, as samplers see it."""
        return Sized(self.backbone, height, width, **self.windows)

    def method(
        self,
        operator: Any,
        *,
        task: str | None = None,
        sampler: str | Callable | None = None,
        quality: str | None = None,
        data: str | None = None,
        reference: bool = False,
        size: tuple[int, int] | None = None,
        samples: int = 1,
        steps: int | str | None = None,
        guidance: Guidance | None | str = "preset",
        parameters: Mapping[str, Any] | None = None,
    ) -> Method:
        """Resolve a restoration: the preset of (this backbone, task or operator, sampler) with a caller's choices.

        task: a name of configs/task. sampler: a name, "module:function" or a function. quality: "fast", "balanced" or
            "best" in place of a sampler: each names one, with its steps.
        data: "ffhq" or "imagenet", if presets were published for both with one backbone.
        reference: compute what the sampler's authors' code does beyond the paper (its page has what).
        size: (H, W) of the images, without an operator's margin; default: the operator's. It and `samples` decide the
            default sampler.
        steps, guidance, parameters: in place of the preset's; guidance=None is the plain sampler.
        Raises RestoreError for unknown names and parameters, missing ones, and several samples of a deterministic
        sampler.
        """
        height, width = size or getattr(operator, "image_size", None) or (0, 0)
        situation = Situation(
            backbone=self.name,
            operator=getattr(operator, "name", type(operator).__name__),
            task=task,
            kind=self.kind,
            linear=is_linear_gaussian(operator),
            sigma=gaussian_sigma(operator),
            windows=max(height, width) > self.backbone.resolution * self.backbone.downscale,
            samples=samples,
            data=data,
        )
        preset = methods.find_preset(situation, sampler, quality)
        published = methods.find_reference(preset.sampler) if reference else {}
        preset = replace(preset, adjoint=published.get("adjoint", "exact"))
        parameters = {**published.get("parameters", {}), **(parameters or {})}
        method = preset.override(steps=steps, guidance=guidance, parameters=parameters)
        method.check_samples(samples)
        if method.steps is None:
            raise RestoreError(
                f"steps must be given for sampler {samplers.sampler_name(method.sampler)}, which has no preset"
            )
        return method

    def default_layers(self) -> list[str]:
        """Return PAG's layers for this backbone: those of its first preset with PAG, else the middle block's."""
        layers = methods.find_pag_layers(self.name)
        return layers or [path for path in self.backbone.attention if path.startswith("mid_block")][:1]

    def layer_table(self, layers: str | Sequence[str] | None = None) -> list[str]:
        """Return a line per self-attention layer: short name, paper's name, diffusers path, heads, resolution.

        layers: only what this choice selects (as guidance takes it, "i5:0,3,m1"), with the heads it selects.
        """
        return format_layer_table(self.backbone.attention, self.backbone.resolution, layers)

    def __call__(
        self,
        y: Any,
        operator: Any,
        method: Method | None = None,
        *,
        samples: int = 1,
        seed: int = 0,
        image_ids: Sequence[str] | None = None,
        batch_size: int | str = 1,
        condition: torch.Tensor | None = None,
        label: int | str | None = None,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        callback: Callable[[dict], None] | None = None,
        task: str | None = None,
        sampler: str | Callable | None = None,
        quality: str | None = None,
        data: str | None = None,
        reference: bool = False,
        steps: int | str | None = None,
        guidance: Guidance | None | str = "preset",
        region: torch.Tensor | None = None,
        **parameters: Any,
    ) -> Restoration:
        """Restore y = A(x) + n.

        y: measurement (B, ...) on the range [-1, 1], or images in any form that io.to_tensor takes. operator: an
            `operators.Operator` or anything with A and A_adjoint, such as a deepinv physics; A_adjoint(y) tells the
            image's size.
        method: what `Restorer.method` returns. Without it, task, sampler, quality, data, reference, steps, guidance and
            the sampler's own parameters (zeta, ddim_eta, ...) are passed to `Restorer.method`.
        samples: posterior samples per measurement. seed, image_ids: noise is a function of (seed,
            image id, sample index); ids default to "0", "1", ...
        batch_size: samples computed together; "auto": what memory allows. With 1 a result has the same bytes whatever
            else is computed; larger batches, faster on a GPU, are equal to rounding, which DPS can magnify where a
            pixel crosses the clamp of x0_hat, and RED-diff and ReSample where a gradient nearly vanishes (Adam).
        condition: class labels (B,), or embeddings (B or 1, tokens, width). In its place, label: one class, by its
            number or name; prompt, negative_prompt: text, and text in place of the empty prompt of CFG's weak pass,
            for backbones with a text encoder.
        region: where the result matters, (1 or B, 1, H, W); windows elsewhere are not computed, see check_region.
        callback: receives the sampler's dict and what `restore.restoration.observe_run` adds.
        Works inside torch.no_grad() and torch.inference_mode(). Raises RestoreError for unknown parameters, sizes
        that do not fit, non-finite input or samples, and insufficient memory.
        """
        choices = {"task": task, "sampler": sampler, "quality": quality, "data": data, "reference": reference}
        choices |= {"steps": steps, "guidance": guidance}
        with neutral_state(self.device), torch.enable_grad():
            y, shape = prepare_measurement(y, operator, self.device, self.channels, self.per_channel)
            check_batches("samples", samples, batch_size, auto=True)
            ids = [str(i) for i in range(len(y))] if image_ids is None else [str(i) for i in image_ids]
            if len(ids) != len(y) or len(set(ids)) != len(ids):
                raise RestoreError(f"image_ids must be {len(y)} different names, got {ids}")
            if method is None:
                check_clash(sampler, _CALL)
                size = tuple(operators.cut_margin(operator, torch.empty(shape[-2:], device="meta")).shape)
                method = self.method(operator, size=size, samples=samples, parameters=parameters, **choices)
            else:
                for name in [*(name for name in choices if choices[name] != _DEFAULTS[name]), *parameters]:
                    raise RestoreError(f"{name}= belongs to the method; try restorer.method(operator, {name}=...)")
                method.check_samples(samples)
            prior = self.prior(*shape[-2:])
            prior.region = check_region(region, method, shape)
            labels = None if label is None else [label]
            condition = encode_condition(prior, condition, labels, prompt, negative_prompt)
            singly = shape[1] if self.channels == 1 else 1  # channels that are restored by themselves
            if singly > 1:
                y, operator = split_channels(y, operator, shape)
                rows = [b for b in range(len(ids)) for _ in range(singly)]
                ids, condition = [ids[b] for b in rows], select_condition(condition, rows)
            items = [(b, k) for b in range(len(y)) for k in range(samples)]
            batch_size = find_batch_size(batch_size, self, operator, y, tuple(shape[-2:]), method, len(items))
            result = self._run(y, operator, prior, method, ids, items, seed, batch_size, condition, callback)
            return join_channels(result, singly) if singly > 1 else result

    def _run(
        self, y, operator, prior, method: Method, ids, items, seed, batch_size, condition, callback
    ) -> Restoration:
        """Run the sampler on `items`, (image, sample) pairs, in batches."""
        started = time.perf_counter()
        if method.adjoint != "exact":
            operator = operators.with_adjoint(operator, method.adjoint)
        sampler, used, results = samplers.find_sampler(method.sampler), {}, []
        for first in range(0, len(items), batch_size):
            batch = items[first : first + batch_size]
            rows = [b for b, _ in batch]
            guidance, receive = observe_run(callback, method.guidance, used, (first, len(batch), len(items)), prior)
            with explain_out_of_memory(), run_lean():
                x = sampler(
                    prior,
                    operators.select_rows(operator, rows),
                    y[rows],
                    noise=ImageNoise([(seed, ids[b], k) for b, k in batch], self.device),
                    steps=method.steps,
                    guidance=guidance,
                    condition=select_condition(condition, rows),
                    callback=receive,
                    **method.parameters,
                )
            results.append(x.detach().float())
        x, rows = torch.cat(results), [b for b, _ in items]
        samples = len(items) // len(y)
        residual, ratio = measure_residual(x, y[rows], operators.select_rows(operator, rows))
        x = operators.cut_margin(operator, x)
        protocol = {**self.protocol(operator, method, seed=seed, batch_size=batch_size), "samples": samples}
        return Restoration(
            samples=x.clamp(-1, 1).view(len(y), samples, *x.shape[1:]),
            residual=residual.view(len(y), samples),
            residual_ratio=None if ratio is None else ratio.view(len(y), samples),
            nfe=prior.evaluations // len(results),
            seconds=time.perf_counter() - started,
            protocol=protocol | ({"used": used} if used else {}),
        )

    def protocol(self, operator: Any, method: Method, **more: Any) -> dict[str, Any]:
        """Return what determines a result of y, ready for JSON: method, operator, hash of the weights, precision,
        and what rounding depends on (torch's version, device, threads). A restoration adds what its sampler `used`."""
        return {**describe_run(self, operator, method), **more}

    def weights_hash(self) -> str:
        """Return twelve hexadecimal digits of the weights of network and autoencoder as they are in memory now."""
        fingerprint = fingerprint_backbone(self.backbone)
        known, digest = getattr(self, "_weights_hash", (None, ""))
        if known != fingerprint:
            digest = hash_backbone(self.backbone)
            self._weights_hash = fingerprint, digest
        return digest

    def generate(
        self,
        n: int = 1,
        *,
        guidance: Guidance | None = None,
        steps: int | str | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        labels: Sequence[int | str] | None = None,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        ddim_eta: float | None | str = "preset",
        batch_size: int = 1,
        first: int = 0,
        callback: Callable[[dict], None] | None = None,
    ) -> torch.Tensor:
        """Return n samples of the prior (with `labels` or a prompt: conditional ones) (n, 3, H, W) in [-1, 1].

        Sample i depends only on (seed, first + i). size: (H, W) in pixels, the trained resolution by default.
        steps: None, ddim_eta: "preset": those of restore.method.find_generation. labels: one class per image.
        """
        check_batches("n", n, batch_size)
        if labels is not None and len(labels) != n:
            raise RestoreError(f"labels must be one for each of {n} images, got {len(labels)}")
        method = methods.find_generation(self.name, steps, ddim_eta)
        side, results = self.backbone.resolution * self.backbone.downscale, []
        with neutral_state(self.device):
            prior = self.prior(*(size or (side, side)))
            condition = encode_condition(prior, None, labels, prompt, negative_prompt)
            guidance = resolve_guidance(guidance, None)
            for start in range(0, n, batch_size):
                rows = list(range(start, min(start + batch_size, n)))
                observed, receive = observe_run(callback, guidance, {}, (start, len(rows), n), prior)
                options = {"steps": method.steps, "guidance": observed, "callback": receive, **method.parameters}
                noise = ImageNoise([(seed, "generate", first + i) for i in rows], self.device)
                with explain_out_of_memory(), run_lean():
                    x = generate(prior, len(rows), noise=noise, condition=select_condition(condition, rows), **options)
                results.append(x.float().clamp(-1, 1))
        return torch.cat(results)


_CALL = inspect.signature(Restorer.__call__).parameters
_DEFAULTS = {name: parameter.default for name, parameter in _CALL.items()}
