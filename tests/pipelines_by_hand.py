"""Samples of diffusers pipelines, and their guided predictions written out by hand."""

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from PIL import Image
from torch.utils._pytree import tree_map

from restore.guidance import PAG
from restore.guidance.attention import perturb_attention
from restore.guidance.pipelines import PipelineNetwork

MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def relative(a, b):
    return float((a - b).norm() / b.norm())


def sample(pipe, *, seed=0, **options):
    options = {"prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent", **options}
    out = pipe(generator=torch.Generator().manual_seed(seed), **options).images
    return out if isinstance(out, torch.Tensor) else torch.from_numpy(np.stack(out))


def picture(size=32, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def half_mask(size=32):
    mask = np.zeros((size, size), np.uint8)
    mask[:, size // 2 :] = 255
    return Image.fromarray(mask)


def inputs(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.randn(batch, 12, 16, generator=generator)


def weak_eps(unet, z, t, text, layers=MID, target="identity"):
    """The perturbed prediction, made here without `guided`."""
    perturbed = PAG(1.0, layers=layers, target=target).perturbed_layers(PipelineNetwork(unet))
    with torch.no_grad(), perturb_attention(perturbed, None):
        return unet(z, t, encoder_hidden_states=text).sample


def by_hand(network, layers, scale, *, cfg="second", **unused):
    """A forward of the network with equation 14 written out: two whole passes, the second perturbed."""
    forward = type(network).forward

    @torch.no_grad()
    def run(*args, **kwargs):
        out = forward(network, *args, **kwargs)[0]
        perturbed = PAG(1.0, layers=layers, **unused).perturbed_layers(PipelineNetwork(network))
        with perturb_attention(perturbed, None, network):
            weak = forward(network, *args, **kwargs)[0]
        shift = scale * (out - weak)
        if cfg != "all":
            shift = torch.cat([shift.chunk(2)[cfg == "second"]] * 2)
        return (out + shift,) if not kwargs.get("return_dict", True) else Transformer2DModelOutput(sample=out + shift)

    return run


class Identity:
    """A processor under which every token attends to itself alone."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states)))


def by_processor(network, paths, scale, *, rows=slice(None), processor=None):
    """A forward of the network with equation 14 written out: two whole passes with arguments of their own, the second
    with hand-written processors in the layers at `paths`; the shift of `rows` in all parts of the batch."""
    forward = type(network).forward
    layers = [network.get_submodule(path) for path in paths]

    def copied(values):
        return tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, values)

    @torch.no_grad()
    def run(*args, **kwargs):
        passes = [copied((args, kwargs)) for _ in range(2)]
        out = forward(network, *passes[0][0], **passes[0][1])
        true = [layer.processor for layer in layers]
        for layer in layers:
            layer.set_processor(processor or Identity())
        weak = forward(network, *passes[1][0], **passes[1][1])[0]
        for layer, own in zip(layers, true, strict=True):
            layer.set_processor(own)
        shift = (scale * (out[0] - weak))[rows]
        moved = out[0] + torch.cat([shift] * (len(weak) // len(shift)))
        return (moved,) if isinstance(out, tuple) else type(out)(sample=moved)

    return run
