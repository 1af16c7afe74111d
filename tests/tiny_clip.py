"""A tiny CLIP of random weights with its processor, as transformers saves it and in open_clip's layout."""

from __future__ import annotations

from pathlib import Path

import tiny_sd
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor


def save(folder: Path, seed: int = 0) -> Path:
    """Write a CLIPModel and its processor."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small["hidden_act"] = "gelu"  # as ViT-H's
    ends = {f"{k}_token_id": tiny_sd.VOCABULARY[f"<|{name}|>"] for k, name in (("bos", "startoftext"),
            ("eos", "endoftext"), ("pad", "endoftext"))}  # fmt: skip
    text = {**small, **ends, "vocab_size": len(tiny_sd.VOCABULARY), "max_position_embeddings": 12}
    vision = {**small, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    tiny_sd.seeded(lambda: CLIPModel(config), seed).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessor(**size), tiny_sd.tiny_tokenizer(folder)).save_pretrained(folder)
    return folder


def to_open_clip(model: CLIPModel) -> dict[str, torch.Tensor]:
    """The weights under the names and in the shapes of open_clip, whose attention has one matrix for q, k and v."""
    ours, theirs = model.state_dict(), {"logit_scale": model.logit_scale}
    for side, ends in (("text", ""), ("vision", "visual.")):
        embeddings = f"{side}_model.embeddings"
        theirs[f"{ends}positional_embedding"] = ours[f"{embeddings}.position_embedding.weight"]
        for i in range(2):
            old, new = f"{side}_model.encoder.layers.{i}", f"{ends}transformer.resblocks.{i}"
            for kind in ("weight", "bias"):
                qkv = [ours[f"{old}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
                theirs[f"{new}.attn.in_proj_{kind}"] = torch.cat(qkv)
                pairs = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
                for a, b in (pairs | {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}).items():
                    theirs[f"{new}.{b}.{kind}"] = ours[f"{old}.{a}.{kind}"]
    theirs["token_embedding.weight"] = ours["text_model.embeddings.token_embedding.weight"]
    theirs["text_projection"] = ours["text_projection.weight"].T
    theirs["visual.proj"] = ours["visual_projection.weight"].T
    theirs["visual.class_embedding"] = ours["vision_model.embeddings.class_embedding"]
    theirs["visual.conv1.weight"] = ours["vision_model.embeddings.patch_embedding.weight"]
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    for new, old in (norms | {"ln_final": "text_model.final_layer_norm"}).items():
        theirs |= {f"{new}.{kind}": ours[f"{old}.{kind}"] for kind in ("weight", "bias")}
    return {name: value.detach().clone() for name, value in theirs.items()}
