"""What determines a result besides its measurement, ready for JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

import operators
from operators.device import is_on_host
from restore import zoo
from restore.backbones.graphs import find_graphs
from restore.guidance.autoguidance import list_autoguidance
from restore.method import Method
from restore.versions import hash_own_code

ROW = 521  # numbers, see fingerprint_backbone
BLOCK = 256 * 2**20  # bytes that are copied from an accelerator at once


def describe_run(restorer: Any, operator: Any, method: Method) -> dict[str, Any]:
    """Return method, operator, hashes of the weights and what is known of their network, precision, and what rounding
    depends on: torch's version, device, threads and arithmetic."""
    noise, backbone = operators.find_noise(operator), restorer.backbone
    dtype = getattr(backbone, "dtype", None) or backbone.network.dtype
    given = restorer.given | ({"per_channel": True} if restorer.per_channel else {})
    return {
        "backbone": restorer.name,
        "weights": restorer.weights_hash(),
        **({"weak_models": weak} if (weak := hash_weak_models(method, getattr(backbone, "offline", None))) else {}),
        "network": describe_network(backbone) | restorer.options,
        **({"model_options": given} if given else {}),
        **({"autoencoder": type(backbone.vae).__name__} if restorer.kind == "latents" else {}),
        **({"vae_tiling": True} if getattr(getattr(backbone, "vae", None), "use_tiling", False) else {}),
        "precision": str(dtype).removeprefix("torch."),
        **({"compiled": graphs.mode} if (graphs := find_graphs(backbone.network)) else {}),
        "operator": "None" if operator is None else operators.describe(operator),  # of samples
        "noise": repr(noise) if noise is not None else None,
        "range": "[-1, 1]",
        "method": method.describe(),
        **({"code": code} if (code := hash_own_code(operator, method)) else {}),
        "windows": {key: value for key, value in restorer.windows.items() if key != "recompute_windows"},
        "torch": torch.__version__,
        "device": restorer.device.type,
        "threads": torch.get_num_threads(),
        "arithmetic": describe_arithmetic(restorer.device),
    }


def describe_network(backbone: Any) -> dict[str, Any]:
    """Return what weights do not tell of a network: noise levels, heads by the channels of a layer, prediction."""
    schedule = backbone.schedule
    levels = f"{schedule.kind}, {len(schedule)} of sigma/alpha {schedule.ratios[0]:.6g} to {schedule.ratios[-1]:.6g}"
    heads = {str(layer.channels): layer.heads for layer in backbone.attention.values()}
    kind = getattr(backbone, "prediction_type", None)
    return {"noise_levels": levels, "attention_heads": heads} | ({} if kind is None else {"prediction_type": kind})


def describe_arithmetic(device: torch.device) -> dict[str, Any]:
    """Return torch's settings, chosen by the caller for speed, that change the rounding of a result."""
    settings = {"float32_matmul_precision": torch.get_float32_matmul_precision}
    settings |= {"deterministic": torch.are_deterministic_algorithms_enabled}
    if device.type == "cuda":
        settings |= {"cudnn_tf32": lambda: torch.backends.cudnn.allow_tf32}
        settings |= {"cudnn_benchmark": lambda: torch.backends.cudnn.benchmark}
    return {name: _read(setting) for name, setting in settings.items()}


def _read(setting: Any) -> Any:
    try:
        return setting()
    except RuntimeError:  # torch refuses to sum up settings that differ by operation
        return "mixed"


def hash_backbone(backbone: Any) -> str:
    """Return twelve hexadecimal digits of the weights of a backbone's network and autoencoder in memory."""
    digest = hashlib.blake2b(digest_size=6)
    for name, content in _read_tensors(backbone):
        digest.update(name.encode())
        digest.update(content.numpy())
    return digest.hexdigest()


def _read_tensors(backbone: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the backbone's tensors as (name, bytes on the host); those of an accelerator arrive many at a time, because
    the host waits for every copy."""
    group, size = [], 0
    for name, tensor in _list_tensors(backbone):
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if group and (size + len(content) > BLOCK or content.device != group[0][1].device):
            yield from _copy_group(group)
            group, size = [], 0
        if is_on_host(content):
            yield name, content
            continue
        group.append((name, content))
        size += len(content)
    yield from _copy_group(group)


def _copy_group(group: list[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    if not group:
        return iter(())
    names, contents = zip(*group, strict=True)
    return zip(names, torch.cat(contents).cpu().split([len(content) for content in contents]), strict=True)


def hash_weak_models(method: Method, offline: bool | None = None) -> dict[str, Any]:
    """Return the hashes of the weights of autoguidance's models, by name or, of a backbone, by class."""
    models = [term.model for term in list_autoguidance(method.guidance)]
    return {model if isinstance(model, str) else type(model).__name__: _hash_model(model, offline) for model in models}


def _hash_model(model: Any, offline: bool | None) -> Any:
    return zoo.hash_weights(model, offline) if isinstance(model, str) else hash_backbone(model)


def fingerprint_backbone(backbone: Any) -> bytes:
    """Return a number that changes with what `hash_backbone` reads, in a fraction of its time on the tensors' device.

    Versions that torch counts would not do: writing `parameter.data` counts none. Large tensors are summed up as
    integers along rows of 521 numbers (a prime, so that rows and columns that change places change the sums).
    """
    parts, names = [], []
    for name, tensor in _list_tensors(backbone):
        names.append(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device}")
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        whole = len(content) // (8 * ROW) * (8 * ROW)
        if whole and content.storage_offset() % 8 == 0:
            parts.append(content[:whole].view(torch.int64).view(-1, ROW).sum(0).view(torch.uint8))
            content = content[whole:]
        parts.append(content)
    digest = hashlib.blake2b("\n".join(names).encode())
    for device in dict.fromkeys(part.device for part in parts):
        digest.update(torch.cat([part for part in parts if part.device == device]).cpu().numpy())
    return digest.digest()


def _list_tensors(backbone: Any) -> list[tuple[str, torch.Tensor]]:
    networks = [network for network in (backbone.network, getattr(backbone, "vae", None)) if network is not None]
    items = [item for network in networks for item in sorted(network.state_dict().items())]
    return [part for name, tensor in items for part in _list_parts(name, tensor)]


def _list_parts(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """A tensor, or those that one of another class consists of: the integers and scales of quantised weights."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [(name, tensor)]
    parts = tensor.__tensor_flatten__()[0]
    return [item for part in parts for item in _list_parts(f"{name}.{part}", getattr(tensor, part))]
