"""Reading Stable Diffusion models: a diffusers folder, a hub id, or a single checkpoint file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from operators import RestoreError

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
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def as_dtype(value: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype or its short name. Raises RestoreError for any other."""
    dtype = DTYPES.get(value, value)
    if dtype not in DTYPES.values():
        raise RestoreError(f"precision {value!r} is not known; expected one of {', '.join(DTYPES)}")
    return dtype


def read(source: str | Path, *, config=None, revision: str | None = None, offline: bool = False) -> dict:
    """Parts of the model in float32 on the CPU: unet, vae, text_encoder, tokenizer; scheduler as its config.

    Arguments as in `StableDiffusion.load`. Raises RestoreError with what is wrong and what to do.
    """
    path = Path(source).expanduser()
    name = str(source)
    if not path.exists():
        if path.suffix in SINGLE_FILES or name.count("/") != 1 or name[0] in "./~":
            raise RestoreError(f"{source} does not exist; expected a diffusers folder, a checkpoint file or a hub id")
        path = download(name, revision=revision, offline=offline)
    with no_progress_bars():
        return read_folder(path) if path.is_dir() else read_single_file(path, config=config, offline=offline)


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
        hint = "it is not in the local cache; run once without offline=True" if offline else _first_line(error)
        raise RestoreError(f"the model {name} could not be read from the Hugging Face hub: {hint}") from error


def read_folder(folder: Path) -> dict:
    """Parts from a folder written by diffusers' `save_pretrained`. Raises RestoreError."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    require_complete(folder)
    parts = {
        "unet": _weights(UNet2DConditionModel, folder, "unet"),
        "vae": _weights(AutoencoderKL, folder, "vae"),
        "text_encoder": _weights(CLIPTextModel, folder, "text_encoder"),
        "scheduler": _json(folder / "scheduler" / "scheduler_config.json"),
    }
    try:
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise RestoreError(f"the tokenizer in {folder} cannot be read: {_first_line(error)}") from error
    return parts


def read_single_file(path: Path, *, config=None, offline: bool = False) -> dict:
    """Parts from one file in the original layout, with diffusers' `from_single_file`.

    config: diffusers folder or hub id of the same architecture; None lets diffusers recognise it, which
    needs the small configuration files of that architecture in the cache or the network.
    """
    from diffusers import StableDiffusionPipeline

    if path.suffix not in SINGLE_FILES:
        raise RestoreError(f"{path} is no checkpoint; expected one of {', '.join(SINGLE_FILES)} or a diffusers folder")
    if path.suffix != ".safetensors":
        require_plain_tensors(path)
    if config is not None:
        folder = Path(config).expanduser()
        config = str(
            folder if folder.is_dir() else download(str(config), offline=offline, files=["*.json", "tokenizer/*"])
        )
    try:
        pipe = StableDiffusionPipeline.from_single_file(
            str(path), config=config, local_files_only=offline or config is not None, safety_checker=None
        )
    except Exception as error:  # a foreign file fails anywhere in diffusers' conversion, with errors of any kind
        raise RestoreError(
            f"{path} could not be read as a Stable Diffusion checkpoint ({_first_line(error)}); if it is one, name the "
            "diffusers folder or hub id of its architecture with config="
        ) from error
    parts = {name: getattr(pipe, name, None) for name in PARTS}
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise RestoreError(f"{path} has no {', '.join(missing)}; expected a complete Stable Diffusion checkpoint")
    parts["scheduler"] = dict(pipe.scheduler.config)
    return {name: part.float() if isinstance(part, torch.nn.Module) else part for name, part in parts.items()}


def require_plain_tensors(path: Path) -> None:
    """Refuse a pickle that would run code when it is opened. Raises RestoreError."""
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RestoreError(
            f"{path} is a pickle that holds more than tensors and could run code, so it is not opened; "
            "use the .safetensors version of this checkpoint"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise RestoreError(f"{path} is damaged or no PyTorch checkpoint: {_first_line(error)}") from error


def prompt_encoder(parts: dict) -> Callable[[str], torch.Tensor]:
    """text -> embedding (1, tokens, width) in float32, as in diffusers' pipelines (last hidden state)."""
    tokenizer, text_encoder = parts["tokenizer"], parts["text_encoder"].float().eval().requires_grad_(False)

    @torch.no_grad()
    def encode(text: str) -> torch.Tensor:
        length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
        tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        use_mask = getattr(text_encoder.config, "use_attention_mask", False)
        return text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask if use_mask else None)[0]

    return encode


def alphas_cumprod(config: dict) -> torch.Tensor:
    """alpha_bar (T,) in float64 from a diffusers scheduler configuration. Raises RestoreError."""
    T = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    schedule = config.get("beta_schedule", "linear")
    if config.get("rescale_betas_zero_snr"):
        raise RestoreError("schedules rescaled to zero terminal SNR are not supported: x0_hat is undefined at t = T")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2
    elif schedule == "linear":
        betas = torch.linspace(start, end, T, dtype=torch.float64)
    else:
        raise RestoreError(f"beta schedule {schedule!r} is not supported; expected scaled_linear or linear")
    return torch.cumprod(1 - betas, dim=0)


def require_complete(folder: Path) -> None:
    """Refuse a folder that is not a complete Stable Diffusion 1.x / 2.x model. Raises RestoreError."""
    if not (folder / "model_index.json").is_file():
        raise RestoreError(
            f"{folder} is no diffusers model (it has no model_index.json); expected a folder as written by diffusers' "
            "save_pretrained, with unet, vae, text_encoder, tokenizer and scheduler"
        )
    index = _json(folder / "model_index.json")
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


def _weights(cls, folder: Path, part: str):
    """One network, every weight filled from the file: a missing one would be random. Raises RestoreError."""
    try:
        model, info = cls.from_pretrained(
            folder, subfolder=part, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise RestoreError(f"the {part} in {folder} cannot be loaded: {_first_line(error)}") from error
    bad = [k for k in info["missing_keys"] if "position_ids" not in k] + [str(k) for k in info["mismatched_keys"]]
    if bad:
        raise RestoreError(
            f"the {part} in {folder} does not fit its configuration: {len(bad)} weights are missing or of another "
            f"shape, first {sorted(bad)[0]}"
        )
    return model.float()


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RestoreError(f"{path} cannot be read as JSON: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
