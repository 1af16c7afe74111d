"""Reading networks, autoencoders and text encoders from folders written by diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from operators import RestoreError
from restore import disk
from restore.backbones.autoencoder import load_vae
from restore.backbones.weights import first_line, hide_progress_bars, load_part, read_pipeline_index

CLIP, T5 = "CLIPTextModelWithProjection", "T5EncoderModel"
# Of each kind, its pipeline, the folder and the class of its network, and its text encoders.
KINDS = {
    "stable-diffusion": ("StableDiffusionPipeline", "unet", "UNet2DConditionModel", ("CLIPTextModel",)),
    "sd3": ("StableDiffusion3Pipeline", "transformer", "SD3Transformer2DModel", (CLIP, CLIP, T5)),
    "flux": ("FluxPipeline", "transformer", "FluxTransformer2DModel", ("CLIPTextModel", T5)),
    "dit": ("DiTPipeline", "transformer", "DiTTransformer2DModel", ()),
}
OPTIONAL = {"sd3": ("text_encoder_3", "tokenizer_3")}  # the pipeline uses zeros for a missing one
SUFFIXES = "", "_2", "_3"


def read_folder(folder: Path, kind: str, dtype: torch.dtype, vae: nn.Module | None = None) -> tuple:
    """Read the network in `dtype`, the autoencoder as stored, both on the CPU, and the scheduler's configuration.

    vae: in place of the folder's, which may then be missing. Raises RestoreError, for Stable Diffusion also if text
    encoder or tokenizer is missing, without which its U-Net cannot run, or if weights are not safetensors.
    """
    import diffusers

    pipeline, part, network, _ = KINDS[kind]
    index = read_pipeline_index(folder, f"{part}, vae and scheduler")
    name, stored = index.get("_class_name", "model"), (index.get(part) or [None, None])[1]
    # diffusers' DiT was a Transformer2DModel when the published folders were written. SDXL's U-Net has the class of
    # Stable Diffusion's.
    if "XL" in name or (stored != network and (name != pipeline or stored != "Transformer2DModel")):
        raise RestoreError(f"{folder} must hold a {pipeline}, got a {name}")
    needs_prompt = kind == "stable-diffusion"
    text_parts = ["text_encoder", "tokenizer"] if needs_prompt else []
    require_parts(folder, [part, "scheduler", *text_parts] + ["vae"] * (vae is None))
    with hide_progress_bars():
        model = load_part(getattr(diffusers, network), folder, part, dtype, pickles=not needs_prompt)
    vae = load_vae(folder / "vae", pickles=not needs_prompt) if vae is None else vae
    return model, vae, disk.read_json(folder / "scheduler" / "scheduler_config.json", required=True)


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


def read_text_encoders(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return a pipeline's text encoders and tokenizers by name, None for those not in its folder."""
    import transformers

    parts: dict[str, Any] = {}
    with hide_progress_bars():
        for name, encoder, tokenizer in _text_parts(kind):
            parts |= {encoder: None, tokenizer: None}
            if not (folder / encoder).is_dir() or not (folder / tokenizer).is_dir():
                continue
            parts[encoder] = load_part(getattr(transformers, name), folder, encoder, dtype)
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
    """Return class and folder of each text encoder and the folder of its tokenizer."""
    return [(cls, f"text_encoder{n}", f"tokenizer{n}") for cls, n in zip(KINDS[kind][3], SUFFIXES, strict=False)]
