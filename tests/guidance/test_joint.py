"""What a target is told (grid, image tokens), and joint attention of image and text tokens against explicit maps."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention
from tiny_sd import tiny_unet
from torch import nn

from operators import RestoreError
from restore.backbones.adm import ADM
from restore.backbones.base import AttentionLayer
from restore.guidance import PAG
from restore.guidance.attention import Perturbed, perturbed
from restore.guidance.pipelines import PipelineUnet
from restore.guidance.targets import identity, mean_query, uniform

IMAGE, TEXT, HEADS, WIDTH = 6, 4, 4, 32


def relative(a, b):
    return float(torch.linalg.norm(a.detach() - b) / torch.linalg.norm(b))


def sd3():
    """Stable Diffusion 3's joint attention: [image, text]."""
    torch.manual_seed(0)
    return Attention(
        WIDTH,
        heads=HEADS,
        dim_head=WIDTH // HEADS,
        added_kv_proj_dim=WIDTH,
        context_pre_only=False,
        qk_norm="rms_norm",
        processor=JointAttnProcessor2_0(),
    ).eval()


def flux():
    """FLUX's: [text, image], with rotary embeddings."""
    torch.manual_seed(0)
    return FluxAttention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS, added_kv_proj_dim=WIDTH, bias=True).eval()


def rotary():
    angles = torch.outer(torch.arange(IMAGE + TEXT).float(), torch.tensor([1.0, 0.3, 0.1, 0.03])).repeat_interleave(
        2, 1
    )
    return angles.cos(), angles.sin()


def turned(x, cos, sin):
    pairs = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos + pairs * sin


def explicit(attn, image, text, heads, scope, target, text_first):
    """Joint attention with the maps made in full, the chosen ones exchanged; (image out, text out)."""

    def split(x):
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def joined(a, b):
        return torch.cat([b, a] if text_first else [a, b], dim=-2)

    q = joined(attn.norm_q(split(attn.to_q(image))), attn.norm_added_q(split(attn.add_q_proj(text))))
    k = joined(attn.norm_k(split(attn.to_k(image))), attn.norm_added_k(split(attn.add_k_proj(text))))
    v = joined(split(attn.to_v(image)), split(attn.add_v_proj(text)))
    if text_first:
        q, k = (turned(x, *rotary()) for x in (q, k))
    maps = (q @ k.transpose(-2, -1) / (WIDTH // HEADS) ** 0.5).softmax(-1)
    first = TEXT if text_first else 0
    rows = range(IMAGE + TEXT) if scope == "joint" else range(first, first + IMAGE)
    for h in heads:
        for i in rows:
            row = torch.zeros(IMAGE + TEXT)
            if target is identity:
                row[i] = 1
            elif target is uniform:
                row[list(rows)] = 1 / len(rows)
            else:
                mean = q[:, h, list(rows)].mean(1)
                logits = torch.einsum("bd,bnd->bn", mean, k[:, h, list(rows)]) / (WIDTH // HEADS) ** 0.5
                row = torch.zeros(len(q), IMAGE + TEXT).index_copy(1, torch.tensor(list(rows)), logits.softmax(-1))
            maps[:, h, i] = row
    out = (maps @ v).transpose(1, 2).flatten(2)
    image_out, text_out = out[:, first : first + IMAGE], out[:, :TEXT] if text_first else out[:, IMAGE:]
    return attn.to_out[0](image_out), attn.to_add_out(text_out)


@torch.no_grad()
@pytest.mark.parametrize("make", [sd3, flux])
@pytest.mark.parametrize("target", [identity, uniform, mean_query])
@pytest.mark.parametrize("scope", ["joint", "image"])
@pytest.mark.parametrize("heads", [None, (0, 2)])
def test_joint_attention(make, target, scope, heads):
    attn = make()
    image, text = torch.randn(2, IMAGE, WIDTH), torch.randn(2, TEXT, WIDTH)
    more = {"image_rotary_emb": rotary()} if make is flux else {}
    layer = AttentionLayer("transformer_blocks.0.attn", "", "", attn, HEADS, WIDTH, 1)

    def run():
        return attn(hidden_states=image, encoder_hidden_states=text, **more)

    true = run()
    for ours, theirs in zip(true, explicit(attn, image, text, (), scope, target, make is flux), strict=True):
        assert relative(ours, theirs) < 1e-5
    with perturbed([Perturbed(layer, target, 1.0, heads, scope)], None):
        got = run()
    chosen = range(HEADS) if heads is None else heads
    for ours, theirs in zip(got, explicit(attn, image, text, chosen, scope, target, make is flux), strict=True):
        assert relative(ours, theirs) < 1e-5
    assert relative(got[0], true[0]) > 1e-2
    assert (scope == "image") == torch.equal(got[1], true[1])
    assert all(torch.equal(a, b) for a, b in zip(run(), true, strict=True))


def test_a_joint_attention_that_is_not_known_is_refused():
    class Other(JointAttnProcessor2_0):
        pass

    attn = sd3()
    attn.set_processor(Other())
    layer = AttentionLayer("blocks.0.attn", "", "", attn, HEADS, WIDTH, 1)
    with pytest.raises(RestoreError, match=r"blocks\.0\.attn attends to image and text jointly.*\(Other\)"):
        with perturbed([Perturbed(layer, identity, scope="image")], None):
            attn(torch.randn(1, IMAGE, WIDTH), torch.randn(1, TEXT, WIDTH))


def records(backbone, layers, *inputs, **more):
    """The grids and image tokens that a target is told, by layer in order of execution."""
    told = []

    def target(a):
        told.append((a.grid, a.image, a.q.shape[-2]))
        return a.v

    branch = PAG(1.0, layers, target=target).terms[0].branch.bind(backbone)
    with torch.no_grad(), perturbed(branch.items, None, backbone.network):
        backbone.network(*inputs, **more)
    return told


def test_grid_of_a_pixel_network(tiny_adm):
    model = ADM.load(tiny_adm)
    assert records(model, "m1", torch.zeros(1, 3, 16, 24), 1) == [((8, 12), None, 96)]


def test_grid_of_transformer_blocks():
    """Their tokens are a list; the rows and columns are those of the feature map around them."""
    unet = tiny_unet()
    text = torch.zeros(1, 12, 16)
    told = records(PipelineUnet(unet), "i1,i5,m1,o8", torch.zeros(1, 4, 8, 16), 1, encoder_hidden_states=text)
    assert told == [((8, 16), None, 128), ((4, 8), None, 32), ((2, 4), None, 8), ((8, 16), None, 128)]


class Patches(nn.Module):
    """A transformer that cuts its input into patches of 2 x 2, as SD3's does."""

    def __init__(self, patch=2):
        super().__init__()
        self.cut, self.block = nn.Conv2d(4, WIDTH, patch, patch), nn.ModuleList([sd3()])

    def forward(self, x, text):
        return self.block[0](self.cut(x).flatten(2).transpose(1, 2), encoder_hidden_states=text)


@pytest.mark.parametrize("size, grid", [((4, 6), (2, 3)), ((8, 4), (4, 2))])
def test_grid_of_patches_and_image_tokens(size, grid):
    network = Patches()
    attn = network.block[0]

    class Backbone:
        attention = {"block.0": AttentionLayer("block.0", "", "b0", attn, HEADS, WIDTH, 2)}

    Backbone.network = network
    n = grid[0] * grid[1]
    told = records(Backbone, "b0", torch.zeros(1, 4, *size), torch.zeros(1, TEXT, WIDTH))
    assert told == [(grid, slice(0, n), n + TEXT)]
