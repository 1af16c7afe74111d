"""One batch of a benchmark as tensors: restored, generated, or made by a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from operators import RestoreError
from restore.backbones.text_to_image import PipelineOptions, TextToImage
from restore.backbones.weights import DTYPES
from restore.bench.baselines import BASELINES
from restore.guidance import CFG
from restore.images.resampling import Resampling, enlarge_image
from restore.method import Method
from restore.samplers.noise import ImageNoise, derive_seed
from restore.task import measure_batch


@dataclass
class Estimates:
    """The images of a batch.

    samples: (B, K, 3, H, W) in [-1, 1]. nfe: per sample. residual_ratio: (B,), and measurement: (B, ...), of
    restorations. protocol: see Restorer.protocol.
    """

    samples: torch.Tensor
    nfe: int
    residual_ratio: torch.Tensor | None = None
    measurement: torch.Tensor | None = None
    protocol: dict[str, Any] = field(default_factory=dict)


def restore_batch(
    restorer: Any,
    x: torch.Tensor,
    ids: Sequence[str],
    task: Mapping[str, Any],
    method: Method,
    *,
    seed: int,
    samples: int,
    device: torch.device,
) -> Estimates:
    """Degrade x (B, 3, H, W) and restore it by the method, completed by the presets of the restorer.

    restorer: a Restorer, None for baselines. Each image's mask, kernel and noise depend only on (seed, its id).
    """
    size, side = x.shape[-1], task["solve_at"]
    resampling = Resampling(side, task["resample"]) if side and side != size else None
    if resampling:
        x = enlarge_image(x, side, method=resampling.method)
    operator, y = measure_batch(task["operator"], x, ids, seed=seed, per_image=task["per_image"])
    if restorer is None:
        estimates = _compute_baseline(y.to(device), operator, method)
    else:
        label = task["labels"]
        if isinstance(label, list) or label == "uniform":
            raise RestoreError(f"labels={label}: a restoration takes one class, by name or index, for all its images")
        choices = {"steps": method.steps, "guidance": method.guidance, "parameters": method.parameters}
        method = restorer.method(operator, sampler=method.sampler, samples=samples, size=x.shape[-2:], **choices)
        options = {"samples": samples, "seed": seed, "image_ids": ids, "batch_size": len(ids) * samples}
        result = restorer(y.to(device), operator, method, label=label, **options)
        ratio = None if result.residual_ratio is None else result.residual_ratio[:, 0].cpu()
        estimates = Estimates(result.samples.cpu(), result.nfe, ratio, protocol=result.protocol)
    if resampling:
        estimates.samples = resampling.reduce(estimates.samples, (size, size))
    estimates.measurement = y
    return estimates


def _compute_baseline(y: torch.Tensor, operator: Any, method: Method) -> Estimates:
    x = BASELINES[method.sampler](y, operator, **method.parameters)
    sigma, ratio = getattr(operator.noise, "sigma", None), None
    if sigma:
        residual = torch.linalg.vector_norm((y - operator.A(x)).flatten(1), dim=1)
        ratio = (residual / (float(sigma) * y[0].numel() ** 0.5)).cpu()
    # A baseline is one estimate, however many samples are requested of samplers.
    return Estimates(x[:, None].cpu(), 0, ratio)


def generate_batch(
    restorer: Any, ids: Sequence[str], task: Mapping[str, Any], method: Method, *, seed: int
) -> Estimates:
    """Return the samples of Restorer.generate for the seed, from the first id (a number) on.

    task.labels: None, a class by name or index, a list of them to cycle through, or "uniform": drawn per image from
    its id, without the null class.
    """
    labels = task["labels"]
    if labels == "uniform":
        classes, null = (getattr(restorer.backbone, name, None) for name in ("classes", "null_class"))
        known = [i for i in range(classes or 0) if i != null]
        if not known:
            raise RestoreError("labels=uniform needs a class-conditional backbone")
        labels = [known[derive_seed(seed, i, "label") % len(known)] for i in ids]
    elif labels is not None:
        cycle = labels if isinstance(labels, list) else [labels]
        labels = [cycle[int(i) % len(cycle)] for i in ids]
    eta = method.parameters.get("eta", 0.0) if method.sampler == "ddim" else None
    options = {"guidance": method.guidance, "steps": method.steps, "ddim_eta": eta, "seed": seed, "labels": labels}
    calls: list[None] = []
    with restorer.backbone.network.register_forward_pre_hook(lambda *_: calls.append(None)):
        x = restorer.generate(len(ids), batch_size=len(ids), first=int(ids[0]), **options)
    return Estimates(x.cpu()[:, None], len(calls), protocol=restorer.protocol(None, method, seed=seed))


def load_pipeline(
    name: str,
    *,
    device: torch.device,
    precision: str,
    offline: bool,
    options: PipelineOptions | None = None,
    upcoming: Sequence[str] = (),
) -> TextToImage:
    """Return the text-to-image pipeline of a registered model, a hub id or a folder.

    upcoming: see TextToImage. Raises RestoreError if it cannot be loaded.
    """
    from restore import zoo

    folder = zoo.pull(name, offline=offline)
    return TextToImage(folder, device=device, dtype=DTYPES[precision], options=options, upcoming=upcoming)


def run_pipeline(
    model: TextToImage,
    ids: Sequence[str],
    prompts: Sequence[str],
    task: Mapping[str, Any],
    method: Method,
    *,
    seed: int,
) -> Estimates:
    """Return text-to-image samples of an unmodified diffusers pipeline under `restore.guided` (PAG paper, eq. 14).

    The scale of CFG is w of eq. 14, diffusers' guidance_scale - 1 (FLUX: true_cfg_scale - 1).
    """
    from restore import guided

    terms = method.guidance.terms if method.guidance is not None else ()
    cfg = sum(term.scale for term in terms if isinstance(term, CFG))
    if any(term != CFG(term.scale) for term in terms if isinstance(term, CFG)):
        raise RestoreError("cfg must have only a scale in text_to_image, where the pipeline itself applies it")
    others = tuple(term for term in terms if not isinstance(term, CFG))
    passes = 1 + len(others) + (cfg > 0)
    pipe = model.prepare(prompts, task["negative_prompt"] if cfg else None)
    noise = ImageNoise([(seed, i, 0) for i in ids], model.device, model.dtype)
    generators = [torch.Generator().manual_seed(derive_seed(seed, i, "pipeline")) for i in ids]
    with guided(pipe, replace(method.guidance, terms=others) if others else None):
        options = {"steps": method.steps, "cfg": cfg, "negative": task["negative_prompt"], "generators": generators}
        images = model(prompts, lambda shape: noise(0, shape, "start"), **options)
    return Estimates(images[:, None], passes * int(method.steps))
