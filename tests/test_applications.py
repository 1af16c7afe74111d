"""docs/applications.md from top to bottom, on tiny networks in folders like the published ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionInpaintPipeline, StableDiffusionUpscalePipeline
from PIL import Image
from tiny_sd import tiny_controlnet, tiny_pipeline, tiny_unet

from operators import RestoreError
from restore import zoo

PAGE = Path(__file__).parents[1] / "docs" / "applications.md"
NAMES = ("sd-1.5", "controlnet-pose", "controlnet-depth", "sd-x4-upscaler", "sd-inpainting")
UNREAD = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
UNREAD |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}


@pytest.fixture(scope="module")
def pulled(tmp_path_factory):
    """The folder of each model: the files that the zoo fetches, an index that names more."""
    root = tmp_path_factory.mktemp("pulled")
    published.save("sd-1.5", root / "sd-1.5")
    for name in ("pose", "depth"):
        tiny_controlnet().save_pretrained(root / f"controlnet-{name}")
    parts = {key: part for key, part in tiny_pipeline(root / "tokenizer").components.items() if part is not None}
    parts["unet"] = tiny_unet(in_channels=9)
    pipes = {"sd-inpainting": StableDiffusionInpaintPipeline(**parts, safety_checker=None, feature_extractor=None)}
    parts["unet"] = tiny_unet(in_channels=7, num_class_embeds=1000)
    upscaler = StableDiffusionUpscalePipeline(**parts, low_res_scheduler=DDPMScheduler(), max_noise_level=350)
    for name, pipe in (pipes | {"sd-x4-upscaler": upscaler}).items():
        pipe.save_pretrained(root / name)
        index = json.loads((root / name / "model_index.json").read_text())
        (root / name / "model_index.json").write_text(json.dumps(index | UNREAD))
    return root


def test_page_runs_from_top_to_bottom(pulled, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "pull", lambda name: pulled / name)  # the hub is tested elsewhere
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name, side in (("pose", 64), ("depth", 64), ("hole", 32), ("0801", 70), ("0802", 70), ("0803", 70)):
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(f"{name}.png")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks)
    for long, short in (("num_inference_steps=50", "num_inference_steps=2"), ("range(500)", "range(2)")):
        assert long in text
        text = text.replace(long, short)
    text = text.replace("side=512", "side=32").replace("(256, 256)", "(8, 8)")
    exec(compile(text, PAGE.name, "exec", dont_inherit=True), {})
    pictures = {path.name for path in tmp_path.glob("*-with*.png")}
    names = ("controlnet-pose", "controlnet-depth", "upscaled-0801", "upscaled-0802", "upscaled-0803", "inpainted")
    assert pictures == {f"{name}-{end}.png" for name in names for end in ("with", "without")}
    assert Image.open("distilled.png").width > 8
    without, with_pag = (np.asarray(Image.open(f"controlnet-pose-{end}.png")) for end in ("without", "with"))
    assert (without != with_pag).any()


def test_settings_are_those_of_the_paper():
    """App. A.4, C.2 and C.3, and the models that the page pulls are known."""
    text = PAGE.read_text(encoding="utf-8")
    for fact in (
        '("pose", 2.5), ("depth", 1.0)',
        "num_inference_steps=50",
        '"0801", 3.0), ("0802", 2.0), ("0803", 1.0)',
    ):
        assert fact in text
    assert "compare(pipe, 1.5, " in text and "PAG(100.0" in text and "c + 100.0 * (c - u)" in text
    assert set(NAMES) <= set(zoo.read_registry())


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_pipeline_is_no_prior(name):
    with pytest.raises(RestoreError, match="not a prior"):
        zoo.load_backbone(name, offline=True)
