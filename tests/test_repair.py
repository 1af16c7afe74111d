"""What was found in a photo becomes one operator."""

import pytest
import torch

from operators import RestoreError
from restore.images.findings import Findings
from restore.images.motion import Motion
from restore.repair import choose_repair

CLEAN = {"size": (600, 800), "hue": "colour", "sigma": 0.01, "blur": 0.0, "motion": None, "quality": 100, "jpeg": None}
MASK = torch.ones(1, 1, 600, 800)


def repair(**found):
    return choose_repair(Findings(**{**CLEAN, "mask": MASK, **found}))


def test_nothing_wrong_with_a_large_photo():
    with pytest.raises(RestoreError, match="nothing was found.*sr2"):
        repair()


def test_a_small_photo_is_enlarged_if_nothing_else_is_wrong():
    """With grain, blocks or scratches the enlargement would enlarge them, too: a person enlarges the result."""
    small = repair(size=(120, 160))
    assert (small.config["name"], small.config["factor"], small.done) == ("super_resolution", 2, ("enlarged 2 times",))
    noisy = repair(size=(120, 160), sigma=0.2)
    assert noisy.config == {"name": "denoising", "noise": {"name": "gaussian", "sigma": 0.2}}
    assert noisy.done == ("noise removed",)


def test_a_chain_in_the_order_in_which_it_happened():
    both = repair(blur=1.5, jpeg={"quality": 30, "loss": 0.05}, quality=30)
    assert [part["name"] for part in both.config["operators"]] == ["gaussian_blur", "jpeg"]
    moved = repair(motion=Motion(9.0, 30.0))
    assert moved.config["name"] == "blur" and moved.seen == ("motion over 9 pixels at 30 degrees",)


def test_only_scratches_are_touched():
    mask = MASK.clone()
    mask[..., 100:110, :] = 0
    scratched = repair(mask=mask)
    assert scratched.keep_known and scratched.config["name"] == "inpainting_mask"
    assert not repair(mask=mask, sigma=0.2).keep_known
