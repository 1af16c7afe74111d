"""Loading of backbones by name or path, and the texts of `restore models`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from operators import RestoreError
from restore import disk
from restore.paths import EXTRA
from restore.zoo.options import check_parameters, resolve_options
from restore.zoo.registry import read_registry
from restore.zoo.store import Located, is_offline, locate, pull, query_size

if TYPE_CHECKING:
    import torch

CONFIGURATION = ("model_index.json", "config.json", "scheduler_config.json", EXTRA)
# Module and class of each kind of backbone, imported when one is loaded: networks of other kinds take seconds.
BACKBONES = {
    "adm": ("adm", "ADM"),
    "latent": ("latent", "LatentDiffusion"),
    "stable-diffusion": ("stable_diffusion", "StableDiffusion"),
    "sd3": ("transformers", "SD3"),
    "flux": ("transformers", "Flux"),
    "dit": ("transformers", "DiT"),
}


def load_backbone(
    name: str | Path,
    *,
    device: torch.device | str = "cpu",
    precision: str | None = "fp32",
    offline: bool | None = None,
    vae: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
):
    """Return (Located, backbone) for a registered model, a folder, a weight file or a hub id; downloads missing files.

    precision: "fp32", "bf16", "fp16", or "auto": bf16 where the device has it natively, else fp32. None: that of the
    registry.
    vae: an autoencoder in place of the model's: "tiny" for the distilled one of its latents (TAESD), or a registered
    name, a folder, a hub id.
    options: what the weights do not tell, see zoo.options; the Located that is returned has all of them.
    Raises RestoreError for unknown names and for missing or mismatched weights; nothing is ever initialised at random.
    """
    # Imported here: `restore models list` must not wait for torch networks.
    from restore.backbones.precision import choose_precision

    if locate(name).kind == "metric":
        raise RestoreError(f"{name} is a network of metrics, not a prior; try one of `restore models list`")
    if locate(name).kind == "pipeline":
        raise RestoreError(f"{name} is of a pipeline of diffusers, not a prior; try zoo.pull and restore.guided")
    found = _locate_or_pull(name, offline)
    if precision is None:
        precision = found.entry.precision if found.entry is not None else "fp32"
    dtype = choose_precision(precision, device)
    if found.kind == "autoencoder":
        raise RestoreError(f"{name} is an autoencoder, not a prior; give it to a latent model as vae={str(name)!r}")
    found = resolve_options(found, options or {})
    options = {**found.options, "device": device, "dtype": dtype}
    if vae is not None:
        options["vae"] = _load_autoencoder(find_autoencoder(found, vae), offline)
    if found.kind == "stable-diffusion":
        options["offline"] = is_offline(offline)
    backbone = _import_class(found.kind).load(found.path, **options)
    backbone.offline = is_offline(offline) or None  # so that models of its guidance are not downloaded either
    check_parameters(found, sum(weight.numel() for weight in backbone.network.parameters()))
    return found, backbone


def find_autoencoder(found: Located, vae: str | Path) -> str | Path:
    """Return the model that `vae` of `load_backbone` means for a model: for "tiny" the distilled one of its latents.

    Raises RestoreError if it has none.
    """
    if found.kind == "adm":
        raise RestoreError(f"vae must be None for {found.name}, a model of pixels, got {str(vae)!r}")
    if vae != "tiny":
        return vae
    if found.kind not in BACKBONES or found.kind == "latent":
        raise RestoreError(f"{found.name} has no tiny autoencoder of its own; give vae= a name or a folder")
    return _import_class(found.kind).tiny_vae


def _import_class(kind: str) -> Any:
    module, name = BACKBONES[kind]
    return getattr(importlib.import_module(f"restore.backbones.{module}"), name)


def hash_weights(
    name: str | Path, offline: bool | None = None, configuration: bool = False, variant: str | None = None
) -> dict[str, str]:
    """Return {file: sha256} of the weights of a model as named in `load_backbone`; a missing one is downloaded.

    configuration: and of the files of its folder that say what the weights do not: architecture and noise levels.
    variant: of a pipeline's weight files, such as "fp16"."""
    path = (locate(name).path if variant is None else None) or pull(str(name), offline, variant=variant)
    root, files = path.parent, [path]
    if path.is_dir():
        named = CONFIGURATION if configuration else ()
        files = sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".bin") or p.name in named)
        root = path
    return {file.relative_to(root).as_posix(): disk.hash_file_once(file) for file in files}


def _locate_or_pull(name: str | Path, offline: bool | None) -> Located:
    found = locate(name)
    if found.path is None or found.entry is not None:
        pull(str(name), offline)
        found = locate(name)  # only now does a hub id tell what kind of model it is
    return found


def _load_autoencoder(name: str | Path, offline: bool | None):
    from restore.backbones.autoencoder import load_vae

    found = _locate_or_pull(name, offline)
    if found.kind != "autoencoder":
        raise RestoreError(f"vae must be an autoencoder such as taesd, got {str(name)!r} of kind {found.kind}")
    return load_vae(found.path)


def describe_model(name: str) -> str:
    """Return what the registry knows of a model, for `restore models show`."""
    found = locate(name)
    entry = found.entry
    if entry is None:
        return f"{name}: {found.kind}, {found.path or 'not on this machine'}"
    lines = [f"{entry.name}: {entry.title}", f"page      {entry.page}", f"licence   {entry.licence}"]
    lines.append(f"trained   at {entry.resolution} px" + (f", {entry.classes} classes" if entry.classes else ""))
    if entry.parameters:
        lines.append(f"size      {entry.parameters / 1e6:.1f} M parameters")
    if entry.download is not None:
        size = f"{entry.download.size / 2**20:.0f} MiB" if entry.download.size else "size unknown"
        lines.append(f"file      {entry.download.file}, {size}, sha256 {entry.download.sha256 or 'unknown'}")
        lines += [f"          {url}" for url in entry.download.urls]
    if entry.hub is not None:
        lines.append(f"hub       {entry.hub.repo} at {entry.hub.revision}")
    lines += _describe_guided_presets(name)
    lines.append(
        f"verified  {'with the real weights' if entry.verified else 'not here: the real weights were not available'}"
    )
    lines.append(f"here      {found.path or 'no; `restore models pull ' + entry.name + '`'}")
    for title, text in (("notes", entry.notes), ("cite", entry.citation)):
        if text:
            lines.append(f"{title:9} {' '.join(text.split())}")
    return "\n".join(lines)


def describe_download(name: str) -> str:
    """Return title, bytes to fetch and licence of a registered model or hub id, in one line."""
    found = locate(name)
    size = query_size(found)
    title, licence = (found.entry.title, found.entry.licence) if found.entry else (name, "see its page on the hub")
    return f"{title}; {f'{size / 1e6:.0f} MB' if size else 'size unknown'}; licence: {licence}"


def _describe_guided_presets(name: str) -> list[str]:
    from restore.guidance import describe_guidance  # imported here, like the networks above
    from restore.method import list_guided_presets

    sources: dict[str, str] = {}  # of the first preset with this guidance
    for preset in list_guided_presets(name):
        terms = yaml.safe_dump(describe_guidance(preset.guidance), default_flow_style=True, width=1000).strip()
        sources.setdefault(f"{preset.sampler}: {terms}", preset.source)
    return [f"guidance  {terms}\n          {source}" for terms, source in sources.items()]


def list_models() -> list[str]:
    """Return one line per registered model, for `restore models list`."""
    lines = [f"{'name':24} {'kind':17} {'px':>5}  here  licence"]
    for name, entry in read_registry().items():
        here = "yes" if locate(name).path is not None else "no"
        lines.append(f"{name:24} {entry.kind:17} {entry.resolution:5}  {here:4}  {entry.licence.split('. ')[0]}")
    return lines
