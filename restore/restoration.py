"""The result of a restoration, and helpers of a run: devices, memory errors, conditions, callbacks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from PIL import Image

import operators
from operators import RestoreError
from operators.naming import AUTO, check_known
from restore import samplers
from restore.backbones.sizes import Sized
from restore.backbones.transfer import send
from restore.guidance import Guidance, Record, record_guidance
from restore.images import io
from restore.method import Method


@dataclass
class Restoration:
    """The result of one call of a Restorer for B measurements and K samples each.

    samples: (B, K, C, H, W) in [-1, 1], clamped, without what y does not show (an operator's margin); C = 3, or 1 of
        a prior of grey images. Sample k does not depend on K.
    residual: ||y - A(x)||_2 of every sample, (B, K); residual_ratio: the same divided by
        sigma_y sqrt(m), near 1 for a sample that explains y up to its noise; None when sigma_y is unknown.
    nfe: network evaluations per sample, weak passes included. seconds: wall time of the call.
    protocol: what determines the result besides y, image_ids and condition, ready for JSON (see Restorer.protocol).
    """

    samples: torch.Tensor
    residual: torch.Tensor
    residual_ratio: torch.Tensor | None
    nfe: int
    seconds: float
    protocol: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[Image.Image]:
        """The first sample of every measurement as PIL images, RGB or grey."""
        pictures = [io.to_pil(x.expand(3, -1, -1)) for x in self.samples[:, 0]]
        return [picture.convert("L") for picture in pictures] if self.samples.shape[2] == 1 else pictures

    @property
    def mean(self) -> torch.Tensor:
        """Mean over the samples, (B, C, H, W): the estimate of least squared error."""
        return self.samples.mean(dim=1)

    @property
    def spread(self) -> torch.Tensor:
        """Standard deviation over the samples per pixel, (B, C, H, W); zero for a single sample."""
        return self.samples.std(dim=1, correction=0)


def choose_device(device: str) -> torch.device:
    """Return torch's device of a name; "auto" is CUDA, else MPS, else the CPU.

    Raises RestoreError if this machine does not have it.
    """
    if device == AUTO:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # "meta" holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise RestoreError(f"device '{device}' is not available: {str(error).splitlines()[0]}") from None
    return chosen


class OutOfMemory(RestoreError):
    """The memory of the device did not suffice."""


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn an allocation failure within the block into OutOfMemory, which names what lowers the memory."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_cpu_failure = "can't allocate memory" in str(error)
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not is_cpu_failure:
            raise
        raise OutOfMemory(
            "out of memory; try checkpointing=True, a smaller batch_size or max_windows, or precision='bf16'"
        ) from error


def check_channels(given: int, known: int, per_channel: bool = False) -> None:
    """Raise RestoreError unless a prior of images of `known` channels can restore images of `given` channels."""
    if known == 1 and not (given == 1 or (given == 3 and per_channel)):
        advice = "; convert them, or load the model with per_channel=True, which restores each channel by itself"
        got = f"got {given} channels{advice * (given == 3)}"
        raise RestoreError(f"images must be grey, of 1 channel, for a prior of grey images, {got}")
    if known == 3 and given != 3:
        raise RestoreError(f"images must have 3 channels, or 1 for grey ones, got {given}")


def prepare_measurement(
    y: Any, operator: Any, device: torch.device, known: int = 3, per_channel: bool = False
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return y (B, ...) on the device and the shape of its images, for a prior of images of `known` channels.

    For a prior of colour images a grey y becomes three equal channels if its images would be grey.
    Raises RestoreError for NaN, in a picture for numbers far outside of [-1, 1], and as `check_channels` does.
    """
    if isinstance(y, torch.Tensor) and y.is_floating_point() and y.dim() not in (3, 4):
        if not torch.isfinite(y).all():
            raise RestoreError("y must be finite, got NaN or infinite values")
        y = y.float()
    else:
        is_linear = isinstance(operator, operators.Operator) and operator.linear
        y = io.to_tensor(y, channels=None, largest=8.0 if is_linear else float("inf"))
    y = send(y, device)
    shape = operators.image_shape(operator, y)
    if shape[1] == 1 and known == 3:
        y = y.expand(-1, 3, -1, -1)
        shape = operators.image_shape(operator, y)
    check_channels(shape[1], known, per_channel)
    return y, shape


def allows_region(method: Method) -> bool:
    """Whether a method may leave out windows where nothing matters: no part of it compares whole images."""
    return method.sampler in samplers.REGIONAL and method.guidance is None


def check_region(region: torch.Tensor | None, method: Method, shape: Sequence[int]) -> torch.Tensor | None:
    """Return region for images of this shape. Raises RestoreError if the method needs all of x, or for another size."""
    if region is None:
        return None
    if not allows_region(method):
        name = samplers.sampler_name(method.sampler)
        raise RestoreError(
            f"region must be left out with guidance and with {name}, whose steps need the whole image; it goes with "
            f"{', '.join(samplers.REGIONAL)}"
        )
    size = tuple(shape[-2:])
    if region.ndim != 4 or tuple(region.shape[-2:]) != size:
        raise RestoreError(f"region must be (1 or B, 1, H, W) of images of {size}, got {tuple(region.shape)}")
    return region


def split_channels(y: torch.Tensor, operator: Any, shape: tuple[int, ...]) -> tuple[torch.Tensor, Any]:
    """Return y of images of this shape (B, C, H, W) as the measurement of B·C grey images, and their operator.

    Raises RestoreError for an operator that mixes the channels.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(y)
    single = operators.select_rows(operator, [b for b in range(shape[0]) for _ in range(shape[1])])
    try:
        with torch.no_grad():
            apart = single.A(x.flatten(0, 1)[:, None])
            is_split = torch.allclose(apart, operator.A(x).flatten(0, 1)[:, None], rtol=1e-3, atol=1e-4)
    except (RestoreError, RuntimeError):
        is_split = False
    if not is_split:
        raise RestoreError(
            f"operator must leave the channels apart to restore each by itself, got {type(operator).__name__}; try a "
            "prior of colour images"
        )
    return y.flatten(0, 1)[:, None], single


def join_channels(result: Restoration, channels: int) -> Restoration:
    """Return the result of B·C grey images as that of B images of C channels, with the residual of all of them."""

    def gather(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(0, (-1, channels))

    ratio = result.residual_ratio
    return replace(
        result,
        samples=gather(result.samples).transpose(1, 2).squeeze(3),
        residual=gather(result.residual).square().sum(1).sqrt(),
        residual_ratio=None if ratio is None else gather(ratio).square().mean(1).sqrt(),
        nfe=channels * result.nfe,
    )


def measure_residual(x: torch.Tensor, y: torch.Tensor, operator: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ||y - A(x)||_2 of every image (B,), and the same divided by sigma_y sqrt(m), None without sigma_y.

    The m numbers of y include a mask's holes if there is noise in them, as a measurement made here has it.
    """
    with torch.no_grad():
        difference = (y - operator.A(x.to(y.dtype))).flatten(1)
    residual = torch.linalg.vector_norm(difference, dim=1)
    sigma = getattr(operators.find_noise(operator), "sigma", None)
    if not sigma:
        return residual, None
    last = operator.operators[-1] if isinstance(operator, operators.Compose) else operator
    mask = getattr(last, "mask", None)
    if mask is None:
        return residual, residual / (float(sigma) * difference.shape[1] ** 0.5)
    known = (mask > 0).to(y.device).expand_as(y).flatten(1)
    is_empty = ~((y.flatten(1) != 0) & ~known).any(dim=1)
    m = torch.where(is_empty, known.sum(dim=1), difference.shape[1]).clamp(min=1)
    return residual, residual / (float(sigma) * m.to(residual) ** 0.5)


def encode_condition(
    prior: Sized,
    condition: Any = None,
    labels: Sequence[int | str] | None = None,
    prompt: str | None = None,
    negative_prompt: str | None = None,
) -> Any:
    """Return the condition given as itself, as classes by number or name, or as a prompt; None for none.

    negative_prompt: becomes the prior's null condition, for CFG. Raises RestoreError if several conditions are given,
    and if the prior has no such classes or no text encoder.
    """
    if sum(given is not None for given in (condition, labels, prompt)) > 1:
        raise RestoreError("give only one of label, prompt and condition")
    if negative_prompt is not None:
        prior.null_condition = _encode_prompt(prior, negative_prompt)
    if prompt is not None:
        return _encode_prompt(prior, prompt)
    if labels is None:
        return _place_condition(prior, condition)
    classes, names = (getattr(prior.inner, name, None) for name in ("classes", "labels"))
    if classes is None:
        raise RestoreError("label must be left out: the backbone has no classes")
    device = next(prior.network.parameters()).device
    return torch.tensor([_find_class(label, classes, names or ()) for label in labels], device=device)


def _place_condition(prior: Sized, condition: Any) -> Any:
    """A given condition on the prior's device, so that no step has to move it; classes are checked while they are on
    the host."""
    if not isinstance(condition, torch.Tensor):
        return condition
    classes = getattr(prior.inner, "classes", None)
    if classes is not None and not condition.is_floating_point() and condition.ndim < 2:
        from restore.backbones.adm import check_labels

        check_labels(condition, condition.numel(), classes)
    return condition.to(next(prior.network.parameters()).device)


def _encode_prompt(prior: Sized, prompt: str) -> torch.Tensor:
    encode = getattr(prior.inner, "encode_prompt", None)
    if encode is None:
        raise RestoreError("prompt must be left out: the backbone has no text encoder")
    return encode(prompt).to(next(prior.network.parameters()).device)


def _find_class(label: int | str, classes: int, names: Sequence[str]) -> int:
    """The index of a class given by number or name. Raises RestoreError if there is none."""
    if isinstance(label, str) and not label.isdecimal():
        check_known([label], names, "the backbone has no class called")
        return list(names).index(label)
    if not 0 <= int(label) < classes:
        raise RestoreError(f"there is no class {label}: the backbone has {classes}")
    return int(label)


def select_condition(condition: Any, rows: list[int]) -> Any:
    """Return the conditions of these images; a single one serves them all."""
    if not isinstance(condition, torch.Tensor) or condition.dim() == 0 or len(condition) == 1:
        return condition
    return condition[rows]


def observe_run(
    callback: Callable | None, guidance: Guidance | None, used: dict, batch: tuple[int, int, int], prior: Sized
) -> tuple[Guidance | None, Callable[[dict], None]]:
    """Return (guidance, callback) for a sampler that collect `used` and extend what the caller's callback receives:

    first, count, total: `batch`, this batch's samples among all. decode: from x0 as x_t to images.
    With guidance, signals: for each term the step's last |eps − eps_weak|, averaged over the channels, (B, 1, h, w) as
    x_t, None if it did not run. If the callback has a true attribute `predictions`, also predictions: the last clean
    estimates "strong", "guided" (None if all terms were off) and "weak", one for each term; (B, C, h, w) as x_t, not
    clamped.
    """
    wanted = bool(getattr(callback, "predictions", False))
    record, shared = (
        Record(wanted),
        dict(zip(("first", "count", "total"), batch, strict=True)) | {"decode": prior.decode},
    )

    def receive(step: dict) -> None:
        used.update(step.get("used", {}))
        if callback is not None:
            own = {}
            if guidance is not None:
                terms, x0 = range(len(guidance.terms)), record.x0
                own["signals"] = [record.signals.get(k) for k in terms]
                if wanted:
                    own["predictions"] = {name: x0.get(name) for name in ("guided", "strong")}
                    own["predictions"]["weak"] = [x0.get(k) for k in terms]
                record.clear()
            callback({**step, **own, **shared})

    return guidance if guidance is None or callback is None else record_guidance(guidance, record), receive


def check_batches(name: str, count: int, batch_size: int | str, auto: bool = False) -> None:
    """Raise RestoreError unless `name` is 1 or more, and batch_size too, or AUTO where that is known."""
    is_size = isinstance(batch_size, Integral) and batch_size >= 1
    if count < 1 or not (is_size or auto and batch_size == AUTO):
        raise RestoreError(f"{name} and batch_size must be at least 1, got {count} and {batch_size}")


def find_batch_size(batch_size: int | str, restorer: Any, operator: Any, y: torch.Tensor, *rest: Any) -> int:
    """Return batch_size, or for AUTO what memory allows; rest: see restore.memory.choose_batch_size."""
    if batch_size != AUTO:
        return batch_size
    from restore.memory import choose_batch_size  # imported when it is needed

    return choose_batch_size(restorer, operators.select_rows(operator, [0]), y[:1], *rest)


def check_clash(sampler: str | Callable | None, call: Mapping[str, inspect.Parameter]) -> None:
    """Raise RestoreError if a parameter of a user's sampler is also a keyword of a Restorer's call, which would take
    it."""
    for name in samplers.sampler_parameters(sampler) if sampler is not None else ():
        if name in call and call[name].kind is inspect.Parameter.KEYWORD_ONLY:
            raise RestoreError(
                f"{name}= is a parameter of sampler {samplers.sampler_name(sampler)} and a keyword of this call; "
                f"try restorer.method(operator, sampler=..., parameters={{'{name}': ...}}) and pass the method"
            )
