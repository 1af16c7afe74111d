"""Guided pipelines of SD3, FLUX and DiT, against two whole passes of the network."""

import pytest
import tiny_flow
import torch
from pipelines_by_hand import by_hand, quiet, relative, sample

from restore.guidance import PAG
from restore.guidance.pipelines import guided


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("scope", ["joint", "image"])
def test_stable_diffusion_3(tmp_path, dual, guidance_scale, scope):
    pipe = quiet(tiny_flow.sd3_pipeline(tmp_path, dual))
    size = {"height": 32, "width": 48, "max_sequence_length": 8}
    options = {**size, "guidance_scale": guidance_scale}
    plain = sample(pipe, **options)
    with guided(pipe, PAG(2.0, layers="b1:0,3", scope=scope)):
        ours = sample(pipe, **options)
    cfg = "second" if guidance_scale > 1 else "all"
    pipe.transformer.forward = by_hand(pipe.transformer, "b1:0,3", 2.0, cfg=cfg, scope=scope)
    expected = sample(pipe, **options)
    del pipe.transformer.forward
    assert relative(ours, expected) < 1e-5 and relative(ours, plain) > 1e-3
    assert torch.equal(sample(pipe, **options), plain)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("layers", ["b0", "b3"])
def test_flux(tmp_path, distilled, layers):
    pipe = quiet(tiny_flow.flux_pipeline(tmp_path, distilled))
    options = {"height": 32, "width": 48, "max_sequence_length": 8, "guidance_scale": 3.5}
    plain = sample(pipe, **options)
    with guided(pipe, PAG(2.0, layers=layers, scope="image")):
        ours = sample(pipe, **options)
    with guided(pipe, PAG(2.0, layers=layers, interval=(1000, 999.5))):
        first = sample(pipe, **options)  # only the first step: times run to 1000
    with guided(pipe, PAG(2.0, layers=layers, interval=(0.9, 0))):
        assert torch.equal(sample(pipe, **options), plain)
    pipe.transformer.forward = by_hand(pipe.transformer, layers, 2.0, cfg="all", scope="image")
    expected = sample(pipe, **options)
    assert relative(ours, expected) < 1e-5 and relative(ours, plain) > 1e-3
    assert relative(first, plain) > 1e-4 and relative(first, ours) > 1e-4


def test_flux_with_true_cfg(tmp_path):
    """The pass without the prompt gets the shift of the one with it: u + g (c − u) + s (c − c_weak)."""
    pipe, calls = quiet(tiny_flow.flux_pipeline(tmp_path)), []
    options = {"height": 32, "width": 32, "max_sequence_length": 8, "true_cfg_scale": 4.0, "negative_prompt": "a dog"}
    with guided(pipe, PAG(2.0, layers="b1")):
        ours = sample(pipe, **options)
    alone = by_hand(pipe.transformer, "b1", 2.0, cfg="all")

    def run(*args, **kwargs):
        calls.append(kwargs["hidden_states"])
        if len(calls) % 2:
            run.shift = alone(*args, **kwargs)[0] - type(pipe.transformer).forward(pipe.transformer, *args, **kwargs)[0]
        return (type(pipe.transformer).forward(pipe.transformer, *args, **kwargs)[0] + run.shift,)

    pipe.transformer.forward = run
    assert relative(ours, sample(pipe, **options)) < 1e-5 and len(calls) == 8


def test_dit():
    pipe = quiet(tiny_flow.dit_pipeline())

    def sampled():
        g = torch.Generator().manual_seed(0)
        out = pipe([1, 2], guidance_scale=4.0, num_inference_steps=3, generator=g, output_type="pt")
        return out.images

    network = pipe.transformer  # the pipeline's null class is 1000, the tiny one's 10
    forward = type(network).forward

    def renamed(*args, class_labels, **kwargs):
        return forward(network, *args, class_labels=class_labels.clamp(max=10), **kwargs)

    network.forward = renamed
    plain = sampled()
    with guided(pipe, PAG(2.0, layers="b1")):
        ours = sampled()
    alone = by_hand(network, "b1", 2.0, cfg="first")
    network.forward = lambda *args, class_labels, **kwargs: alone(
        *args, class_labels=class_labels.clamp(max=10), **kwargs
    )
    assert relative(ours, sampled()) < 1e-4 and relative(ours, plain) > 1e-3
