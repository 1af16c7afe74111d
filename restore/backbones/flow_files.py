"""Reading transformer models (SD3, FLUX, DiT) and their text encoders from diffusers folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from operators import RestoreError
from restore import disk
from restore.backbones.autoencoder import load_vae
from restore.backbones.weights import first_line, hide_progress_bars, load_part, read_pipeline_index

# Of each kind, the classes of its transformer, its pipeline and its text encoders.
KINDS = {
    "sd3": (
        "SD3Transformer2DModel",
        "StableDiffusion3Pipeline",
        ("CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel"),
    ),
    "flux": ("FluxTransformer2DModel", "FluxPipeline", ("CLIPTextModel", "T5EncoderModel")),
    "dit": ("DiTTransformer2DModel", "DiTPipeline", ()),
}
OPTIONAL = {"sd3": ("text_encoder_3", "tokenizer_3")}  # the pipeline uses zeros for a missing one
TOKENIZERS = {"T5EncoderModel": "T5TokenizerFast"}  # the others have a CLIPTokenizer


def read_folder(source: str | Path, kind: str, dtype: torch.dtype, vae: nn.Module | None = None) -> tuple:
    """Read the transformer in `dtype`, the autoencoder as stored, both on the CPU, and the scheduler's configuration.

    vae: in place of the folder's, which may then be missing. Raises RestoreError.
    """
    import diffusers

    folder = Path(source).expanduser()
    index = read_pipeline_index(folder, "transformer, vae and scheduler")
    transformer, pipeline, _ = KINDS[kind]
    # diffusers' DiT was a Transformer2DModel when the published folders were written.
    name = (index.get("transformer") or [None, None])[1]
    if name != transformer and (index.get("_class_name") != pipeline or name != "Transformer2DModel"):
        raise RestoreError(f"{folder} must hold a {pipeline}, got a {index.get('_class_name', 'model')}")
    needed = ["transformer", "scheduler"] + ["vae"] * (vae is None)
    missing = [name for name in needed if not (folder / name).is_dir()]
    if missing:
        raise RestoreError(f"{folder} is incomplete: it has no {', '.join(missing)}")
    with hide_progress_bars():
        network = load_part(getattr(diffusers, transformer), folder, "transformer", dtype, pickles=True)
    vae = load_vae(folder / "vae", pickles=True) if vae is None else vae
    return network, vae, disk.read_json(folder / "scheduler" / "scheduler_config.json", required=True)


def make_prompt_encoder(
    folder: Path, kind: str, transformer: nn.Module, dtype: torch.dtype, text_tokens: int | None = None
) -> Callable[..., torch.Tensor] | None:
    """Return encode(text, keep=True) -> condition (1, 1 + tokens, width) in float32, the pipeline's own encode_prompt.

    The folder's text encoders are read when needed and kept if `keep`. None if the folder has no text encoder;
    raises RestoreError if it has only some of them.
    """
    folder = folder.expanduser()
    names = [f"{part}{n}" for n, _ in _numbered(kind) for part in ("text_encoder", "tokenizer")]
    present = [name for name in names if (folder / name).is_dir()]
    if not present:
        return None
    missing = [name for name in names if name not in present and name not in OPTIONAL.get(kind, ())]
    if missing:
        raise RestoreError(f"{folder} has {', '.join(present)} but no {', '.join(missing)}: prompts need all of them")
    pipelines: list = []

    @torch.no_grad()
    def encode(text: str, keep: bool = True) -> torch.Tensor:
        if not isinstance(text, str):
            raise RestoreError(f"prompt must be a string, got a {type(text).__name__}")
        pipe = pipelines[0] if pipelines else _read_text_pipeline(folder, kind, transformer, dtype)
        if keep and not pipelines:
            pipelines.append(pipe)
        options = {f"prompt{n}": None for n, _ in _numbered(kind)[1:]}
        options |= {"do_classifier_free_guidance": False} if kind == "sd3" else {}
        options |= {} if text_tokens is None else {"max_sequence_length": text_tokens}
        output = pipe.encode_prompt(text, **options, device=torch.device("cpu"))
        embeds, pooled = (output[0], output[2]) if kind == "sd3" else output[:2]
        return text_condition(embeds.float(), pooled.float())

    return encode


def _numbered(kind: str) -> list[tuple[str, str]]:
    """Return ("", class of text_encoder), ("_2", class of text_encoder_2), ..."""
    return [("" if n == 0 else f"_{n + 1}", cls) for n, cls in enumerate(KINDS[kind][2])]


def _read_text_pipeline(folder: Path, kind: str, transformer: nn.Module, dtype: torch.dtype):
    import diffusers
    import transformers

    # In float16 T5's activations overflow.
    dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    parts: dict = {}
    with hide_progress_bars():
        for n, name in _numbered(kind):
            encoder, tokenizer = f"text_encoder{n}", f"tokenizer{n}"
            if not (folder / encoder).is_dir() or not (folder / tokenizer).is_dir():
                parts |= {encoder: None, tokenizer: None}
                continue
            parts[encoder] = load_part(getattr(transformers, name), folder, encoder, dtype)
            try:
                cls = getattr(transformers, TOKENIZERS.get(name, "CLIPTokenizer"))
                parts[tokenizer] = cls.from_pretrained(folder / tokenizer, local_files_only=True)
            except (OSError, ValueError, TypeError) as error:
                raise RestoreError(f"the {tokenizer} in {folder} cannot be read: {first_line(error)}") from error
    return getattr(diffusers, KINDS[kind][1])(transformer=transformer, vae=None, scheduler=None, **parts)


def text_condition(prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor) -> torch.Tensor:
    """Return the condition (B, 1 + tokens, width) of SD3 and FLUX for the outputs of diffusers' encode_prompt.

    prompt_embeds: (B, tokens, w). pooled_prompt_embeds: (B, p), which become the first row. Both are padded with zeros
    to the larger width.
    """
    width = max(prompt_embeds.shape[-1], pooled_prompt_embeds.shape[-1])
    rows = [pooled_prompt_embeds[:, None], prompt_embeds]
    return torch.cat([F.pad(row, (0, width - row.shape[-1])) for row in rows], dim=1)
