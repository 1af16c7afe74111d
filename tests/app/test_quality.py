"""fast, balanced and best are three settings, for photos of every size and every task."""

import pytest
import torch

import operators
import restore
from restore.method import QUALITIES

TASKS = {
    "denoise": operators.Denoising(),
    "jpeg": operators.JPEG(40),
    "sr4": operators.SuperResolution(4),
    "gaussian-blur": operators.GaussianBlur(9, 1.5),
    "blur": operators.Blur(torch.full((3, 3), 1 / 9)),
    "auto": operators.Compose(operators.GaussianBlur(9, 1.5), operators.SuperResolution(2)),
    "inpaint": operators.Inpainting(torch.eye(128)[None, None]),
}


@pytest.mark.parametrize("prior", ["embedded", "embedded-photo"])
@pytest.mark.parametrize("task", TASKS)
def test_three_real_qualities(prior, task):
    restorer, size = restore.load(prior), (128, 128)
    methods = [restorer.method(TASKS[task], task=task, size=size, quality=quality) for quality in QUALITIES]
    settings = [(method.steps, *sorted(method.parameters.items())) for method in methods]
    assert len(set(settings)) == 3
    assert restorer.method(TASKS[task], task=task, size=size) == methods[1]  # balanced is the default
