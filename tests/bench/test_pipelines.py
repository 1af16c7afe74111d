"""Text-to-image runs: classifier-free guidance in part of the steps, the clock of the loop, a limit of prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from operators import RestoreError
from restore.bench.run import run_benchmark
from restore.bench.sampling import time_calls
from restore.guidance import CFG
from restore.guidance.pipelines import schedule_cfg


@pytest.fixture
def config(tmp_path, stand_ins):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cow\n")
    task = {"title": "Text", "prompts": str(tmp_path / "prompts.txt"), "count": 2}
    return {
        "name": "tiny",
        "kind": "text_to_image",
        "backbone": str(stand_ins["sd-1.5"]),
        "out": str(tmp_path / "run"),
        "device": "cpu",
        "threads": 1,
        "batch": 2,
        "tasks": {"text": task},
        "metrics": {"names": ["loop_steps_per_second", "process_memory_mb", "iterations_per_second"]},
    }


def run_by_hand(pipe, steps, latents, prompt, g, first):
    """Diffusers' own way: its callback turns the guidance off after `first` steps."""

    def turn_off(pipe, k, t, kwargs):
        if k + 1 == first:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    options = {"callback_on_step_end": turn_off, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    more = {"num_inference_steps": steps, "guidance_scale": g, "latents": latents, "output_type": "latent"}
    return pipe(prompt, **more, **options).images


def test_cfg_in_the_first_steps(stand_ins):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(stand_ins["sd-1.5"], safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.unet.modules():  # random weights hardly listen to the prompt
        if hasattr(module, "to_out"):
            module.to_out[0].weight.data *= 30
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(6)
    times = pipe.scheduler.timesteps.tolist()
    options = {"num_inference_steps": 6, "guidance_scale": 7.5, "latents": latents, "output_type": "latent"}
    with torch.no_grad():
        always, never = (run_by_hand(pipe, 6, latents, "a cat", 7.5, first) for first in (99, 1))
        expected = run_by_hand(pipe, 6, latents, "a cat", 7.5, 2)
        with schedule_cfg(pipe, CFG(6.5, interval=(1000, times[1]))):
            first = pipe("a cat", **options).images
        with schedule_cfg(pipe, CFG(6.5, interval=(1000, 0))):
            assert torch.equal(pipe("a cat", **options).images, always)
    size = expected.abs().max()
    assert (always - expected).abs().max() > 1e-3 * size and (never - expected).abs().max() > 1e-3 * size
    assert (first - expected).abs().max() < 1e-5 * size


def test_intervals_in_a_benchmark(config):
    """The whole interval is plain CFG, byte for byte; less of it is another picture. The loop is part of the time."""
    sampler = {"sampler": "pipeline", "steps": 2}
    config["methods"] = {
        "cfg": {**sampler, "guidance": {"cfg": {"scale": 6.5}}},
        "all": {**sampler, "guidance": {"cfg": {"scale": 6.5, "interval": [1000, 0]}}},
        "first": {
            **sampler,
            "guidance": {"cfg": {"scale": 60.0, "interval": [1000, 500]}, "pag": {"scale": 1, "layers": "m1"}},
        },
    }
    done = run_benchmark(config)
    folder = done.folder / "results" / "text"
    one, whole, first = ((folder / name / "000000.png").read_bytes() for name in config["methods"])
    assert one == whole != first
    for cell in done.table["table"]["text"].values():
        cost = cell["cost"]
        assert cost["loop_steps_per_second"] > cost["iterations_per_second"] > 0 and cost["process_memory_mb"] > 10
    bad = {"cfg": {"scale": 1.0, "interval": [1000, 500]}}
    config["methods"] = {"two": {**sampler, "guidance": [bad, bad]}}
    with pytest.raises(RestoreError, match="cfg must be one term"):
        run_benchmark({**config, "out": config["out"] + "-two"})


def test_the_clock_counts_the_calls_of_the_network(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("restore.bench.sampling.time.perf_counter", lambda: float(next(now)))
    network = torch.nn.Identity()
    with time_calls(network, torch.device("cpu")) as read:
        for _ in range(3):
            network(1)
        assert read() == 5.0  # a mark before and after each of three calls
    assert not network._forward_hooks and not network._forward_pre_hooks


@pytest.mark.parametrize(
    "metrics, message",
    [
        ({"names": ["is", "fid"], "group_by_prompt": True, "reference": "photos"}, "fid .*group_by_prompt=false"),
        ({"names": ["pr"], "group_by_prompt": True}, "precision .*group_by_prompt=false"),
        ({"names": ["lpips_pairs"]}, "lpips_pairs .*group_by_prompt=true"),
    ],
)
def test_metrics_that_would_be_left_out_are_refused(config, metrics, message):
    config["methods"] = {"none": {"sampler": "pipeline", "steps": 1}}
    with pytest.raises(RestoreError, match=message):
        run_benchmark({**config, "metrics": metrics | {"allow_small": True}})


def test_pairs_need_prompts(config):
    config |= {"kind": "generation", "tasks": {"faces": {"title": "Faces", "count": 2}}}
    config["methods"] = {"none": {"sampler": "ddim", "steps": 1}}
    with pytest.raises(RestoreError, match="lpips_pairs .*a file of prompts"):
        run_benchmark({**config, "metrics": {"names": ["lpips_pairs"], "group_by_prompt": True}})


def test_a_limit_of_prompts(config):
    """The first prompts alone, which the others of the file cannot change; too few are an error."""
    config["methods"] = {"none": {"sampler": "pipeline", "steps": 1}}
    config["metrics"] |= {"group_by_prompt": True}
    config["tasks"]["text"] |= {"prompt_limit": 2, "count": 1}
    done = run_benchmark(config)
    names = sorted(path.stem for path in (done.folder / "results/text/none").glob("*.png"))
    assert names == ["000-000000", "001-000000"]
    assert json.loads((done.folder / "run.json").read_text())["protocol"]["tasks"]["text"]["prompt_limit"] == 2
    first = np.asarray(Image.open(done.folder / "results/text/none/000-000000.png"))
    assert first.std() > 0
    config["tasks"]["text"]["prompt_limit"] = 4
    with pytest.raises(RestoreError, match="prompt_limit=4"):
        run_benchmark({**config, "out": config["out"] + "-few"})
