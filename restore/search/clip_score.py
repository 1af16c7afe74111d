"""Scores of images and prompts by a CLIP model of transformers, for searches in text-to-image generation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from operators import RestoreError
from restore.images import io
from restore.restoration import choose_device
from restore.zoo.store import is_offline


@dataclass(frozen=True)
class ClipScore:
    """f(results, prompts) -> (B,): images (B, 3, H, W) in [-1, 1] and one prompt for each.

    model, processor: folders or hub ids of a transformers CLIPModel and its CLIPProcessor. scaled: the cosine of the
    two embeddings times the model's exp(logit_scale), as in PickScore (Kirstain et al. 2023); else
    100 max(cosine, 0), CLIP score (Hessel et al. 2021, with 100 for their 2.5).
    Raises RestoreError if the model is missing, incomplete or of another kind.
    """

    better: ClassVar[int] = 1

    model: str
    processor: str
    scaled: bool

    def __call__(self, results: torch.Tensor, prompts: Sequence[str], batch_size: int = 16) -> torch.Tensor:
        if len(prompts) != len(results) or not all(prompts):
            raise RestoreError("a CLIP score compares every image with its prompt; give tasks with a file of prompts")
        model, processor = _load_clip(self.model, self.processor)
        values = []
        for first in range(0, len(results), batch_size):
            part = slice(first, first + batch_size)
            images = list(io.to_uint8(results[part]))
            text = {"padding": True, "truncation": True, "return_tensors": "pt"}
            inputs = processor(text=list(prompts[part]), images=images, **text)
            with torch.no_grad():
                out = model(**inputs.to(model.device))
            cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
            values.append(model.logit_scale.exp() * cosine if self.scaled else 100 * cosine.clamp(min=0))
        return torch.cat(values).cpu()


SCORES = {
    "clip_score": ClipScore("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14", False),
    "pick_score": ClipScore("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", True),
}


@functools.lru_cache(maxsize=1)
def _load_clip(model: str, processor: str) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    local = {"local_files_only": is_offline()}
    try:
        network, info = CLIPModel.from_pretrained(model, output_loading_info=True, **local)
        if missing := sorted(info["missing_keys"]):  # transformers only warns, and leaves them random
            raise RestoreError(f"{model} must hold a whole CLIP model, but {missing[0]} is missing")
        network.eval().requires_grad_(False).to(choose_device("auto"))
        return network, CLIPProcessor.from_pretrained(processor, **local)
    except (OSError, ValueError, RuntimeError) as error:
        raise RestoreError(f"the CLIP model {model} cannot be loaded: {str(error).splitlines()[0]}") from error
