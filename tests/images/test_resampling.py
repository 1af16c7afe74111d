"""The 256-at-512 protocol and the presets of PSLD."""

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import operators
from operators import RestoreError
from restore.guidance import PAG, resolve_layers
from restore.images import resampling
from restore.method import Situation, find_preset

CONFIG = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "configs" / "method" / "psld.yaml"))


def test_enlarge_is_pillows_bicubic_and_reduce_is_antialiased():
    levels = np.random.default_rng(0).integers(60, 200, (32, 32), dtype=np.uint8)
    image = torch.from_numpy(levels).float()[None, None].repeat(1, 3, 1, 1) / 127.5 - 1
    theirs = np.asarray(Image.fromarray(levels).convert("F").resize((64, 64), Image.BICUBIC)) / 127.5 - 1
    assert float((resampling.enlarge_image(image, 64)[0, 0] - torch.tensor(theirs)).abs().max()) < 1e-5
    stripes = torch.ones(1, 3, 64, 64)
    stripes[..., ::2] = -1
    # A pattern above the small grid's Nyquist frequency vanishes; nearest turns it into a flat colour.
    assert float(resampling.resize_image(stripes, 32)[..., 4:-4].abs().max()) < 0.1
    assert float(resampling.resize_image(stripes, 32, method="nearest").abs().min()) == 1


def test_reference_resampling():
    image = torch.tensor([-0.5, 0.0, 0.25, 0.5]).view(1, 1, 2, 2).expand(2, 3, 2, 2) * torch.tensor([1.0, 0.5]).view(
        2, 1, 1, 1
    )
    big = resampling.enlarge_image(image, 4, **resampling.REFERENCE)
    expected = torch.tensor([-1.0, 0.0, 0.5, 1.0]).view(1, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(big, expected.expand(2, 3, 4, 4))
    assert torch.allclose(resampling.resize_image(big, 2, method="nearest"), expected[..., ::2, ::2].expand(2, 3, 2, 2))
    assert not resampling.enlarge_image(torch.full((1, 3, 2, 2), 0.3), 4, stretch=True).isnan().any()
    with pytest.raises(RestoreError, match="unknown resampling 'lanczos'"):
        resampling.enlarge_image(image, 4, method="lanczos")


def test_measured_small_is_the_operator_of_the_reduced_image():
    noise = operators.GaussianNoise(0.05)
    blur = operators.GaussianBlur(15, 1.5, noise=noise)
    composed = resampling.reduce_before(blur)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    small = operators.SuperResolution(2).A(x)
    assert torch.equal(composed.A(x), blur.A(small)) and composed.noise is noise
    y = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = x.double()
    assert float((composed.A(x) * y).sum()) == pytest.approx(float((x * composed.A_adjoint(y)).sum()), rel=1e-10)


TABLE5 = {
    "ffhq": {
        "inpainting": (0.15, 0.015, 4.0),
        "super_resolution": (0.7, 0.07, 4.0),
        "gaussian_blur": (0.1, 0.01, 5.0),
        "motion_blur": (0.15, 0.015, 4.0),
    },
    "imagenet": {
        "inpainting": (0.5, 0.05, 4.0),
        "super_resolution": (0.7, 0.07, 4.0),
        "gaussian_blur": (0.1, 0.01, 5.0),
        "motion_blur": (0.3, 0.03, 5.0),
    },
}


def entry(data, task):
    def names(value):
        return [value] if isinstance(value, str) else value

    return next(e for e in CONFIG["presets"] if e.get("data") == data and task in names(e["task"]))


@pytest.mark.parametrize("data", TABLE5)
def test_presets_are_table_5(data):
    with torch.device("meta"):
        from diffusers import UNet2DConditionModel

        from restore.backbones.attention_layers import find_attention_layers

        attention = find_attention_layers(UNet2DConditionModel(sample_size=64, cross_attention_dim=768))
    for task, (eta, gamma, scale) in TABLE5[data].items():
        found = entry(data, task)
        assert found["parameters"] == {"eta": eta, "gamma": gamma}
        assert found["unguided"] == {"eta": 1.0, "gamma": 0.1}
        pag = found["guidance"]["pag"]
        assert pag["scale"] == scale and found["source"]
        (layer,) = resolve_layers(pag["layers"], attention)
        assert layer.path == "down_blocks.2.attentions.1.transformer_blocks.0.attn1"


def test_presets_are_found_and_built():
    found = find_preset(Situation("sd-1.5", "gaussian_blur"), "psld")
    assert found.parameters == {"eta": 0.1, "gamma": 0.01} and found.steps == 1000
    assert found.guidance.terms == (PAG(5.0, layers=["input_blocks.8.1.transformer_blocks.0.attn1"]),)
    other = find_preset(Situation("some-other-latent-model", "denoising"), "psld")
    assert other.parameters == {"eta": 1.0, "gamma": 0.1} and other.guidance is None
    assert find_preset(Situation("adm-ffhq-256", "gaussian_blur"), "dps").sampler == "dps"
