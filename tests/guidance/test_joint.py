"""What a target is told (grid, image tokens), and joint attention of image and text tokens against explicit maps."""

from __future__ import annotations

import pytest
import tiny_flow
import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxIPAdapterAttnProcessor
from tiny_sd import tiny_unet
from torch import nn

from operators import RestoreError
from restore.backbones.adm import ADM
from restore.backbones.attention_layers import find_attention_layers
from restore.backbones.base import AttentionLayer
from restore.guidance import PAG
from restore.guidance.attention import PerturbedLayer, perturb_attention
from restore.guidance.pipelines import PipelineNetwork
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
    with perturb_attention([PerturbedLayer(layer, target, 1.0, heads, scope)], None):
        got = run()
    chosen = range(HEADS) if heads is None else heads
    for ours, theirs in zip(got, explicit(attn, image, text, chosen, scope, target, make is flux), strict=True):
        assert relative(ours, theirs) < 1e-5
    assert relative(got[0], true[0]) > 1e-2
    assert (scope == "image") == torch.equal(got[1], true[1])
    assert all(torch.equal(a, b) for a, b in zip(run(), true, strict=True))


@torch.no_grad()
def test_an_image_prompt_beside_joint_attention():
    """FLUX's IP-Adapter attends once more, to the image prompt: that attention stays as it is."""
    attn = flux()
    attn.set_processor(FluxIPAdapterAttnProcessor(WIDTH, WIDTH, num_tokens=(3,)))
    image, text, prompt = torch.randn(2, IMAGE, WIDTH), torch.randn(2, TEXT, WIDTH), torch.randn(2, 1, 3, WIDTH)
    layer = AttentionLayer("transformer_blocks.0.attn", "", "", attn, HEADS, WIDTH, 1)

    def run():
        return attn(image, encoder_hidden_states=text, image_rotary_emb=rotary(), ip_hidden_states=[prompt[:, 0]])

    true = run()
    with perturb_attention([PerturbedLayer(layer, identity, scope="image")], None):
        image_out, text_out, prompt_out = run()
    assert torch.equal(prompt_out, true[2]) and torch.equal(text_out, true[1])
    assert relative(image_out, attn.to_out[0](attn.to_v(image))) < 1e-5 and relative(image_out, true[0]) > 1e-2


def test_a_joint_attention_that_is_not_known_is_refused():
    class Other(JointAttnProcessor2_0):
        pass

    attn = sd3()
    attn.set_processor(Other())
    layer = AttentionLayer("blocks.0.attn", "", "", attn, HEADS, WIDTH, 1)
    with pytest.raises(RestoreError, match=r"joint attention blocks\.0\.attn .* got Other"):
        with perturb_attention([PerturbedLayer(layer, identity, scope="image")], None):
            attn(torch.randn(1, IMAGE, WIDTH), torch.randn(1, TEXT, WIDTH))


def records(backbone, layers, *inputs, **more):
    """The grids and image tokens that a target is told, by layer in order of execution."""
    told = []

    def target(a):
        told.append((a.grid, a.image, a.q.shape[-2]))
        return a.v

    perturbed = PAG(1.0, layers, target=target).perturbed_layers(backbone)
    with torch.no_grad(), perturb_attention(perturbed, None, backbone.network):
        backbone.network(*inputs, **more)
    return told


def test_grid_of_a_pixel_network(tiny_adm):
    model = ADM.load(tiny_adm)
    assert records(model, "m1", torch.zeros(1, 3, 16, 24), 1) == [((8, 12), None, 96)]


def test_grid_of_transformer_blocks():
    """Their tokens are a list; the rows and columns are those of the feature map around them."""
    unet = tiny_unet()
    text = torch.zeros(1, 12, 16)
    told = records(PipelineNetwork(unet), "i1,i5,m1,o8", torch.zeros(1, 4, 8, 16), 1, encoder_hidden_states=text)
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


class Explicit:
    """A processor that makes every map in full and exchanges the chosen ones by the identity: what the perturbed
    networks are compared with. order: of the tokens, with their numbers; of them `rows` are exchanged."""

    def __init__(self, heads, rows, text_first=False):
        self.heads, self.rows, self.text_first = heads, rows, text_first

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **unused
    ):
        def split(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def normed(x, name):
            norm = getattr(attn, name, None)
            return x if norm is None else norm(x)

        text, n = encoder_hidden_states, hidden_states.shape[1]
        q, k, v = (split(to(hidden_states)) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k = normed(q, "norm_q"), normed(k, "norm_k")
        if text is not None:
            tq, tk, tv = (split(to(text)) for to in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
            tq, tk = normed(tq, "norm_added_q"), normed(tk, "norm_added_k")
            pairs = ((q, tq), (k, tk), (v, tv))
            q, k, v = (torch.cat([b, a] if self.text_first else [a, b], dim=2) for a, b in pairs)
        if image_rotary_emb is not None:
            q, k = (turned(x, *image_rotary_emb) for x in (q, k))
        maps = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        for h in self.heads:
            for i in self.rows:
                maps[:, h, i] = torch.eye(maps.shape[-1])[i]
        out = (maps @ v).transpose(1, 2).flatten(2)
        if text is None:
            return attn.to_out[0](out) if hasattr(attn, "to_out") else out
        first = text.shape[1] if self.text_first else 0
        image_out, text_out = out[:, first : first + n], out[:, :first] if self.text_first else out[:, n:]
        return attn.to_out[0](image_out), text_out if attn.context_pre_only else attn.to_add_out(text_out)


GRID = (2, 3)
CASES = [  # (network, layer, number of text tokens in its sequence, whether they come first)
    ("sd3", "b0", TEXT, False),
    ("sd3", "b1", TEXT, False),
    ("sd3.5", "b0", TEXT, False),
    ("sd3.5", "b0.2", 0, False),
    ("flux", "b1", TEXT, True),
    ("flux", "b2", TEXT, True),
    ("flux", "b3", TEXT, True),
    ("dit", "b1", 0, False),
]


def network_of(name):
    """(a tiny network, what to call it with on an image of GRID tokens)."""
    g = torch.Generator().manual_seed(3)
    h, w = (4, 4) if name == "dit" else (2 * side for side in GRID)
    x = torch.randn(2, 4, h, w, generator=g)
    text = torch.randn(2, TEXT, tiny_flow.TEXT, generator=g)
    pooled = torch.randn(2, tiny_flow.POOLED, generator=g)
    time = torch.tensor([300.0, 700.0])
    if name == "dit":
        return tiny_flow.tiny_dit(), {"hidden_states": x, "timestep": time, "class_labels": torch.tensor([1, 2])}
    given = {"encoder_hidden_states": text, "pooled_projections": pooled, "timestep": time}
    if name != "flux":
        return tiny_flow.tiny_sd3(name == "sd3.5"), {"hidden_states": x, **given}
    ids = torch.tensor([[0, i, j] for i in range(GRID[0]) for j in range(GRID[1])]).float()
    packed = {"hidden_states": nn.functional.pixel_unshuffle(x, 2).flatten(2).mT, "img_ids": ids}
    return tiny_flow.tiny_flux(), {**given, **packed, "timestep": time / 1000, "txt_ids": torch.zeros(TEXT, 3)}


@torch.no_grad()
@pytest.mark.parametrize("name, short, text, text_first", CASES)
@pytest.mark.parametrize("scope", ["joint", "image"])
@pytest.mark.parametrize("head", [None, 2])
def test_identity_in_whole_networks(name, short, text, text_first, scope, head):
    """A whole layer, or one head, of SD3, SD3.5, FLUX (double and single blocks) and DiT."""
    network, given = network_of(name)
    layer = next(layer for layer in find_attention_layers(network).values() if layer.short == short)
    true = network(**given).sample
    image = 4 if name == "dit" else GRID[0] * GRID[1]
    first = text if text_first else 0
    rows = range(image + text) if scope == "joint" else range(first, first + image)
    processor = layer.module.processor
    layer.module.set_processor(Explicit((), rows, text_first))
    assert relative(network(**given).sample, true) < 1e-5
    layer.module.set_processor(Explicit(range(HEADS) if head is None else [head], rows, text_first))
    expected = network(**given).sample
    layer.module.set_processor(processor)
    item = PerturbedLayer(layer, identity, 1.0, None if head is None else (head,), scope)
    with perturb_attention([item], None, network):
        got = network(**given).sample
    assert relative(got, expected) < 1e-5
    assert relative(got, true) > 1e-3
    assert layer.module.processor is processor and torch.equal(network(**given).sample, true)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3.5", "flux", "dit"])
def test_records_of_targets_in_whole_networks_and_restoration_of_the_network(name):
    """Grid and image tokens of every layer; an exception leaves every processor and forward as it was."""
    network, given = network_of(name)
    layers, told = find_attention_layers(network), []
    processors = [layer.module.processor for layer in layers.values()]

    def target(a):
        told.append((a.grid, a.image))
        if len(told) == len(layers):
            raise KeyError("of the target")
        return a.v

    class Backbone:
        attention = layers

    Backbone.network = network
    true = network(**given).sample
    perturbed = PAG(1.0, list(layers), target=target).perturbed_layers(Backbone)
    with pytest.raises(KeyError), perturb_attention(perturbed, None, network):
        network(**given)
    assert [layer.module.processor for layer in layers.values()] == processors
    assert not any("forward" in module.__dict__ for module in network.modules())
    assert torch.equal(network(**given).sample, true)
    n = GRID[0] * GRID[1]
    image = {"dit": None, "flux": slice(TEXT, TEXT + n), "sd3.5": slice(0, n)}[name]
    grid = (2, 2) if name == "dit" else GRID
    assert told == [(grid, None if layer.short == "b0.2" else image) for layer in layers.values()]
