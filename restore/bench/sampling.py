"""One batch of a benchmark as tensors: measured and restored, generated, or made by a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import operators
from operators import RestoreError
from restore import guidance as guidances
from restore.bench.baselines import BASELINES
from restore.bench.config import method_of
from restore.images.resampling import Resampling, enlarge_image
from restore.samplers.noise import ImageNoise, derive_seed, measurement_generator


@dataclass
class Estimates:
    """samples (B, K, 3, H, W) in [-1, 1]; nfe per sample; residual_ratio (B,) and measurement where there are any;
    protocol: the Restorer's, see Restorer.protocol."""

    samples: torch.Tensor
    nfe: int
    residual_ratio: torch.Tensor | None = None
    measurement: torch.Tensor | None = None
    protocol: dict[str, Any] = field(default_factory=dict)


def build_operator(task: Mapping[str, Any], size: tuple[int, int], image_id: str, seed: int) -> Any:
    """The operator of a task at `size`; with `per_image` its own random mask or kernel for every image."""
    mapping = dict(task["operator"])
    if task["per_image"]:
        # numpy's legacy generators, which the masks' published law uses, take 32-bit seeds.
        mapping["seed"] = derive_seed(seed, image_id, "operator") % 2**32
    return operators.build_operator(mapping, image_size=size)


def joined(each: Sequence[Any]) -> Any:
    """One operator for a batch of images with masks or kernels of their own. RestoreError for other operators."""
    first = each[0]
    common = {"noise": first.noise, "image_size": first.image_size, "adjoint": first.adjoint}
    if len(each) == 1:
        return first
    if isinstance(first, operators.Inpainting):
        whole = operators.Inpainting(torch.cat([a.mask for a in each]), **common)
    elif isinstance(first, operators.Blur):
        whole = operators.Blur(torch.stack([a.kernel for a in each]), **common)
    else:
        raise RestoreError(f"operators of {first.name} cannot share a batch; give batch=1, or per_image=false")
    whole.name = first.name  # by which presets are found
    return whole


def restore_batch(
    restorer: Any, x: torch.Tensor, ids: Sequence[str], task: Mapping[str, Any], method: Mapping[str, Any],
    *, seed: int, samples: int, device: torch.device,
) -> Estimates:  # fmt: skip
    """Degrade x (B, 3, H, W) and restore it. Each image's mask, kernel and noise follow from (seed, its id) alone.

    restorer: a Restorer, None for baselines.
    """
    own_size = x.shape[-1]
    side = task["solve_at"]
    resampled = Resampling(side, task["resample"]) if side and side != own_size else None
    if resampled:
        x = enlarge_image(x, side, method=resampled.method)
    each = [build_operator(task, tuple(x.shape[-2:]), i, seed) for i in (ids if task["per_image"] else ids[:1])]
    # Image by image and on the CPU: the measurement has the same bytes in every batch and on every device.
    y = torch.cat(
        [each[min(b, len(each) - 1)](x[b : b + 1], measurement_generator(seed, i)) for b, i in enumerate(ids)]
    )
    operator = joined(each)
    if restorer is None:
        result = _baseline(y.to(device), operator, method)
    else:
        chosen = method_of(method)
        done = restorer(
            y.to(device), operator, sampler=chosen.sampler, guidance=chosen.guidance, steps=chosen.steps,
            samples=samples, seed=seed, image_ids=ids, batch_size=len(ids) * samples, label=_one_label(task["labels"]),
            **chosen.parameters,
        )  # fmt: skip
        ratio = None if done.residual_ratio is None else done.residual_ratio[:, 0].cpu()
        result = Estimates(done.samples.cpu(), done.nfe, ratio, protocol=done.protocol)
    if resampled:
        result.samples = resampled.reduce(result.samples, (own_size, own_size))
    result.measurement = y
    return result


def _baseline(y: torch.Tensor, operator: Any, method: Mapping[str, Any]) -> Estimates:
    x = BASELINES[method["sampler"]](y, operator, **method["parameters"])
    sigma, ratio = getattr(operator.noise, "sigma", None), None
    if sigma:
        residual = torch.linalg.vector_norm((y - operator.A(x)).flatten(1), dim=1)
        ratio = (residual / (float(sigma) * y[0].numel() ** 0.5)).cpu()
    # A baseline is one estimate, whatever the number of samples asked of samplers.
    return Estimates(x[:, None].cpu(), 0, ratio)


def _one_label(labels: Any) -> int | str | None:
    if isinstance(labels, list) or labels == "uniform":
        raise RestoreError(f"labels={labels}: a restoration takes one class, by name or index, for all its images")
    return labels


def generate_batch(
    restorer: Any, ids: Sequence[str], task: Mapping[str, Any], method: Mapping[str, Any], *, seed: int
) -> Estimates:
    """Unconditional or class-conditional samples: those of Restorer.generate for the seed, from the id (a number) on.

    task.labels: None, a class by name or index, a list of them to cycle through, or "uniform": drawn per image from
    its id, the null class left out.
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
    eta = method["parameters"].get("eta", 0.0) if method["sampler"] == "ddim" else None
    chosen, calls = method_of(method), 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = restorer.backbone.network.register_forward_pre_hook(count)
    try:
        x = restorer.generate(
            len(ids), guidance=chosen.guidance, steps=chosen.steps, seed=seed, labels=labels, ddim_eta=eta,
            batch_size=len(ids), first=int(ids[0]),
        )  # fmt: skip
    finally:
        hook.remove()
    return Estimates(x.cpu()[:, None], calls, protocol=restorer.protocol(None, chosen, seed=seed))


def load_pipeline(name: str, *, device: torch.device, precision: str, offline: bool) -> Any:
    """diffusers' StableDiffusionPipeline of a registered model or folder, with the DDIM scheduler."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from restore import zoo

    folder = zoo.pull(name, offline=offline)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    if dtype != torch.float32:
        options["torch_dtype"] = dtype
    try:
        pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        raise RestoreError(
            f"{folder} is no folder of a Stable Diffusion pipeline: {str(error).splitlines()[0]}"
        ) from error
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def pipeline_batch(
    pipe: Any, ids: Sequence[str], prompts: Sequence[str], task: Mapping[str, Any], method: Mapping[str, Any],
    *, seed: int,
) -> Estimates:  # fmt: skip
    """Text-to-image by an unmodified diffusers pipeline under `restore.guided` (PAG paper, eq. 14).

    guidance.cfg.scale is w of eq. 14, diffusers' guidance_scale - 1.
    """
    from restore import guided

    terms = method["guidance"] or []
    terms = [{name: options} for name, options in terms.items()] if isinstance(terms, dict) else terms
    cfg = sum((t.get("cfg") or t).get("scale", 0.0) for t in terms if "cfg" in (*t, t.get("name")))
    others = [t for t in terms if "cfg" not in (*t, t.get("name"))]
    side = pipe.unet.config.sample_size
    shape = (len(ids), pipe.unet.config.in_channels, side, side)
    latents = ImageNoise([(seed, i, 0) for i in ids], pipe.device, pipe.unet.dtype)(0, shape, "start")
    passes = 1 + len(others) + (cfg > 0)
    with torch.no_grad(), guided(pipe, guidances.build_guidance(others or None)):
        images = pipe(
            prompt=list(prompts),
            negative_prompt=[task["negative_prompt"]] * len(ids),
            latents=latents,
            num_inference_steps=int(method["steps"]),
            guidance_scale=1.0 + cfg,
            output_type="pt",
        ).images
    return Estimates(images.float().mul(2).sub(1).clamp(-1, 1).cpu()[:, None], passes * int(method["steps"]))
