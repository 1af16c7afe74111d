"""PAG in Chroma, FLUX.2, QwenImage, AuraFlow, PixArt, Sana and HunyuanDiT, against attention written by hand; others
are refused by name."""

from __future__ import annotations

import diffusers
import pytest
import torch
from pipelines_by_hand import by_processor, quiet, relative, sample
from tiny_transformers import ByHand, linear_map, make_case, make_pipeline, sana

from operators import RestoreError
from restore.backbones.attention_layers import find_attention_layers
from restore.guidance import PAG, TPG, TSG
from restore.guidance.attention import PerturbedLayer, perturb_attention
from restore.guidance.pipelines import guided
from restore.guidance.targets import identity, temperature, uniform

NAMES = ["chroma", "flux2", "qwenimage", "auraflow", "pixart", "sana", "hunyuandit"]


def path_of(network, short):
    return next(layer for layer in find_attention_layers(network).values() if layer.short == short)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_equation_14_and_times(name):
    """Each layer; the interval is in the scheduler's times, 0 to 1000, whatever the network counts in."""
    case = make_case(name)
    network, call = case.network, case.call
    plain = network(**call).sample
    assert [layer.short for layer in find_attention_layers(network).values()] == list(case.layers)
    for short in case.layers:
        with guided(network, PAG(3.0, layers=short)):
            ours = [network(**call).sample for _ in range(2)]
        network.forward = by_processor(network, [path_of(network, short).path], 3.0, processor=ByHand())
        expected = network(**call).sample
        del network.forward
        if expected.ndim == 4 and expected.shape[1] == 2 * call["hidden_states"].shape[1]:  # a variance is not guided
            expected = torch.cat([expected.chunk(2, 1)[0], plain.chunk(2, 1)[1]], dim=1)
        assert all(relative(got, expected) < 1e-4 for got in ours) and relative(expected, plain) > 1e-3
        for interval, acts in (((1000, 599), True), ((601, 599.5), True), ((599, 0), False), ((1000, 601), False)):
            with guided(network, PAG(3.0, layers=short, interval=interval)):
                assert torch.equal(network(**call).sample, plain) != acts
    assert torch.equal(network(**call).sample, plain)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scope", ["joint", "image"])
def test_tokens_of_image_and_text(name, scope):
    """What a target is told of the tokens; with scope="image" the text's outputs are the network's own."""
    case, told = make_case(name), []
    network, image = case.network, case.grid[0] * case.grid[1]

    def target(a):
        told.append((a.grid, a.image, a.q.shape[-2]))
        return a.v

    for short in case.layers:
        layer, outputs = path_of(network, short), []
        handle = layer.module.register_forward_hook(lambda module, args, out, outputs=outputs: outputs.append(out))
        network(**case.call)
        with perturb_attention([PerturbedLayer(layer, target, scope=scope)], None, network):
            network(**case.call)
        handle.remove()
        true, weak = outputs
        split = isinstance(true, tuple)
        text_true, text_weak = (out[1] if split else out[:, : case.text] for out in (true, weak))
        image_true, image_weak = (out[0] if split else out[:, case.text :] for out in (true, weak))
        assert relative(image_weak, image_true) > 1e-3
        if case.text:
            assert torch.equal(text_weak, text_true) == (scope == "image")
    tokens = slice(case.text, case.text + image) if case.text else None
    whole = (case.grid, tokens, image + case.text)
    assert told == [(case.grid, None, image) if scope == "image" and case.text else whole] * len(case.layers)


@torch.no_grad()
@pytest.mark.parametrize("heads", [None, (0, 2)])
@pytest.mark.parametrize("target", ["identity", "uniform", "temperature"])
def test_linear_attention_of_sana(target, heads):
    """It has no softmax: its map is relu(q) relu(k)^T with rows of sum one, and targets act on that."""
    case = make_case("sana")
    layer, inputs, outputs = path_of(case.network, "b1"), [], []
    handles = [
        layer.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0])),
        layer.module.register_forward_hook(lambda module, args, out: outputs.append(out)),
    ]
    case.network(**case.call)
    act = {"identity": identity, "uniform": uniform, "temperature": temperature(2.0)}[target]
    with perturb_attention([PerturbedLayer(layer, act, heads=heads)], None, case.network):
        case.network(**case.call)
    for handle in handles:
        handle.remove()
    attn, x = layer.module, inputs[0]
    maps, value = linear_map(attn, x), attn.to_v(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    def projected(maps):
        return attn.to_out[0]((maps @ value).transpose(1, 2).flatten(2))

    assert relative(projected(maps), outputs[0]) < 1e-4
    n = maps.shape[-1]
    root = torch.where(maps.sum(-1, keepdim=True) > 0, maps, 1.0).sqrt()
    root = root / root.sum(-1, keepdim=True)
    changed = {"identity": torch.eye(n).expand_as(maps), "uniform": torch.full_like(maps, 1 / n), "temperature": root}
    for head in range(attn.heads) if heads is None else heads:
        maps[:, head] = changed[target][:, head]
    assert relative(outputs[1], projected(maps)) < 1e-4 and relative(outputs[1], outputs[0]) > 1e-3


@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("name", ["chroma", "flux2", "qwenimage", "auraflow", "pixart", "sana"])
def test_pipelines(name, cfg):
    """End to end: u + g (c − u) + s (c − c_weak), in one batch or in two calls, the first with the prompt."""
    pipe, options, with_cfg = make_pipeline(name)
    if cfg and with_cfg is None:
        pytest.skip("it has no classifier-free guidance")
    pipe, options = quiet(pipe), {"guidance_scale": None, **(with_cfg if cfg else options)}
    options = {key: value for key, value in options.items() if value is not None or key.endswith("prompt")}
    plain = sample(pipe, **options)
    with guided(pipe, PAG(2.0, layers="b1")):
        ours = sample(pipe, **options)
    with guided(pipe, PAG(2.0, layers="b1", interval=(1000, 999))):
        assert relative(sample(pipe, **options), plain) > 1e-4  # the first step
    with guided(pipe, PAG(2.0, layers="b1", interval=(0.5, 0))):
        assert torch.equal(sample(pipe, **options), plain)
    network, pairs = pipe.transformer, cfg and name in ("chroma", "qwenimage")
    rows = slice(1, None) if cfg and not pairs else slice(None)
    alone = by_processor(network, [path_of(network, "b1").path], 2.0, rows=rows, processor=ByHand())
    calls = []

    def paired(*args, **kwargs):
        true = type(network).forward(network, *args, **kwargs)[0]
        if len(calls) % 2 == 0:
            paired.shift = alone(*args, **kwargs)[0] - true
        calls.append(kwargs)
        return (true + paired.shift,)

    network.forward = paired if pairs else alone
    assert relative(ours, sample(pipe, **options)) < 1e-4 and relative(ours, plain) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["chroma", "flux2", "auraflow"])
def test_tpg_keeps_image_and_text_apart(name):
    """A single block that gets both in one sequence cannot be given the image's tokens in another order."""
    case = make_case(name)
    with guided(case.network, TPG(1.0, "b1")), pytest.raises(RestoreError, match="single_transformer_blocks"):
        case.network(**case.call)
    with guided(case.network, TPG(1.0, "b0")):
        assert relative(case.network(**case.call).sample, make_case(name).network(**case.call).sample) > 1e-4


@torch.no_grad()
def test_tsg_shifts_the_time_in_the_units_of_the_scheduler():
    """QwenImage counts from 0 to 1: a shift by 100 is one by 0.1."""
    pipe, _, _ = make_pipeline("qwenimage")
    case = make_case("qwenimage")
    network = pipe.transformer
    true = network(**case.call).sample
    other = network(**case.call | {"timestep": case.call["timestep"] + 0.1}).sample
    with guided(pipe, TSG(1.0, s=0, alpha=0, shift=100)):
        ours = network(**case.call).sample
    assert relative(ours, 2 * true - other) < 1e-4


class Renamed(diffusers.FluxTransformer2DModel):
    """A known network under another name."""


def test_by_capability():
    options = {"num_attention_heads": 2, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4), "in_channels": 16}
    sizes = {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    with guided(Renamed(**options, **sizes), PAG(1.0, "b1")):
        pass


LATTE = {"in_channels": 4, "patch_size": 2, "sample_size": 8, "caption_channels": 8, "cross_attention_dim": 16}
REFUSED = """
Lumina2Transformer2DModel WanTransformer3DModel HunyuanVideoTransformer3DModel CogVideoXTransformer3DModel
CogView4Transformer2DModel ZImageTransformer2DModel Kandinsky3UNet StableCascadeUNet UNet1DModel UVit2DModel
AutoencoderKL ControlNetModel LatteTransformer3DModel
""".split()


@pytest.mark.parametrize("name", REFUSED)
def test_other_networks_are_refused_by_name(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    with torch.device("meta"):
        network = getattr(diffusers, name)(
            **(
                {**LATTE, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
                if name.startswith("Latte")
                else {}
            )
        )
    with pytest.raises(RestoreError, match=f"got a {name}$"), guided(network, PAG(1.0, "b0")):
        pass


def test_sana_sprint_is_refused():
    """Its times are angles of no scheduler."""
    with pytest.raises(RestoreError, match="got a SanaTransformer2DModel"), guided(sana(guidance_embeds=True), None):
        pass


def test_a_processor_that_is_not_known_is_refused():
    network = make_case("pixart").network
    path_of(network, "b0").module.set_processor(ByHand())
    with pytest.raises(RestoreError, match="got a PixArtTransformer2DModel"), guided(network, PAG(1.0, "b1")):
        pass
