"""Reading Stable Diffusion models: a diffusers folder, a hub id, or a single checkpoint file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from operators import RestoreError
from restore import disk
from restore.backbones import weights
from restore.backbones.weights import first_line, own_memory

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


def read(
    source: str | Path, *, config=None, revision: str | None = None, offline: bool = False, text_only: bool = False
) -> dict:
    """Parts of the model in float32 on the CPU: unet, vae, text_encoder, tokenizer; scheduler as its config.

    Arguments as in `StableDiffusion.load`; text_only: only text_encoder and tokenizer.
    Raises RestoreError with what is wrong and what to do.
    """
    path = Path(source).expanduser()
    name = str(source)
    if not path.exists():
        if path.suffix in SINGLE_FILES or name.count("/") != 1 or name[0] in "./~":
            raise RestoreError(f"{source} does not exist; expected a diffusers folder, a checkpoint file or a hub id")
        path = download(name, revision=revision, offline=offline)
    with no_progress_bars():
        if path.is_dir():
            return read_folder(path, text_only)
        return read_single_file(path, config=config, offline=offline, text_only=text_only)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep diffusers and transformers from drawing bars on stderr while they load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def download(name: str, *, revision: str | None = None, offline: bool = False, files: list[str] | None = None) -> Path:
    """The folder of a hub model in the local cache, fetched first unless `offline`. Raises RestoreError."""
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
    """Parts from a folder written by diffusers' `save_pretrained`. Raises RestoreError."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    require_complete(folder)
    parts = {"text_encoder": network(CLIPTextModel, folder, "text_encoder")}
    try:
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise RestoreError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from error
    if not text_only:
        parts["unet"] = network(UNet2DConditionModel, folder, "unet")
        parts["vae"] = network(AutoencoderKL, folder, "vae")
        parts["scheduler"] = disk.read_json(folder / "scheduler" / "scheduler_config.json", required=True)
    return parts


def read_single_file(path: Path, *, config=None, offline: bool = False, text_only: bool = False) -> dict:
    """Parts from one file in the original layout, with diffusers' `from_single_file`.

    config: diffusers folder or hub id of the same architecture; None lets diffusers recognise it, which
    needs the small configuration files of that architecture in the cache or the network.
    """
    from diffusers import StableDiffusionPipeline

    if path.suffix not in SINGLE_FILES:
        raise RestoreError(f"{path} is no checkpoint; expected one of {', '.join(SINGLE_FILES)} or a diffusers folder")
    require_checkpoint(path)
    if config is not None:
        folder = Path(config).expanduser()
        config = str(
            folder if folder.is_dir() else download(str(config), offline=offline, files=["*.json", "tokenizer/*"])
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
        raise RestoreError(f"{path} has no {', '.join(missing)}; expected a complete Stable Diffusion checkpoint")
    parts["scheduler"] = dict(pipe.scheduler.config)
    return {
        k: own_memory(part.float().eval()) if isinstance(part, torch.nn.Module) else part for k, part in parts.items()
    }


def require_checkpoint(path: Path) -> None:
    """Refuse a file that is no Stable Diffusion checkpoint in the original layout. Raises RestoreError."""
    state = weights.read(path, "meta")
    state = state.get("state_dict", state) if isinstance(state, Mapping) else {}
    if not any(str(name).startswith("model.diffusion_model.") for name in state):
        raise RestoreError(
            f"{path} could not be read as a Stable Diffusion checkpoint: it has no 'model.diffusion_model.' weights"
        )


@torch.no_grad()
def embed(text: str, tokenizer, text_encoder) -> torch.Tensor:
    """Embedding (1, tokens, width) of a prompt in float32, as in diffusers' pipelines (last hidden state).

    What exceeds the encoder's number of tokens (77) is cut off. Raises RestoreError when text is no string.
    """
    if not isinstance(text, str):
        raise RestoreError(f"a prompt is a text, not a {type(text).__name__}")
    length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    use_mask = getattr(text_encoder.config, "use_attention_mask", False)
    return text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask if use_mask else None)[0]


def prompt_encoder(source: str | Path, **where) -> Callable[[str], torch.Tensor]:
    """text -> embedding (see `embed`) with the text encoder of `source`, read at the first call and kept."""
    kept: dict = {}

    def encode(text: str) -> torch.Tensor:
        if not kept:
            kept.update(read(source, text_only=True, **where))
        return embed(text, kept["tokenizer"], kept["text_encoder"])

    return encode


def pipeline_index(folder: Path, parts: str) -> dict:
    """The model_index.json of a pipeline's folder; parts: in words, what belongs there. Raises RestoreError."""
    if not (folder / "model_index.json").is_file():
        raise RestoreError(
            f"{folder} is no diffusers model (it has no model_index.json); expected a folder as written by diffusers' "
            f"save_pretrained, with {parts}"
        )
    return disk.read_json(folder / "model_index.json", required=True)


def require_complete(folder: Path) -> None:
    """Refuse a folder that is not a complete Stable Diffusion 1.x / 2.x model. Raises RestoreError."""
    index = pipeline_index(folder, "unet, vae, text_encoder, tokenizer and scheduler")
    network = (index.get("unet") or [None, None])[1]
    if network != "UNet2DConditionModel":
        raise RestoreError(
            f"{folder} holds a {index.get('_class_name', 'model')}, not a Stable Diffusion 1.x or 2.x "
            "(UNet2DConditionModel) model"
        )
    if "XL" in index.get("_class_name", ""):
        raise RestoreError(f"{folder} holds an SDXL model, which is not supported; use Stable Diffusion 1.x or 2.x")
    missing = [name for name in PARTS if not (folder / name).is_dir()]
    if "text_encoder" in missing or "tokenizer" in missing:
        raise RestoreError(
            f"{folder} has a cross-attention U-Net but no {' and no '.join(missing)}: the empty prompt's embedding "
            "cannot be computed; copy it from the original model"
        )
    if missing:
        raise RestoreError(f"{folder} is incomplete: it has no {', '.join(missing)}")


def network(cls, folder: Path, part: str, dtype: torch.dtype = torch.float32, pickles: bool = False):
    """One network of a diffusers folder ("" of one alone), every weight filled from the file: a missing one would be
    random. pickles: where there are no safetensors, a .bin too, whose code is never run. Raises RestoreError."""
    name, where = part or "network", {"subfolder": part} if part else {}
    if cls.__module__.startswith("diffusers"):
        where["torch_dtype"] = dtype  # not by way of float32, which would take twice the memory
    try:
        model, info = cls.from_pretrained(
            folder, **where, use_safetensors=None if pickles else True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise RestoreError(f"the {name} in {folder} cannot be loaded: {first_line(error)}") from error
    bad = [k for k in info["missing_keys"] if "position_ids" not in k] + [str(k) for k in info["mismatched_keys"]]
    if bad:
        raise RestoreError(
            f"the {name} in {folder} does not fit its configuration: {len(bad)} weights are missing or of another "
            f"shape, first {sorted(bad)[0]}"
        )
    return own_memory(nn.Module.to(model, dtype).eval().requires_grad_(False))
