"""Guidance in pipelines whose network predicts a variance too, or whose times are not those of the noise levels."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, EDMEulerScheduler, UNet2DModel
from pipelines_by_hand import MID, quiet, sample
from tiny_sd import tiny_pipeline

from operators import RestoreError
from restore.backbones.adm import ADM
from restore.guidance import PAG, TAG, TPG, estimator
from restore.guidance.pipelines import guided


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        out_channels=6,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("term", [PAG(5.0, layers="m1"), TAG(0.5)])
def test_a_learned_variance_is_not_guided(unet, term):
    pipe = DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range"))
    x, t = torch.randn(2, 3, 16, 16), 400
    plain = unet(x, t).sample
    with guided(pipe, term):
        output = unet(x, t).sample
    assert torch.equal(output[:, 3:], plain[:, 3:])
    with estimator(ADM(unet), term) as estimate:  # the same network as a prior
        strong, eps = estimate(x, t)
    assert torch.allclose(output[:, :3], eps, atol=1e-5) and not torch.allclose(eps, strong.eps, atol=1e-3)


def test_times_that_are_not_those_of_the_levels(tmp_path):
    pipe = quiet(tiny_pipeline(tmp_path))
    pipe.scheduler = EDMEulerScheduler()
    plain = sample(pipe)
    for term in (PAG(3.0, layers=MID), TPG(3.0, layers=MID)):
        with guided(pipe, term):
            assert not torch.equal(sample(pipe), plain)
    with pytest.raises(RestoreError, match="noise levels"), guided(pipe, PAG(3.0, layers=MID, schedule="linear")):
        sample(pipe)
