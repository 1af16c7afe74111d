"""Priors of grey images (medical ones, for example): grey in and out everywhere; colour refused, or per channel."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

import operators
import restore
from operators import RestoreError
from restore import samplers
from restore.app import cli
from restore.bench.run import run_benchmark
from restore.memory import Planner
from restore.restorer import Restorer
from restore.task import load_task

BLOCKS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
A = operators.SuperResolution(2, noise=operators.GaussianNoise(0.1))
LATENT = ("flowdps", "psld", "resample")
OWN = {"dps": {"zeta": 1.0}, "daps": {"ode_steps": 2, "mcmc_steps": 2}, "pnpdm": {"iterations": 5}}


def save_prior(folder, channels=1):
    torch.manual_seed(0)
    options = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, **BLOCKS}
    network = UNet2DModel(sample_size=16, in_channels=channels, out_channels=channels, **options)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_prior(tmp_path_factory.mktemp("grey"))


@pytest.fixture(scope="module")
def restorer(folder):
    return restore.load(folder, device="cpu")


def measurement(channels, n=1):
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("sampler", [name for name in samplers.SAMPLERS if name not in LATENT])
def test_every_sampler_restores_grey_and_colour_per_channel(restorer, folder, sampler):
    y, guidance = measurement(3, 2), restore.PAG(0.5, layers="m1")
    options = {"sampler": sampler, "steps": 3, "seed": 4, "guidance": guidance, **OWN.get(sampler, {})}
    with pytest.raises(RestoreError, match="images must be grey.*got 3 channels.*per_channel=True"):
        restorer(y, A, **options)
    whole = Restorer(restorer.backbone, per_channel=True)(y, A, **options)
    assert whole.samples.shape == (2, 1, 3, 16, 16)
    parts = []
    for c in range(3):
        alone = restorer(y[:, c : c + 1], A, **options)
        parts.append(alone.residual)
        assert alone.samples.shape == (2, 1, 1, 16, 16) and torch.isfinite(alone.samples).all()
        assert torch.equal(whole.samples[:, :, c : c + 1], alone.samples)
        assert whole.nfe == 3 * alone.nfe
    assert torch.allclose(whole.residual, torch.stack(parts).square().sum(0).sqrt())
    ratio = whole.residual / (0.1 * (3 * 64) ** 0.5)
    assert torch.allclose(whole.residual_ratio, ratio)


def test_grey_pictures_of_any_form_give_grey_pictures(restorer):
    picture = Image.fromarray((np.arange(64, dtype=np.uint8) * 3).reshape(8, 8))
    result = restorer(picture, A, sampler="dps", steps=2, zeta=1.0)
    assert result.images[0].mode == "L" and result.images[0].size == (16, 16)
    assert result.mean.shape == result.spread.shape == (1, 1, 16, 16)
    expected = ((result.samples[0, 0, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
    assert np.array_equal(np.asarray(result.images[0]), expected)
    assert restorer.generate(2, steps=2).shape == (2, 1, 16, 16)


def test_per_channel_needs_an_operator_that_leaves_channels_apart(folder):
    restorer = restore.load(folder, device="cpu", per_channel=True)

    class Mix(operators.Operator):
        name = "mix"

        def A(self, x):
            return x + x.mean(dim=1, keepdim=True) if x.shape[1] == 3 else x

    for operator, y in ((Mix(), measurement(3)), (operators.Colorization(), measurement(1))):
        with pytest.raises(RestoreError, match="channels apart"):
            restorer(y, operator, sampler="dps", steps=2, zeta=1.0)
    masks = operators.Inpainting(torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5)
    y = masks.A(measurement(3, 2))
    both = restorer(y, masks, sampler="diffpir", steps=2, seed=3)
    second = restorer(y[1:], masks[[1]], sampler="diffpir", steps=2, seed=3, image_ids=["1"])
    assert torch.equal(both.samples[1:], second.samples)


@pytest.mark.parametrize("channels", [2, 4])
def test_priors_of_other_channels_are_refused(tmp_path, channels):
    with pytest.raises(RestoreError, match=f"1 or 3 channels, got {channels}"):
        restore.load(save_prior(tmp_path, channels), device="cpu")


def test_per_channel_is_for_priors_of_grey_images():
    with pytest.raises(RestoreError, match="per_channel must be False"):
        restore.load("embedded", device="cpu", per_channel=True)


def test_the_plan_counts_channels(folder):
    restorer, task = restore.load(folder, device="cpu", per_channel=True), load_task("denoise", {"sigma": 0.1})
    method = restorer.method(task.build(16, 16), sampler="diffpir", steps=3, size=(16, 16))
    one, three = (Planner(restorer).plan(task, (16, 16), method, singly=n).evaluations for n in (1, 3))
    assert (one, three) == (3, 9)


@pytest.fixture
def photos(tmp_path):
    values = np.linspace(0, 255, 16 * 16).reshape(16, 16).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([values, values.T, values], -1)).save(tmp_path / "colour.png")
    return tmp_path


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["restore", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr().err


def test_files_are_grey_in_grey_out(folder, photos, monkeypatch, capsys):
    common = ("--task", "denoise", "sigma=0.1", "--backbone", folder, "--device", "cpu", "--sampler", "dps", "zeta=1.0")
    common = (*common, "--steps", "2", "--save-trajectory", "-o", photos / "out")
    code, err = call(monkeypatch, capsys, "run", photos / "grey.png", *common, "--degrade", "--samples", "2")
    assert code == 0, err
    for name in ("grey.png", "grey-sample1.png", "grey-mean.png", "grey-degraded.png"):
        with Image.open(photos / "out" / name) as image:
            assert image.mode == "L" and image.size == (16, 16), name
    sidecar = json.loads((photos / "out" / "grey.json").read_text())
    assert sidecar["nfe"] == 2 and sidecar["psnr"] > 0
    code, err = call(monkeypatch, capsys, "run", photos / "colour.png", *common)
    assert code == 2 and err.count("\n") == 1 and "--model-option per_channel=True" in err
    code, err = call(monkeypatch, capsys, "run", photos / "colour.png", *common, "--model-option", "per_channel=true")
    assert code == 0, err
    with Image.open(photos / "out" / "colour.png") as image:
        assert image.mode == "RGB"
    sidecar = json.loads((photos / "out" / "colour.json").read_text())
    assert sidecar["nfe"] == 6 and sidecar["protocol"]["model_options"] == {"per_channel": True}
    code, err = call(
        monkeypatch, capsys, "generate", "-n", "1", "--steps", "2", "--backbone", folder, "-o", photos / "made"
    )
    assert code == 0, err
    with Image.open(photos / "made" / "sample-0000.png") as image:
        assert image.mode == "L" and image.size == (16, 16)


def test_a_benchmark_of_grey_pictures(folder, photos, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    (photos / "colour.png").rename(runs / "colour.png")
    config = {"name": "grey", "backbone": folder, "device": "cpu", "data": {"folder": str(photos)}}
    config |= {"tasks": {"sr": {"operator": {"name": "super_resolution", "factor": 2}}}, "out": str(runs / "run")}
    config["methods"] = {
        "dps": {"sampler": "dps", "steps": 2, "parameters": {"zeta": 1.0}},
        "up": {"sampler": "bicubic"},
    }
    run_benchmark(config)
    for method in ("dps", "up"):
        rows = json.loads((runs / "run" / "results" / "sr" / method / "rows" / "grey.json").read_text())
        assert rows["psnr"] > 5
        pixels = np.asarray(Image.open(runs / "run" / "results" / "sr" / method / "grey.png"))
        assert (pixels == pixels[..., :1]).all()
    (runs / "colour.png").rename(photos / "colour.png")
    with pytest.raises(RestoreError, match="images must be grey"):
        run_benchmark(config | {"out": str(runs / "other")})
    run_benchmark(config | {"out": str(runs / "each"), "model_options": {"per_channel": True}})
    assert (runs / "each" / "results" / "sr" / "dps" / "rows" / "colour.json").is_file()
