"""fast, balanced and best are three settings, for photos of every size and every task."""

import pytest

from restore.method import QUALITIES, Situation, find_preset

OPERATORS = ("denoising", "jpeg", "super_resolution", "gaussian_blur", "motion_blur", "blur", "compose", "inpainting")


@pytest.mark.parametrize("backbone", ["embedded", "embedded-photo"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_three_real_qualities(backbone, operator):
    situation = Situation(backbone, operator, windows=True)
    methods = [find_preset(situation, quality=quality) for quality in QUALITIES]
    settings = {(str(method.steps), *sorted(method.parameters.items())) for method in methods}
    if (backbone, operator) == ("embedded", "denoising"):
        assert methods[0].steps == 1 and methods[2].parameters["orientations"] == "all"
    assert len(settings) == 3
    assert find_preset(situation) == methods[1]  # balanced is the default
