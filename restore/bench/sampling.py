"""One batch of a benchmark as tensors: measured and restored, generated, or made by a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import operators
from operators import RestoreError
from restore.bench import baselines
from restore.images.resampling import Resampled, enlarge
from restore.method import build_guidance
from restore.samplers.generate import generate
from restore.samplers.noise import ImageNoise, derive_seed
from restore.samplers.steps import respace


@dataclass
class Batch:
    """samples (B, K, 3, H, W) in [-1, 1]; nfe per sample; residual_ratio (B,) and measurement where there are any."""

    samples: torch.Tensor
    nfe: int
    residual_ratio: torch.Tensor | None = None
    measurement: torch.Tensor | None = None


def build_operator(task: Mapping[str, Any], size: tuple[int, int], image_id: str, seed: int) -> Any:
    """The operator of a task at `size`; with `per_image` its own random mask or kernel for every image."""
    mapping = dict(task["operator"])
    if task["per_image"]:
        # numpy's legacy generators, which the masks' published law uses, take 32-bit seeds.
        mapping["seed"] = derive_seed(seed, image_id, "operator") % 2**32
    return operators.build(mapping, image_size=size)


def restore_batch(
    restorer: Any, x: torch.Tensor, ids: Sequence[str], task: Mapping[str, Any], method: Mapping[str, Any],
    *, seed: int, samples: int, device: torch.device,
) -> Batch:  # fmt: skip
    """Degrade x (B, 3, H, W) and restore it. Each image's mask, kernel and noise follow from (seed, its id) alone.

    restorer: a Restorer, None for baselines.
    """
    own_size = x.shape[-1]
    side = task["solve_at"]
    resampled = Resampled(side, task["resample"]) if side and side != own_size else None
    if resampled:
        x = enlarge(x, side, method=resampled.method)
    each = [build_operator(task, tuple(x.shape[-2:]), i, seed) for i in ids]
    generators = [torch.Generator().manual_seed(derive_seed(seed, i, "measurement")) for i in ids]
    # Image by image and on the CPU: the measurement has the same bytes in every batch and on every device.
    y = torch.cat([a(x[i : i + 1], generators[i]) for i, a in enumerate(each)])
    if not task["per_image"]:
        groups = [(each[0], list(range(len(ids))))]
    elif isinstance(each[0], operators.Inpainting) and samples == 1:
        # One mask per image in one call; with several samples the Restorer repeats images, but not masks.
        masks = torch.cat([a.mask for a in each])
        groups = [(operators.Inpainting(masks, noise=each[0].noise), list(range(len(ids))))]
    else:
        groups = [(a, [i]) for i, a in enumerate(each)]
    parts = []
    for operator, rows in groups:
        chosen = [ids[i] for i in rows]
        parts.append(_restore(restorer, y[rows].to(device), operator, chosen, method, seed, samples))
    result = torch.cat([part.samples.cpu() for part in parts])
    ratios = [part.residual_ratio for part in parts]
    if resampled:
        result = resampled.back(result, (own_size, own_size))
    return Batch(
        samples=result,
        nfe=parts[0].nfe,
        residual_ratio=None if ratios[0] is None else torch.cat([r.cpu() for r in ratios]),
        measurement=y,
    )


def _restore(restorer, y, operator, ids, method, seed: int, samples: int) -> Batch:
    sigma = getattr(operator.noise, "sigma", None)
    if method["sampler"] in ("dps", "psld"):
        result = restorer(
            y, operator, sampler=method["sampler"], guidance=build_guidance(method["guidance"]), steps=method["steps"],
            samples=samples, seed=seed, image_ids=ids, batch_size=len(ids) * samples, **method["parameters"],
        )  # fmt: skip
        ratio = result.residual_ratio
        return Batch(result.samples, result.nfe, None if ratio is None else ratio[:, 0])
    options = dict(method["parameters"])
    if method["sampler"] == "baseline":
        _, x = baselines.baseline(y, operator, sigma or 0.0)
    elif method["sampler"] == "wiener":
        x = baselines.wiener(y, operator, sigma or 0.0, **options)
    else:
        x = {"pseudo_inverse": baselines.pseudo_inverse, "bicubic": baselines.bicubic}[method["sampler"]](y, operator)
    ratio = None
    if sigma:
        residual = torch.linalg.vector_norm((y - operator.A(x)).flatten(1), dim=1)
        ratio = residual / (float(sigma) * y[0].numel() ** 0.5)
    # A baseline is one estimate, whatever the number of samples asked of samplers.
    return Batch(x[:, None], 0, ratio)


def generate_batch(
    restorer: Any, ids: Sequence[str], task: Mapping[str, Any], method: Mapping[str, Any], *, seed: int
) -> Batch:
    """Unconditional or class-conditional samples; each depends on (seed, its id) alone.

    task.labels: None, a list of class indices to cycle through, or "uniform": drawn per image from its id.
    """
    backbone, device = restorer.backbone, restorer.device
    noise = ImageNoise([(seed, i, 0) for i in ids], device)
    labels = task["labels"]
    condition = None
    if labels == "uniform":
        number = getattr(backbone.inner, "classes", None)
        if not number:
            raise RestoreError("labels=uniform needs a class-conditional backbone")
        condition = torch.tensor([derive_seed(seed, i, "label") % number for i in ids], device=device)
    elif isinstance(labels, list):
        condition = torch.tensor([labels[int(i) % len(labels)] for i in ids], device=device)
    elif labels is not None:
        raise RestoreError(f"labels={labels} must be a list of class indices, uniform, or absent")
    eta = method["parameters"].get("eta", 0.0) if method["sampler"] == "ddim" else None
    before = backbone.evaluations
    x = generate(
        backbone,
        x_T=noise(0, (len(ids), backbone.channels, backbone.resolution, backbone.resolution), "start"),
        timesteps=respace(len(backbone.alphas_cumprod), method["steps"]),
        noise=noise,
        guidance=build_guidance(method["guidance"]),
        condition=condition,
        ddim_eta=eta,
        clip=not restorer.latent,
    )
    if restorer.latent:
        with torch.no_grad():
            x = backbone.inner.decode(x)
    return Batch(x.float().clamp(-1, 1).cpu()[:, None], backbone.evaluations - before)


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
) -> Batch:  # fmt: skip
    """Text-to-image by an unmodified diffusers pipeline under `restore.guided` (PAG paper, eq. 14).

    guidance.cfg.scale is w of eq. 14, diffusers' guidance_scale - 1.
    """
    from restore import guided

    guidance = dict(method["guidance"])
    cfg = guidance.pop("cfg", None) or {}
    side = pipe.unet.config.sample_size
    shape = (len(ids), pipe.unet.config.in_channels, side, side)
    latents = ImageNoise([(seed, i, 0) for i in ids], pipe.device, pipe.unet.dtype)(0, shape, "start")
    passes = 1 + bool(guidance) + (cfg.get("scale", 0.0) > 0)
    with torch.no_grad(), guided(pipe, build_guidance(guidance)):
        images = pipe(
            prompt=list(prompts),
            negative_prompt=[task["negative_prompt"]] * len(ids),
            latents=latents,
            num_inference_steps=int(method["steps"]),
            guidance_scale=1.0 + cfg.get("scale", 0.0),
            output_type="pt",
        ).images
    return Batch(images.float().mul(2).sub(1).clamp(-1, 1).cpu()[:, None], passes * int(method["steps"]))
