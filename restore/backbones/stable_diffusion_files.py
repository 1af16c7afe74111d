"""Reading Stable Diffusion models: a diffusers folder, a hub id, or a single checkpoint file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from operators import RestoreError
from restore import disk
from restore.backbones.weights import (
    align_memory,
    first_line,
    hide_progress_bars,
    load_part,
    read_pipeline_index,
    read_weights,
)

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# Full-precision safetensors only: repositories also hold .bin pickles, fp16 copies and safety checkers.
HUB_FILES = [
    "model_index.json",
    "scheduler/*.json",
    "tokenizer/*",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth")


def read_model(
    source: str | Path, *, config=None, revision: str | None = None, offline: bool = False, text_only: bool = False
) -> dict:
    """Read the parts of a model in float32 on the CPU: unet, vae, text_encoder, tokenizer; scheduler as its config.

    Arguments as in `StableDiffusion.read`; text_only: only text_encoder and tokenizer. Raises RestoreError.
    """
    path = Path(source).expanduser()
    name = str(source)
    if not path.exists():
        if path.suffix in SINGLE_FILES or name.count("/") != 1 or name[0] in "./~":
            raise RestoreError(f"{source} does not exist; it must be a diffusers folder, a checkpoint file or a hub id")
        path = download_model(name, revision=revision, offline=offline)
    with hide_progress_bars():
        if path.is_dir():
            return read_folder(path, text_only)
        return read_single_file(path, config=config, offline=offline, text_only=text_only)


def download_model(
    name: str, *, revision: str | None = None, offline: bool = False, files: list[str] | None = None
) -> Path:
    """Return the folder of a hub model in the local cache, downloaded first unless `offline`. Raises RestoreError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=revision, local_files_only=offline, allow_patterns=files or HUB_FILES)
        )
    except (OSError, ValueError) as error:
        # Not found, gated, no network, or offline and not cached: the client's own errors are several lines.
        hint = "it is not in the local cache; load it once with offline=False" if offline else first_line(error)
        raise RestoreError(f"the model {name} could not be read from the Hugging Face hub: {hint}") from error


def read_folder(folder: Path, text_only: bool = False) -> dict:
    """Read the parts from a folder written by diffusers' `save_pretrained`. Raises RestoreError."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    require_complete(folder)
    parts = {"text_encoder": load_part(CLIPTextModel, folder, "text_encoder")}
    try:
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise RestoreError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from error
    if not text_only:
        parts["unet"] = load_part(UNet2DConditionModel, folder, "unet")
        parts["vae"] = load_part(AutoencoderKL, folder, "vae")
        parts["scheduler"] = disk.read_json(folder / "scheduler" / "scheduler_config.json", required=True)
    return parts


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
        config = str(
            folder if folder.is_dir() else download_model(str(config), offline=offline, files=["*.json", "tokenizer/*"])
        )
    skipped = {"unet": None, "vae": None} if text_only else {}
    try:
        pipe = StableDiffusionPipeline.from_single_file(
            str(path), config=config, local_files_only=offline or config is not None, safety_checker=None, **skipped
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
    return {
        k: align_memory(part.float().eval()) if isinstance(part, torch.nn.Module) else part for k, part in parts.items()
    }


def require_checkpoint(path: Path) -> None:
    """Raise RestoreError unless a file is a Stable Diffusion checkpoint in the original layout."""
    state = read_weights(path, "meta")
    state = state.get("state_dict", state) if isinstance(state, Mapping) else {}
    if not any(str(name).startswith("model.diffusion_model.") for name in state):
        raise RestoreError(
            f"{path} could not be read as a Stable Diffusion checkpoint: it has no 'model.diffusion_model.' weights"
        )


@torch.no_grad()
def embed_prompt(text: str, tokenizer, text_encoder) -> torch.Tensor:
    """Return the embedding (1, tokens, width) of a prompt in float32, as diffusers' pipelines do (last hidden state).

    Text beyond the encoder's number of tokens (77) is cut off. Raises RestoreError if `text` is not a string.
    """
    if not isinstance(text, str):
        raise RestoreError(f"prompt must be a string, got a {type(text).__name__}")
    length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    use_mask = getattr(text_encoder.config, "use_attention_mask", False)
    return text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask if use_mask else None)[0]


def make_prompt_encoder(source: str | Path, **where) -> Callable[[str], torch.Tensor]:
    """Return `embed_prompt` with the text encoder of `source`, which is read at the first call and kept."""
    parts: dict = {}

    def encode(text: str) -> torch.Tensor:
        if not parts:
            parts.update(read_model(source, text_only=True, **where))
        return embed_prompt(text, parts["tokenizer"], parts["text_encoder"])

    return encode


def require_complete(folder: Path) -> None:
    """Raise RestoreError unless a folder is a complete Stable Diffusion 1.x / 2.x model."""
    index = read_pipeline_index(folder, "unet, vae, text_encoder, tokenizer and scheduler")
    network = (index.get("unet") or [None, None])[1]
    if network != "UNet2DConditionModel":
        raise RestoreError(
            f"{folder} must hold a Stable Diffusion 1.x or 2.x model (UNet2DConditionModel), got a "
            f"{index.get('_class_name', 'model')}"
        )
    if "XL" in index.get("_class_name", ""):
        raise RestoreError(f"{folder} must hold a Stable Diffusion 1.x or 2.x model, got SDXL")
    missing = [name for name in PARTS if not (folder / name).is_dir()]
    if "text_encoder" in missing or "tokenizer" in missing:
        raise RestoreError(
            f"{folder} has a cross-attention U-Net but no {' and no '.join(missing)}: the empty prompt's embedding "
            "cannot be computed; copy it from the original model"
        )
    if missing:
        raise RestoreError(f"{folder} is incomplete: it has no {', '.join(missing)}")
