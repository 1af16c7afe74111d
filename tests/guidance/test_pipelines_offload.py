"""Guidance in pipelines whose networks are offloaded: their hooks are taken away and set again after every call."""

import accelerate
import pytest
import torch
from pipelines_by_hand import MID, inputs, quiet, sample
from tiny_sd import tiny_pipeline, tiny_unet

from restore.guidance import PAG
from restore.guidance.pipelines import guided


@pytest.mark.parametrize("when", ["before", "within"])
def test_every_call_of_an_offloaded_pipeline_is_guided(tmp_path, when):
    plain = sample(quiet(tiny_pipeline(tmp_path)))
    pipe = quiet(tiny_pipeline(tmp_path))
    with guided(quiet(tiny_pipeline(tmp_path)), PAG(30.0, layers=MID)) as other:
        expected = sample(other)
    assert not torch.equal(expected, plain)
    if when == "before":
        pipe.enable_model_cpu_offload(device="cpu")
    with guided(pipe, PAG(30.0, layers=MID)):
        if when == "within":
            pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(3):
            assert torch.equal(sample(pipe), expected)
    assert torch.equal(sample(pipe), plain)


@torch.no_grad()
def test_the_modules_are_as_before():
    unet = tiny_unet()
    z, text = inputs(2)
    plain = unet(z, 401, encoder_hidden_states=text).sample
    _, hook = accelerate.cpu_offload_with_hook(unet, "cpu")
    hooked, beneath = unet.forward, unet._old_forward
    with guided(unet, PAG(3.0, layers=MID)):
        assert not torch.equal(unet(z, 401, encoder_hidden_states=text).sample, plain)
    assert unet.forward is hooked and unet._old_forward == beneath
    with guided(unet, PAG(3.0, layers=MID)):
        hook.remove()
        guided_output = unet(z, 401, encoder_hidden_states=text).sample
        assert not torch.equal(guided_output, plain)
    assert torch.equal(unet(z, 401, encoder_hidden_states=text).sample, plain) and "forward" not in unet.__dict__
