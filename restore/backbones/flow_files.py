"""Reading transformer models (SD3, FLUX, DiT) from diffusers folders, and their text encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from operators import RestoreError
from restore import disk
from restore.backbones.autoencoder import load_vae
from restore.backbones.stable_diffusion_files import network, no_progress_bars, pipeline_index
from restore.backbones.weights import first_line

# Of each kind: the class of its transformer, its pipeline's, and those of its text encoders. What is optional may be
# missing: the pipeline then puts zeros in its place.
KINDS = {
    "sd3": (
        "SD3Transformer2DModel",
        "StableDiffusion3Pipeline",
        ("CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel"),
    ),
    "flux": ("FluxTransformer2DModel", "FluxPipeline", ("CLIPTextModel", "T5EncoderModel")),
    "dit": ("DiTTransformer2DModel", "DiTPipeline", ()),
}
OPTIONAL = {"sd3": ("text_encoder_3", "tokenizer_3")}
TOKENIZERS = {"T5EncoderModel": "T5TokenizerFast"}  # of the others: CLIPTokenizer


def read_folder(source: str | Path, kind: str, dtype: torch.dtype, vae: nn.Module | None = None) -> dict:
    """transformer in `dtype` and vae as stored, on the CPU; scheduler as its configuration. Raises RestoreError.

    vae: in place of the folder's, which may then be missing.
    """
    import diffusers

    folder = Path(source).expanduser()
    index = pipeline_index(folder, "transformer, vae and scheduler")
    # diffusers' DiT was a Transformer2DModel when the published folders were written.
    found = (index.get("transformer") or [None, None])[1]
    if KINDS[kind][0] != found and (index.get("_class_name") != KINDS[kind][1] or found != "Transformer2DModel"):
        raise RestoreError(f"{folder} holds a {index.get('_class_name', 'model')}, not a {KINDS[kind][1]}")
    needed = ["transformer", "scheduler"] + ["vae"] * (vae is None)
    missing = [name for name in needed if not (folder / name).is_dir()]
    if missing:
        raise RestoreError(f"{folder} is incomplete: it has no {', '.join(missing)}")
    with no_progress_bars():
        transformer = network(getattr(diffusers, KINDS[kind][0]), folder, "transformer", dtype, pickles=True)
    return {
        "transformer": transformer,
        "vae": load_vae(folder / "vae", pickles=True) if vae is None else vae,
        "scheduler": disk.read_json(folder / "scheduler" / "scheduler_config.json", required=True),
    }


def prompt_encoder(
    folder: Path, kind: str, transformer: nn.Module, dtype: torch.dtype, text_tokens: int | None = None
) -> Callable[..., torch.Tensor] | None:
    """encode(text, keep=True) -> condition (1, 1 + tokens, width) in float32, by the pipeline's own encode_prompt with
    the text encoders of the folder, read when needed and kept if `keep`; None where the folder has none of them.

    Raises RestoreError where it has some but not all.
    """
    folder = folder.expanduser()
    names = [f"{part}{n}" for n, _ in _numbered(kind) for part in ("text_encoder", "tokenizer")]
    there = [name for name in names if (folder / name).is_dir()]
    if not there:
        return None
    missing = [name for name in names if name not in there and name not in OPTIONAL.get(kind, ())]
    if missing:
        raise RestoreError(f"{folder} has {', '.join(there)} but no {', '.join(missing)}: prompts need all of them")
    kept: list = []

    @torch.no_grad()
    def encode(text: str, keep: bool = True) -> torch.Tensor:
        if not isinstance(text, str):
            raise RestoreError(f"a prompt is a text, not a {type(text).__name__}")
        pipe = kept[0] if kept else _text_pipeline(folder, kind, transformer, dtype)
        if keep and not kept:
            kept.append(pipe)
        others = {f"prompt{n}": None for n, _ in _numbered(kind)[1:]}
        options = {"do_classifier_free_guidance": False} if kind == "sd3" else {}
        options |= {} if text_tokens is None else {"max_sequence_length": text_tokens}
        found = pipe.encode_prompt(text, **others, device=torch.device("cpu"), **options)
        embeds, pooled = (found[0], found[2]) if kind == "sd3" else found[:2]
        return text_condition(embeds.float(), pooled.float())

    return encode


def _numbered(kind: str) -> list[tuple[str, str]]:
    """("", class of text_encoder), ("_2", class of text_encoder_2), ..."""
    return [("" if n == 0 else f"_{n + 1}", cls) for n, cls in enumerate(KINDS[kind][2])]


def _text_pipeline(folder: Path, kind: str, transformer: nn.Module, dtype: torch.dtype):
    import diffusers
    import transformers

    # In float16 T5's activations overflow.
    dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    parts: dict = {}
    with no_progress_bars():
        for n, cls in _numbered(kind):
            encoder, tokenizer = f"text_encoder{n}", f"tokenizer{n}"
            if not (folder / encoder).is_dir() or not (folder / tokenizer).is_dir():
                parts |= {encoder: None, tokenizer: None}
                continue
            parts[encoder] = network(getattr(transformers, cls), folder, encoder, dtype)
            try:
                found = getattr(transformers, TOKENIZERS.get(cls, "CLIPTokenizer"))
                parts[tokenizer] = found.from_pretrained(folder / tokenizer, local_files_only=True)
            except (OSError, ValueError, TypeError) as error:
                raise RestoreError(f"the {tokenizer} in {folder} cannot be read: {first_line(error)}") from error
    pipeline = getattr(diffusers, KINDS[kind][1])
    return pipeline(transformer=transformer, vae=None, scheduler=None, **parts)


def text_condition(prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor) -> torch.Tensor:
    """The condition (B, 1 + tokens, width) of SD3 and FLUX from what diffusers' pipelines call prompt_embeds
    (B, tokens, w) and pooled_prompt_embeds (B, p): the pooled embedding is the first row, zeros fill it up."""
    width = max(prompt_embeds.shape[-1], pooled_prompt_embeds.shape[-1])
    rows = [pooled_prompt_embeds[:, None], prompt_embeds]
    return torch.cat([F.pad(row, (0, width - row.shape[-1])) for row in rows], dim=1)
