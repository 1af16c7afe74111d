"""One batch of a benchmark as tensors: restored, generated, or made by a diffusers pipeline."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import operators
from operators import RestoreError
from restore.backbones.memory_options import free_memory
from restore.backbones.precision import choose_precision
from restore.backbones.text_to_image import PipelineOptions, TextToImage
from restore.backbones.transfer import send
from restore.batch import measure_batch
from restore.bench.baselines import BASELINES
from restore.guidance import CFG, Autoguidance
from restore.guidance.pipelines import find_network, guided, schedule_cfg
from restore.images.resampling import Resampling, enlarge_image
from restore.method import Method
from restore.restoration import OutOfMemory
from restore.samplers.noise import ImageNoise, derive_seed


@dataclass
class Estimates:
    """The images of a batch.

    samples: (B, K, 3, H, W) in [-1, 1]. nfe: per sample. Of restorations, residual_ratio: (B,); measurement: (B, ...);
    margin: rows and columns at each side of the true images that measurement and samples do not show. protocol: see
    Restorer.protocol. Of pipelines, loop_seconds: the denoising loop alone; loading_seconds: weights, and prompts where
    they are embedded first.
    """

    samples: torch.Tensor
    nfe: int
    residual_ratio: torch.Tensor | None = None
    measurement: torch.Tensor | None = None
    margin: tuple[int, int] = (0, 0)
    protocol: dict[str, Any] = field(default_factory=dict)
    loop_seconds: float | None = None
    loading_seconds: float = 0.0


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
    """Degrade x (B, C, H, W) and restore it by the method, completed by the presets of the restorer.

    restorer: a Restorer, None for baselines. Each image's mask, kernel and noise depend only on (seed, its id).
    """
    size = x.shape[-1]
    operator, y, seen, resampling = degrade_batch(x, ids, task, seed)
    if restorer is None:
        estimates = _compute_baseline(y.to(device), operator, method)
    else:
        label = task["labels"]
        if isinstance(label, list) or label == "uniform":
            raise RestoreError(f"labels={label}: a restoration takes one class, by name or index, for all its images")
        method = complete_method(restorer, operator, method, seen, samples)
        options = {"samples": samples, "seed": seed, "image_ids": ids, "label": label}
        result = _restore_in_parts(restorer, send(y, device), operator, method, len(ids) * samples, **options)
        ratio = None if result.residual_ratio is None else result.residual_ratio[:, 0].cpu()
        estimates = Estimates(result.samples.cpu(), result.nfe, ratio, protocol=result.protocol)
    if resampling:
        estimates.samples = resampling.reduce(estimates.samples, (size, size))
    estimates.samples = estimates.samples.expand(-1, -1, 3, -1, -1)
    estimates.measurement, estimates.margin = y, getattr(operator, "margin", (0, 0))
    return estimates


def _restore_in_parts(restorer: Any, y: torch.Tensor, operator: Any, method: Method, together: int, **options: Any):
    """Return the Restoration, made of so many samples at once, or of as many as memory allows: half, a quarter, ..."""
    while True:
        try:
            return restorer(y, operator, method, batch_size=together, **options)
        except OutOfMemory:
            if together == 1:
                raise
        together = (together + 1) // 2
        free_memory(restorer.device)


def degrade_batch(
    x: torch.Tensor, ids: Sequence[str], task: Mapping[str, Any], seed: int
) -> tuple[Any, torch.Tensor, tuple[int, int], Resampling | None]:
    """Return the operator of images x (B, C, H, W), their measurement, the size (H, W) of what it shows of them, and
    how they are enlarged before and reduced after it."""
    side = task["solve_at"]
    resampling = Resampling(side, task["resample"]) if side and side != x.shape[-1] else None
    if resampling:
        x = enlarge_image(x, side, method=resampling.method)
    operator, y = measure_batch(task["operator"], x, ids, seed=seed, per_image=task["per_image"])
    return operator, y, tuple(operators.cut_margin(operator, x).shape[-2:]), resampling


def complete_method(restorer: Any, operator: Any, method: Method, size: tuple[int, int], samples: int) -> Method:
    """Return a configured method with what the restorer's presets add."""
    choices = {"steps": method.steps, "guidance": method.guidance, "parameters": method.parameters}
    return restorer.method(operator, sampler=method.sampler, samples=samples, size=size, **choices)


def _compute_baseline(y: torch.Tensor, operator: Any, method: Method) -> Estimates:
    x = BASELINES[method.sampler](y, operator, **method.parameters)
    sigma, ratio = getattr(operator.noise, "sigma", None), None
    if sigma:
        residual = torch.linalg.vector_norm((y - operator.A(x)).flatten(1), dim=1)
        ratio = (residual / (float(sigma) * y[0].numel() ** 0.5)).cpu()
    # A baseline is one estimate, however many samples are requested of samplers.
    return Estimates(operators.cut_margin(operator, x)[:, None].cpu(), 0, ratio)


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
    terms = method.guidance.terms if method.guidance is not None else ()
    weaker = [term.load(restorer.backbone) for term in terms if isinstance(term, Autoguidance)]
    calls: list[None] = []
    with ExitStack() as stack:
        for network in {backbone.network for backbone in (restorer.backbone, *weaker)}:
            stack.enter_context(network.register_forward_pre_hook(lambda *_: calls.append(None)))
        x = restorer.generate(len(ids), batch_size=len(ids), first=int(ids[0]), **options)
    return Estimates(
        x.cpu()[:, None].expand(-1, -1, 3, -1, -1), len(calls), protocol=restorer.protocol(None, method, seed=seed)
    )


def load_pipeline(
    name: str,
    *,
    device: torch.device,
    precision: str,
    offline: bool,
    options: PipelineOptions | None = None,
    **prompts: Sequence[str],
) -> TextToImage:
    """Return the text-to-image pipeline of a registered model, a hub id or a folder.

    prompts: upcoming and negatives, see TextToImage. Raises RestoreError if it cannot be loaded.
    """
    from restore import zoo

    variant = options.variant if options is not None else None
    folder = zoo.pull(name, offline=offline or None, variant=variant)
    return TextToImage(folder, device=device, dtype=choose_precision(precision, device), options=options, **prompts)


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
    terms = method.guidance.terms if method.guidance is not None else ()
    cfgs = [term for term in terms if isinstance(term, CFG) and term.scale]
    scheduled = [term for term in cfgs if term != CFG(term.scale)]
    if scheduled and (len(cfgs) > 1 or scheduled[0].null is not None):
        raise RestoreError(
            "cfg must be one term without null in text_to_image; its prompt is the task's negative_prompt"
        )
    cfg, others = sum(term.scale for term in cfgs), tuple(term for term in terms if not isinstance(term, CFG))
    steps = int(method.steps)
    passes = steps * (1 + (cfg > 0)) + sum(math.ceil(steps / term.every) for term in others if term.has_weak_pass)
    started = time.perf_counter()
    pipe = model.prepare(prompts, task["negative_prompt"] if cfg else None)
    loading = time.perf_counter() - started
    noise = ImageNoise([(seed, i, 0) for i in ids], model.device, model.dtype)
    generators = [torch.Generator().manual_seed(derive_seed(seed, i, "pipeline")) for i in ids]
    with ExitStack() as stack:
        stack.enter_context(guided(pipe, replace(method.guidance, terms=others) if others else None))
        if scheduled:
            stack.enter_context(schedule_cfg(pipe, scheduled[0]))
        read_clock = stack.enter_context(time_calls(find_network(pipe), model.device))
        options = {"steps": method.steps, "cfg": cfg, "negative": task["negative_prompt"], "generators": generators}
        images = model(prompts, lambda shape: noise(0, shape, "start"), **options)
    return Estimates(images[:, None], passes, loop_seconds=read_clock(), loading_seconds=loading)


@contextmanager
def time_calls(network: torch.nn.Module, device: torch.device) -> Iterator[Callable[[], float]]:
    """Yield a function: the seconds from the start of the network's first call within the block to the end of its last,
    the loop of a pipeline without its text encoder and autoencoder (PAG, Ahn et al. 2024, Table 6)."""
    marks: list[Any] = []

    def mark(*_: Any) -> None:
        if device.type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record(torch.cuda.current_stream(device))
        else:
            marks.append(time.perf_counter())
        del marks[1:-1]

    def read() -> float:
        if device.type != "cuda":
            return marks[-1] - marks[0]
        torch.cuda.synchronize(device)
        return marks[0].elapsed_time(marks[-1]) / 1000

    before, after = network.register_forward_pre_hook(mark), network.register_forward_hook(mark)
    try:
        yield read
    finally:
        before.remove()
        after.remove()
