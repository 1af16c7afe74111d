"""Reading diffusers' pipelines from folders; Stable Diffusion also from the hub and from single checkpoint files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from operators import RestoreError
from restore import disk
from restore.backbones.autoencoder import load_vae
from restore.backbones.weights import (
    align_memory,
    allow_harmless,
    build_without_weights,
    first_line,
    hide_progress_bars,
    load_part,
    read_weights,
)

INDEX = "model_index.json"
CLIP, T5 = "CLIPTextModelWithProjection", "T5EncoderModel"
# Of each kind, its pipeline, the folder and the class of its network, and its text encoders.
KINDS = {
    "stable-diffusion": ("StableDiffusionPipeline", "unet", "UNet2DConditionModel", ("CLIPTextModel",)),
    "sdxl": ("StableDiffusionXLPipeline", "unet", "UNet2DConditionModel", ("CLIPTextModel", CLIP)),
    "sd3": ("StableDiffusion3Pipeline", "transformer", "SD3Transformer2DModel", (CLIP, CLIP, T5)),
    "flux": ("FluxPipeline", "transformer", "FluxTransformer2DModel", ("CLIPTextModel", T5)),
    "dit": ("DiTPipeline", "transformer", "DiTTransformer2DModel", ()),
}
OPTIONAL = {"sd3": ("text_encoder_3", "tokenizer_3")}  # the pipeline uses zeros for a missing one
PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
# Full-precision safetensors only: repositories also hold .bin pickles, fp16 copies and safety checkers.
HUB_FILES = ["*.json", "tokenizer/*", "text_encoder/model.safetensors", "*/diffusion_pytorch_model.safetensors"]
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth")


def read_pipeline_index(folder: Path, parts: str) -> dict:
    """Return the model_index.json of a pipeline's folder. parts: in words, what belongs there. Raises RestoreError."""
    if not (folder / INDEX).is_file():
        raise RestoreError(f"{folder} must be a folder of diffusers' save_pretrained with {parts}; it has no {INDEX}")
    return disk.read_json(folder / INDEX, required=True)


def read_folder(folder: Path, kind: str, dtype: torch.dtype, vae: nn.Module | None = None) -> tuple:
    """Read the network in `dtype`, the autoencoder as stored, both on the CPU, and the scheduler's configuration.

    vae: in place of the folder's, which may then be missing. Raises RestoreError, for Stable Diffusion also if text
    encoder or tokenizer is missing, without which its U-Net cannot run, or if weights are not safetensors.
    """
    import diffusers

    pipeline, part, network, _ = KINDS[kind]
    index = read_pipeline_index(folder, f"{part}, vae and scheduler")
    name, stored = str(index.get("_class_name")), (index.get(part) or [None, None])[1]
    # diffusers' DiT was a Transformer2DModel when the published folders were written. SDXL's U-Net has the class of
    # Stable Diffusion's.
    if "XL" in name or (stored != network and (name != pipeline or stored != "Transformer2DModel")):
        raise RestoreError(f"{folder} must hold a {pipeline}, got a {name}")
    needs_prompt = kind == "stable-diffusion"
    require_parts(folder, [part, "scheduler"] + ["vae"] * (vae is None) + ["text_encoder", "tokenizer"] * needs_prompt)
    with hide_progress_bars():
        model = load_part(getattr(diffusers, network), folder, part, dtype, pickles=not needs_prompt)
    vae = load_vae(folder / "vae", pickles=not needs_prompt) if vae is None else vae
    return model, vae, disk.read_json(folder / "scheduler" / "scheduler_config.json", required=True)


def read_architecture(folder: Path) -> nn.Module:
    """Return the network of a pipeline's folder, or of a folder with a single one, on the meta device: without weights.

    Only configuration files are read. Raises RestoreError if it is not a network of diffusers.
    """
    import diffusers

    index = disk.read_json(folder / INDEX, required=True) if (folder / INDEX).is_file() else {}
    part = next((part for part in ("unet", "transformer") if part in index), "")
    config = disk.read_json(folder / part / "config.json", required=True)
    name = str(config.get("_class_name"))
    if name == "Transformer2DModel":  # diffusers' DiT when the published folders were written
        name = "DiTTransformer2DModel"
    if not hasattr(diffusers, name):
        raise RestoreError(f"{folder / part} must hold a network of diffusers, got a {name}")
    with build_without_weights():
        return getattr(diffusers, name).from_config(config)


def require_parts(folder: Path, parts: Iterable[str]) -> None:
    """Raise RestoreError unless a pipeline's folder has these parts."""
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise RestoreError(f"{folder} is incomplete: it has no {', '.join(missing)}; copy it from the original model")


def has_text_encoders(folder: Path, kind: str) -> bool:
    """Return whether the text encoders of a pipeline are in its folder. Raises RestoreError if only some are."""
    parts = [part for pair in _text_parts(kind) for part in pair[1:]]
    present = [part for part in parts if (folder / part).is_dir()]
    if present:
        require_parts(folder, (part for part in parts if part not in OPTIONAL.get(kind, ())))
    return bool(present)


def read_text_encoders(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> dict[str, Any]:
    """Return a pipeline's text encoders and tokenizers by name, None for those not in its folder."""
    import transformers

    parts: dict[str, Any] = {}
    with hide_progress_bars():
        for name, encoder, tokenizer in _text_parts(kind):
            parts |= {encoder: None, tokenizer: None}
            if not (folder / encoder).is_dir() or not (folder / tokenizer).is_dir():
                continue
            parts[encoder] = load_part(getattr(transformers, name), folder, encoder, dtype, variant=variant)
            cls = transformers.T5TokenizerFast if name == T5 else transformers.CLIPTokenizer
            try:
                parts[tokenizer] = cls.from_pretrained(folder / tokenizer, local_files_only=True)
            except (OSError, ValueError, TypeError) as error:
                raise RestoreError(f"the {tokenizer} in {folder} cannot be read: {first_line(error)}") from error
    return parts


def make_prompt_encoder(read: Callable[[], Any], embed: Callable[[str, Any], torch.Tensor]) -> Callable:
    """Return encode(text, keep=True) -> embed(text, read()), which keeps what it reads if `keep`.

    It raises RestoreError if `text` is not a string.
    """
    kept: list = []

    @torch.no_grad()
    def encode(text: str, keep: bool = True) -> torch.Tensor:
        if not isinstance(text, str):
            raise RestoreError(f"prompt must be a string, got a {type(text).__name__}")
        encoders = kept[0] if kept else read()
        if keep:
            kept[:] = [encoders]
        return embed(text, encoders)

    return encode


def _text_parts(kind: str) -> list[tuple[str, str, str]]:
    suffixes = ("", "_2", "_3")
    return [(cls, f"text_encoder{n}", f"tokenizer{n}") for cls, n in zip(KINDS[kind][3], suffixes, strict=False)]


def read_stable_diffusion(
    source: str | Path, *, config=None, revision: str | None = None, offline: bool = False, text_only: bool = False
) -> dict:
    """Read the parts of a model in float32 on the CPU: unet, vae, text_encoder, tokenizer; scheduler as its config.

    source: a diffusers folder, a hub id ("owner/name") or a single .safetensors / .ckpt file.
    config: for a single file, the diffusers folder or hub id of the same architecture.
    offline: use only files on this machine. revision: commit or branch of a hub id. text_only: only text_encoder and
    tokenizer. Raises RestoreError.
    """
    path, name = Path(source).expanduser(), str(source)
    if not path.exists():
        if path.suffix in SINGLE_FILES or name.count("/") != 1 or name[0] in "./~":
            raise RestoreError(f"{source} does not exist; it must be a diffusers folder, a checkpoint file or a hub id")
        path = download_model(name, revision=revision, offline=offline)
    if not path.is_dir():
        with hide_progress_bars():
            return read_single_file(path, config=config, offline=offline, text_only=text_only)
    parts = () if text_only else read_folder(path, "stable-diffusion", torch.float32)
    return dict(zip(PARTS, parts, strict=False)) | read_text_encoders(path, "stable-diffusion")


def download_model(name: str, *, revision: str | None = None, offline: bool = False, files=HUB_FILES) -> Path:
    """Return the folder of a hub model in the local cache, downloaded first unless `offline`. Raises RestoreError."""
    from huggingface_hub import snapshot_download

    from restore.zoo.hub import list_transport_errors

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=offline, allow_patterns=files))
    except list_transport_errors() as error:
        # Not found, gated, no network, or offline and not cached: the client's own errors are several lines.
        hint = "it is not in the local cache; load it once with offline=False" if offline else first_line(error)
        raise RestoreError(f"the model {name} could not be read from the Hugging Face hub: {hint}") from error


def read_single_file(path: Path, *, config=None, offline: bool = False, text_only: bool = False) -> dict:
    """Read the parts from one file in the original layout, with diffusers' `from_single_file`.

    config: diffusers folder or hub id of the same architecture; None lets diffusers recognise it, which
    needs the small configuration files of that architecture, in the cache or from the network.
    """
    from diffusers import StableDiffusionPipeline

    if path.suffix not in SINGLE_FILES:
        raise RestoreError(f"{path} must be one of {', '.join(SINGLE_FILES)} or a diffusers folder")
    require_checkpoint(path)
    if config is not None:
        folder = Path(config).expanduser()
        config = str(folder if folder.is_dir() else download_model(str(config), offline=offline, files=HUB_FILES[:2]))
    skipped = {"unet": None, "vae": None} if text_only else {}
    absent = {"safety_checker": None, "feature_extractor": None}  # which published indices name
    try:
        with allow_harmless():
            pipe = StableDiffusionPipeline.from_single_file(
                str(path), config=config, local_files_only=offline or config is not None, **absent, **skipped
            )
    except Exception as error:  # a foreign file fails anywhere in diffusers' conversion, with errors of any kind
        raise RestoreError(
            f"{path} could not be read as a Stable Diffusion checkpoint ({first_line(error)}); if it is one, name the "
            "diffusers folder or hub id of its architecture with config="
        ) from error
    parts = {name: getattr(pipe, name, None) for name in PARTS if name not in skipped}
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise RestoreError(f"{path} must be a complete Stable Diffusion checkpoint, but has no {', '.join(missing)}")
    parts["scheduler"] = dict(pipe.scheduler.config)
    return {k: align_memory(part.float().eval()) if isinstance(part, nn.Module) else part for k, part in parts.items()}


def require_checkpoint(path: Path) -> None:
    """Raise RestoreError unless a file is a Stable Diffusion checkpoint in the original layout."""
    state = read_weights(path, "meta")
    state = state.get("state_dict", state) if isinstance(state, Mapping) else {}
    if not any(str(name).startswith("model.diffusion_model.") for name in state):
        raise RestoreError(
            f"{path} could not be read as a Stable Diffusion checkpoint: it has no 'model.diffusion_model.' weights"
        )


def embed_prompt(text: str, parts: dict) -> torch.Tensor:
    """Return the embedding (1, tokens, width) of a prompt in float32, as diffusers' pipelines do (last hidden state).

    parts: with tokenizer and text_encoder. Text beyond the encoder's number of tokens (77) is cut off.
    """
    tokenizer, text_encoder = parts["tokenizer"], parts["text_encoder"]
    length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    use_mask = getattr(text_encoder.config, "use_attention_mask", False)
    return text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask if use_mask else None)[0]
