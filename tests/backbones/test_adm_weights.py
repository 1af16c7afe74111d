"""The conversion of guided-diffusion weights, against the published configurations and against an
interpreter of state dicts written from the description of the network (Dhariwal & Nichol 2021)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from operators import RestoreError
from restore.backbones import adm_weights
from restore.backbones.adm import ADM
from restore.backbones.attention_layers import find_attention_layers

GOLDEN = Path(__file__).parent.parent / "golden"
MODELS = json.loads((GOLDEN / "adm_manifest.json").read_text())["models"]


def relative(a, b):
    return float(torch.linalg.norm(a.detach() - b) / torch.linalg.norm(b))


def interpret(s, x, t, y, heads, order):
    """Forward pass of a guided-diffusion state dict; heads: function of the layer's channels."""

    def affine(name, h):
        weight, bias = s[name + ".weight"], s[name + ".bias"]
        if weight.ndim == 1:
            return F.group_norm(h, 32, weight, bias, 1e-5)
        return (
            F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2) if weight.ndim == 4 else F.linear(h, weight, bias)
        )

    def resnet(p, h, resize=None):
        skip, h = h, F.silu(affine(f"{p}.in_layers.0", h))
        if resize is not None:
            skip, h = resize(skip), resize(h)
        h = affine(f"{p}.in_layers.2", h)
        e = affine(f"{p}.emb_layers.1", F.silu(emb))[..., None, None]
        if e.shape[1] == 2 * h.shape[1]:
            scale, shift = e.chunk(2, dim=1)
            h = affine(f"{p}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = affine(f"{p}.out_layers.0", h + e)
        h = affine(f"{p}.out_layers.3", F.silu(h))
        return h + (affine(f"{p}.skip_connection", skip) if f"{p}.skip_connection.weight" in s else skip)

    def attention(p, h):
        b, c, *size = h.shape
        n = heads(c)
        qkv = F.conv1d(affine(f"{p}.norm", h).flatten(2), s[f"{p}.qkv.weight"], s[f"{p}.qkv.bias"])
        if order == "legacy":
            q, k, v = qkv.reshape(b * n, 3 * c // n, -1).split(c // n, dim=1)
        else:
            q, k, v = (part.reshape(b * n, c // n, -1) for part in qkv.chunk(3, dim=1))
        a = torch.einsum("bct,bcs->bts", q, k).div(math.sqrt(c // n)).softmax(-1)
        out = torch.einsum("bts,bcs->bct", a, v).reshape(b, c, -1)
        return h + F.conv1d(out, s[f"{p}.proj_out.weight"], s[f"{p}.proj_out.bias"]).view(b, c, *size)

    def up(h):
        return F.interpolate(h, scale_factor=2, mode="nearest")

    def down(h):
        return F.avg_pool2d(h, 2)

    base = s["time_embed.0.weight"].shape[1]
    f = torch.exp(-math.log(10000) * torch.arange(base // 2) / (base // 2))
    args = t[:, None].float() * f
    emb = affine("time_embed.2", F.silu(affine("time_embed.0", torch.cat([args.cos(), args.sin()], dim=1))))
    if y is not None:
        emb = emb + s["label_emb.weight"][y]
    blocks = {side: 1 + max(int(n.split(".")[1]) for n in s if n.startswith(side)) for side in ("input", "output")}
    ups = sum(f"output_blocks.{n}.{i}.in_layers.0.weight" in s for n in range(blocks["output"]) for i in (1, 2))
    ups += sum(f"output_blocks.{n}.{i}.conv.weight" in s for n in range(blocks["output"]) for i in (1, 2))
    per_level = blocks["input"] // (ups + 1)
    h = affine("input_blocks.0.0", x)
    hs = [h]
    for n in range(1, blocks["input"]):
        p = f"input_blocks.{n}"
        if f"{p}.0.op.weight" in s:
            h = F.conv2d(h, s[f"{p}.0.op.weight"], s[f"{p}.0.op.bias"], stride=2, padding=1)
        else:
            h = resnet(f"{p}.0", h, down if n % per_level == 0 else None)
        if f"{p}.1.qkv.weight" in s:
            h = attention(f"{p}.1", h)
        hs.append(h)
    h = resnet("middle_block.2", attention("middle_block.1", resnet("middle_block.0", h)))
    for n in range(blocks["output"]):
        p = f"output_blocks.{n}"
        h = resnet(f"{p}.0", torch.cat([h, hs.pop()], dim=1))
        for i in (1, 2):
            if f"{p}.{i}.qkv.weight" in s:
                h = attention(f"{p}.{i}", h)
            elif f"{p}.{i}.in_layers.0.weight" in s:
                h = resnet(f"{p}.{i}", h, up)
            elif f"{p}.{i}.conv.weight" in s:
                h = affine(f"{p}.{i}.conv", up(h))
    return affine("out.2", F.silu(affine("out.0", h)))


def make_state(base, mult, depth, attention, updown, scale_shift, classes=None, out=6, seed=0):
    """A random guided-diffusion state dict; attention: levels that have it."""
    generator = torch.Generator().manual_seed(seed)
    s = {}

    def add(name, rows, cols=None, *kernel):
        if cols is None:
            s[name + ".weight"] = 1 + 0.2 * torch.randn(rows, generator=generator)
        else:
            fan = cols * math.prod(kernel)
            s[name + ".weight"] = torch.randn(rows, cols, *kernel, generator=generator) / fan**0.5
        s[name + ".bias"] = 0.05 * torch.randn(rows, generator=generator)

    def resnet(p, cin, cout):
        add(f"{p}.in_layers.0", cin)
        add(f"{p}.in_layers.2", cout, cin, 3, 3)
        add(f"{p}.emb_layers.1", cout * (1 + scale_shift), 4 * base)
        add(f"{p}.out_layers.0", cout)
        add(f"{p}.out_layers.3", cout, cout, 3, 3)
        if cin != cout:
            add(f"{p}.skip_connection", cout, cin, 1, 1)

    def attend(p, c):
        add(f"{p}.norm", c)
        add(f"{p}.qkv", 3 * c, c, 1)
        add(f"{p}.proj_out", c, c, 1)

    add("time_embed.0", 4 * base, base)
    add("time_embed.2", 4 * base, 4 * base)
    if classes:
        s["label_emb.weight"] = torch.randn(classes, 4 * base, generator=generator)
    channels = [int(base * m) for m in mult]
    add("input_blocks.0.0", channels[0], 3, 3, 3)
    n, c, skips = 1, channels[0], [channels[0]]
    for level, width in enumerate(channels):
        for _ in range(depth):
            resnet(f"input_blocks.{n}.0", c, width)
            if level in attention:
                attend(f"input_blocks.{n}.1", width)
            c, n = width, n + 1
            skips.append(c)
        if level < len(channels) - 1:
            if updown:
                resnet(f"input_blocks.{n}.0", c, c)
            else:
                add(f"input_blocks.{n}.0.op", c, c, 3, 3)
            skips.append(c)
            n += 1
    resnet("middle_block.0", c, c)
    attend("middle_block.1", c)
    resnet("middle_block.2", c, c)
    n = 0
    for level in reversed(range(len(channels))):
        for j in range(depth + 1):
            resnet(f"output_blocks.{n}.0", c + skips.pop(), channels[level])
            c, i = channels[level], 1
            if level in attention:
                attend(f"output_blocks.{n}.1", c)
                i = 2
            if level and j == depth:
                if updown:
                    resnet(f"output_blocks.{n}.{i}", c, c)
                else:
                    add(f"output_blocks.{n}.{i}.conv", c, c, 3, 3)
            n += 1
    add("out.0", c)
    add("out.2", out, c, 3, 3)
    return s


# name: (make_state arguments, head options, attention order)
VARIANTS = {
    "first_multiplier_half": ((64, (0.5, 1, 2), 1, {1, 2}, True, True), {"head_channels": 32}, "legacy"),
    "fixed_heads": ((32, (1, 2, 3), 1, {1, 2}, True, True), {"heads": 4}, "legacy"),
    "fixed_heads_new_order": ((32, (1, 2, 4), 1, {0, 2}, True, True), {"heads": 2}, "new"),
    "both_exceptions_with_classes": ((64, (0.5, 1, 3), 2, {1}, True, True, 7), {"heads": 4}, "legacy"),
    "plain_convolutions": ((32, (1, 2), 2, {1}, False, True), {"head_channels": 32}, "legacy"),
    "no_scale_shift_no_variance": ((32, (1, 1, 2), 1, {2}, False, False, None, 3), {"head_channels": 16}, "legacy"),
    "attention_in_the_middle_only": ((32, (1, 2), 1, set(), True, False), {"head_channels": 64}, "new"),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    arguments, heads, order = VARIANTS[request.param]
    state = make_state(*arguments)
    path = tmp_path_factory.mktemp("adm") / "model.pt"
    torch.save(state, path)
    return state, ADM.load(path, attention_order=order, **heads), heads, order


def run(model, x, t, y):
    with torch.no_grad():
        prediction = model.predict(x, t, y)
    return prediction.eps if prediction.variance is None else torch.cat([prediction.eps, prediction.variance], 1)


@pytest.mark.parametrize("name, order", [("a", "legacy"), ("b", "legacy"), ("c", "new")])
def test_interpreter_agrees_with_the_official_network(name, order):
    state = {k: v.float() for k, v in load_file(GOLDEN / f"nets/adm_{name}.safetensors").items()}
    golden = load_file(GOLDEN / f"adm_forward_adm_{name}.safetensors")
    out = interpret(state, golden["x"], golden["t"], golden.get("y"), lambda c: c // 16, order)
    assert relative(out, golden["out"]) < 1e-5


def test_variants_agree_with_the_interpreter(variant):
    state, model, heads, order = variant
    x = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([7, 640])
    y = torch.tensor([3, 6]) if model.classes else None
    count = (lambda c: heads["heads"]) if "heads" in heads else (lambda c: c // heads["head_channels"])
    assert relative(run(model, x, t, y), interpret(state, x, t, y, count, order)) < 1e-5


def test_saved_variants_load_bit_equal(variant, tmp_path):
    _, model, _, _ = variant
    model.save(tmp_path / "model")
    again = ADM.load(tmp_path / "model")
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    y = 3 if model.classes else None
    assert torch.equal(run(model, x, 250, y), run(again, x, 250, y))
    assert [(k, v.heads, v.paper) for k, v in again.attention.items()] == [
        (k, v.heads, v.paper) for k, v in model.attention.items()
    ]
    assert again.resolution == model.resolution and again.multiple == model.multiple


def test_head_count_matters(variant, tmp_path):
    """The head options reach the network: another number gives another output."""
    state, model, heads, order = variant
    torch.save(state, tmp_path / "model.pt")
    other = {k: v // 2 for k, v in heads.items()}
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    y = 3 if model.classes else None
    changed = ADM.load(tmp_path / "model.pt", attention_order=order, **other)
    assert relative(run(changed, x, 100, y), run(model, x, 100, y)) > 1e-4


def shapes_of(name):
    return {key: tuple(shape) for key, shape in MODELS[name]["state_dict"].items()}


def convert(shapes, **options):
    """The network of tensors without values; loading is strict, so every name and shape is checked."""
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return adm_weights.convert_state(state, Path("model.pt"), **options)


@pytest.mark.parametrize("name", MODELS)
def test_published_configurations_convert(name):
    shapes, expected = shapes_of(name), MODELS[name]
    order = "new" if expected["config"].get("use_new_attention_order") else "legacy"
    network = convert(shapes, order=order)
    assert sum(math.prod(shape) for shape in shapes.values()) == sum(v.numel() for v in network.state_dict().values())
    layers = find_attention_layers(network)
    found = [(layer.paper, layer.channels, layer.heads) for layer in layers.values()]
    assert found == [(a["name"], a["channels"], a["num_heads"]) for a in expected["attention_layers"]]
    resolution = expected["config"]["image_size"]
    assert [resolution // layer.downsampling for layer in layers.values()] == [
        a["resolution"] for a in expected["attention_layers"]
    ]
    assert network.config.num_class_embeds == (1000 if expected["config"]["class_cond"] else None)
    assert network.config.sample_size == resolution


def test_ffhq_short_names():
    layers = find_attention_layers(convert(shapes_of("dps_ffhq_10m")))
    assert [(layer.short, layer.path) for layer in layers.values()] == [
        ("i9", "down_blocks.4.attentions.0"),
        ("m1", "mid_block.attentions.0"),
        ("o2", "up_blocks.1.attentions.0"),
        ("o3", "up_blocks.1.attentions.1"),
    ]


def test_error_names_first_missing_and_unexpected_weights():
    shapes = shapes_of("dps_ffhq_10m")
    del shapes["output_blocks.4.0.skip_connection.bias"]
    shapes["input_blocks.3.1.proj_out.bias"] = (128,)
    with pytest.raises(RestoreError, match=r"output_blocks\.4\.0\.skip_connection\.bias.*input_blocks\.3\.1\.proj_out"):
        convert(shapes)


@pytest.mark.parametrize(
    "name, shape, match",
    [
        (
            "input_blocks.4.0.in_layers.2.weight",
            (128, 64, 3, 3),
            r"input_blocks\.4\.0\.in_layers\.2\.weight.*got \(128, 64, 3, 3\)",
        ),
        ("input_blocks.9.1.qkv.weight", (1530, 512, 1), r"input_blocks\.9\.1\.qkv\.weight.*1530 rows"),
    ],
)
def test_error_names_wrong_shape(name, shape, match):
    with pytest.raises(RestoreError, match=match):
        convert(shapes_of("dps_ffhq_10m") | {name: shape})


def test_missing_block_is_refused():
    shapes = {k: v for k, v in shapes_of("dps_ffhq_10m").items() if not k.startswith("output_blocks.11.")}
    with pytest.raises(RestoreError, match="not a complete guided-diffusion U-Net.*output blocks"):
        convert(shapes)


def test_error_names_first_tensor_of_another_network():
    with pytest.raises(RestoreError, match=r"no 'time_embed\.0\.weight' \(its first tensor is 'conv_in\.weight'\)"):
        adm_weights.infer_config({"conv_in.weight": (64, 3, 3, 3)})


@pytest.mark.parametrize(
    "options", [{"heads": 7}, {"head_channels": 48}, {"heads": 0}, {"heads": 4, "head_channels": 64}]
)
def test_impossible_heads(options):
    with pytest.raises(RestoreError, match="head"):
        convert(shapes_of("dps_ffhq_10m"), **options)
