"""The result of a restoration, and helpers of a run: devices, memory errors, conditions, callbacks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

import operators
from operators import RestoreError
from operators.naming import check_known
from restore.backbones.sizes import Sized
from restore.guidance import Guidance, Record, record_guidance
from restore.images import io


@dataclass
class Restoration:
    """The result of one call of a Restorer for B measurements and K samples each.

    samples: (B, K, 3, H, W) in [-1, 1], clamped; sample k does not depend on K.
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


def choose_device(device: str) -> torch.device:
    """Return torch's device of a name; "auto" is CUDA, else MPS, else the CPU.

    Raises RestoreError if this machine does not have it.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # "meta" holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise RestoreError(f"device '{device}' is not available: {str(error).splitlines()[0]}") from None
    return chosen


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn an allocation failure within the block into a RestoreError that names what lowers the memory."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_cpu_failure = "can't allocate memory" in str(error)
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not is_cpu_failure:
            raise
        raise RestoreError(
            "out of memory; try checkpointing=True, a smaller batch_size or max_windows, or precision='bf16'"
        ) from error


def prepare_measurement(y: Any, operator: Any, device: torch.device) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return y (B, ...) on the device and the shape of its images; a grey y becomes three equal channels if those
    would be grey.

    Raises RestoreError for NaN, and in a picture for numbers far outside of [-1, 1].
    """
    if isinstance(y, torch.Tensor) and y.is_floating_point() and y.dim() not in (3, 4):
        if not torch.isfinite(y).all():
            raise RestoreError("y must be finite, got NaN or infinite values")
        y = y.float()
    else:
        is_linear = isinstance(operator, operators.Operator) and operator.linear
        y = io.to_tensor(y, channels=None, largest=8.0 if is_linear else float("inf"))
    y = y.to(device)
    shape = operators.image_shape(operator, y)
    if shape[1] != 1:
        return y, shape
    y = y.expand(-1, 3, -1, -1)
    return y, operators.image_shape(operator, y)


def hash_backbone(backbone: Any) -> str:
    """Return twelve hexadecimal digits of the weights of a backbone's network and autoencoder in memory."""
    digest = hashlib.blake2b(digest_size=6)
    for network in (backbone.network, getattr(backbone, "vae", None)):
        for name, tensor in sorted(network.state_dict().items()) if network is not None else ():
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().reshape(-1).cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


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
        return condition
    classes, names = (getattr(prior.inner, name, None) for name in ("classes", "labels"))
    if classes is None:
        raise RestoreError("label must be left out: the backbone has no classes")
    device = next(prior.network.parameters()).device
    return torch.tensor([_find_class(label, classes, names or ()) for label in labels], device=device)


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
    x_t, None if it was off. predictions: its last clean estimates "strong", "guided" (None if all terms were off) and
    "weak", one for each term; (B, C, h, w) as x_t, not clamped.
    """
    record, shared = Record(), dict(zip(("first", "count", "total"), batch, strict=True)) | {"decode": prior.decode}

    def receive(step: dict) -> None:
        used.update(step.get("used", {}))
        if callback is not None:
            own = {}
            if guidance is not None:
                terms, x0 = range(len(guidance.terms)), dict(record.x0)
                own["signals"] = [record.signals.get(k) for k in terms]
                own["predictions"] = {name: x0.get(name) for name in ("guided", "strong")}
                own["predictions"]["weak"] = [x0.get(k) for k in terms]
                record.clear()
            callback({**step, **own, **shared})

    return guidance if guidance is None or callback is None else record_guidance(guidance, record), receive
