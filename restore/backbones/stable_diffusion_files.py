"""Reading Stable Diffusion models: a diffusers folder, a hub id, or a single checkpoint file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from operators import RestoreError
from restore.backbones.pipeline_folders import read_folder, read_text_encoders
from restore.backbones.weights import align_memory, first_line, hide_progress_bars, read_weights

PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
# Full-precision safetensors only: repositories also hold .bin pickles, fp16 copies and safety checkers.
HUB_FILES = ["*.json", "tokenizer/*", "text_encoder/model.safetensors", "*/diffusion_pytorch_model.safetensors"]
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
    if not path.is_dir():
        with hide_progress_bars():
            return read_single_file(path, config=config, offline=offline, text_only=text_only)
    parts = () if text_only else read_folder(path, "stable-diffusion", torch.float32)
    return dict(zip(PARTS, parts, strict=False)) | read_text_encoders(path, "stable-diffusion")


def download_model(name: str, *, revision: str | None = None, offline: bool = False, files=HUB_FILES) -> Path:
    """Return the folder of a hub model in the local cache, downloaded first unless `offline`. Raises RestoreError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=offline, allow_patterns=files))
    except (OSError, ValueError) as error:
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


def embed_prompt(text: str, parts: dict) -> torch.Tensor:
    """Return the embedding (1, tokens, width) of a prompt in float32, as diffusers' pipelines do (last hidden state).

    parts: with tokenizer and text_encoder. Text beyond the encoder's number of tokens (77) is cut off.
    """
    tokenizer, text_encoder = parts["tokenizer"], parts["text_encoder"]
    length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    use_mask = getattr(text_encoder.config, "use_attention_mask", False)
    return text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask if use_mask else None)[0]
