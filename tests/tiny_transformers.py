"""Tiny random-weight transformers of diffusers that have no backbone of their own, what to call them with, and
attention under the identity written by hand for each."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_flow import DYNAMIC, HEADS, TEXT, lively, t5, t5_tokenizer
from tiny_sd import tiny_vae
from torch.nn.functional import relu

GRID, TOKENS = (2, 3), 5
ROPE4 = [2, 2, 2, 2]


def build(name, *, seed=30, **config):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    common = {"num_attention_heads": HEADS, "attention_head_dim": 8}
    return lively(lambda: getattr(diffusers, name)(**{**common, **config}), seed)


def chroma(**changes):
    sizes = {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1}
    layers = {"num_layers": 1, "num_single_layers": 1}
    own = {"in_channels": 16, "joint_attention_dim": TEXT, "axes_dims_rope": (2, 2, 4)}
    return build("ChromaTransformer2DModel", **{**sizes, **layers, **own, **changes})


def flux2(**changes):
    own = {"in_channels": 16, "joint_attention_dim": TEXT, "axes_dims_rope": ROPE4, "timestep_guidance_channels": 32}
    return build("Flux2Transformer2DModel", **{"num_layers": 1, "num_single_layers": 1, **own, **changes})


def qwenimage(**changes):
    own = {"in_channels": 16, "out_channels": 4, "joint_attention_dim": TEXT, "axes_dims_rope": (2, 2, 4)}
    return build("QwenImageTransformer2DModel", **{"num_layers": 2, **own, **changes})


def auraflow(**changes):
    layers = {"num_mmdit_layers": 1, "num_single_dit_layers": 1}
    own = {"sample_size": 8, "joint_attention_dim": TEXT, "caption_projection_dim": 32, "pos_embed_max_size": 64}
    return build("AuraFlowTransformer2DModel", **{**layers, **own, **changes})


def pixart(**changes):
    own = {"sample_size": 8, "cross_attention_dim": 32, "caption_channels": TEXT, "norm_num_groups": 8}
    return build("PixArtTransformer2DModel", **{"num_layers": 2, **own, **changes})


def sana(**changes):
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
    own = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "caption_channels": TEXT}
    return build("SanaTransformer2DModel", **{"num_layers": 2, **cross, **own, **changes})


def hunyuandit(**changes):
    text = {"cross_attention_dim": TEXT, "cross_attention_dim_t5": 16, "pooled_projection_dim": 16}
    own = {"in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 32, "text_len": 5, "text_len_t5": 3}
    flags = {"use_style_cond_and_image_meta_size": False}
    return build("HunyuanDiT2DModel", **{"num_layers": 2, **text, **own, **flags, **changes})


@dataclass
class Case:
    """A network with two images: `call` its arguments, `time` their value for t of 1000, `layers` their short names,
    `text` the number of text tokens that attend with the image's, first in the sequence."""

    network: torch.nn.Module
    call: dict
    time: float
    layers: tuple[str, ...]
    text: int = 0
    grid: tuple[int, int] = field(default=GRID)


def make_case(name: str, t: float = 600.0) -> Case:
    g = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 4, 2 * GRID[0], 2 * GRID[1], generator=g)
    packed = torch.nn.functional.pixel_unshuffle(latent, 2).flatten(2).mT
    call = {"hidden_states": latent, "encoder_hidden_states": torch.randn(2, TOKENS, TEXT, generator=g)}
    ids = torch.tensor([[0, i, j] for i in range(GRID[0]) for j in range(GRID[1])]).float()
    unit, masks = t / 1000, {"encoder_attention_mask": torch.ones(2, TOKENS)}
    match name:
        case "chroma":
            call |= {"hidden_states": packed, "img_ids": ids, "txt_ids": torch.zeros(TOKENS, 3)}
            found = Case(chroma(), call | {"attention_mask": torch.ones(2, TOKENS + 6)}, unit, ("b0", "b1"), TOKENS)
        case "flux2":
            ids = torch.nn.functional.pad(ids, (0, 1)).expand(2, -1, -1)
            call |= {"hidden_states": packed, "img_ids": ids, "txt_ids": torch.zeros(2, TOKENS, 4)}
            found = Case(flux2(), call | {"guidance": torch.full((2,), 4.0)}, unit, ("b0", "b1"), TOKENS)
        case "qwenimage":
            shapes = {"img_shapes": [[(1, *GRID)]] * 2, "encoder_hidden_states_mask": torch.ones(2, TOKENS).bool()}
            network = qwenimage()
            if "txt_seq_lens" in inspect.signature(type(network).forward).parameters:  # diffusers 0.35
                shapes["txt_seq_lens"] = [TOKENS] * 2
            found = Case(network, call | {"hidden_states": packed} | shapes, unit, ("b0", "b1"), TOKENS)
        case "auraflow":
            found = Case(auraflow(), call, unit, ("b0", "b1"), TOKENS + 8)  # register tokens of the network
        case "pixart":
            found = Case(pixart(), call | masks | {"added_cond_kwargs": {}}, t, ("b0", "b1"))
        case "sana":
            found = Case(sana(), call | masks, t, ("b0", "b1"), grid=(4, 6))
        case "hunyuandit":
            angles = torch.randn(6, 8, generator=g)
            call |= {
                "text_embedding_mask": torch.ones(2, TOKENS),
                "encoder_hidden_states_t5": torch.randn(2, 3, 16, generator=g),
                "text_embedding_mask_t5": torch.ones(2, 3),
                "image_rotary_emb": (angles.cos(), angles.sin()),
            }
            found = Case(hunyuandit(), call, t, ("b0", "b1"))
    found.call["timestep"] = torch.full((2,), found.time)
    return found


class ByHand:
    """The identity in a network's own kind of attention: every token of the joint sequence keeps its value."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        if hasattr(attn, "to_qkv_mlp_proj"):  # FLUX.2's single blocks project the feed-forward net too
            both = attn.to_qkv_mlp_proj(hidden_states)
            value, rest = both[..., 2 * attn.inner_dim : 3 * attn.inner_dim], both[..., 3 * attn.inner_dim :]
            return attn.to_out(torch.cat([value, attn.mlp_act_fn(rest)], dim=-1))
        value = attn.to_v(hidden_states)
        image = value if getattr(attn, "pre_only", False) else attn.to_out[0](value)
        if encoder_hidden_states is None or getattr(attn, "add_v_proj", None) is None:
            return image
        return image, attn.to_add_out(attn.add_v_proj(encoder_hidden_states))


def linear_map(attn, hidden_states):
    """(B, heads, N, N), Sana's map written out: relu(q) relu(k)^T with rows of sum one."""
    q, k = (relu(to(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)) for to in (attn.to_q, attn.to_k))
    weights = q @ k.transpose(-2, -1)
    return weights / (weights.sum(-1, keepdim=True) + 1e-15)


def embeds(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FLOW = {"scheduler": FlowMatchEulerDiscreteScheduler(**DYNAMIC), "vae": None, "text_encoder": None, "tokenizer": None}


def make_pipeline(name: str):
    """(pipeline, options of its call without guidance, with classifier-free guidance)."""
    size = {"height": 32, "width": 48}
    prompts = {"prompt": "a cat", "negative_prompt": "a dog", "max_sequence_length": 8, "height": 32, "width": 48}
    text = {"tokenizer": t5_tokenizer(), "text_encoder": t5(), "vae": tiny_vae()}
    given = {"prompt": None, "prompt_embeds": embeds(1, 1, TOKENS, TEXT), **size}
    negative = {"negative_prompt_embeds": embeds(2, 1, TOKENS, TEXT)}
    masks = {f"{kind}_attention_mask": torch.ones(1, TOKENS) for kind in ("prompt", "negative_prompt")}
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    match name:
        case "chroma":
            pipe = diffusers.ChromaPipeline(FlowMatchEulerDiscreteScheduler(**DYNAMIC), transformer=chroma(), **text)
            return pipe, prompts | {"guidance_scale": 1.0}, prompts | {"guidance_scale": 4.0}
        case "flux2":
            return diffusers.Flux2Pipeline(**FLOW, transformer=flux2()), given, None
        case "qwenimage":
            pipe = diffusers.QwenImagePipeline(**FLOW, transformer=qwenimage())
            both = {
                f"{kind}_mask": torch.ones(1, TOKENS).long() for kind in ("prompt_embeds", "negative_prompt_embeds")
            }
            one = {"prompt_embeds_mask": both["prompt_embeds_mask"], "true_cfg_scale": 1.0}
            return pipe, given | one, given | negative | both | {"true_cfg_scale": 4.0}
        case "auraflow":
            pipe = diffusers.AuraFlowPipeline(scheduler=flow, transformer=auraflow(), **text)
        case "pixart":
            scheduler = diffusers.DPMSolverMultistepScheduler()
            pipe = diffusers.PixArtSigmaPipeline(scheduler=scheduler, transformer=pixart(), **text)
            prompts |= {"use_resolution_binning": False, "clean_caption": False}
        case "sana":
            parts = FLOW | {"scheduler": flow, "transformer": sana()}
            pipe, own = diffusers.SanaPipeline(**parts), {"use_resolution_binning": False}
            given |= own | {"prompt_attention_mask": masks["prompt_attention_mask"]}
            given |= {"height": 64, "width": 96}
            return (
                pipe,
                given | {"guidance_scale": 1.0},
                given | negative | masks | {"guidance_scale": 4.0, "negative_prompt": None},
            )
    return pipe, prompts | {"guidance_scale": 1.0}, prompts | {"guidance_scale": 4.0}
