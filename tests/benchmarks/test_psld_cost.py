"""The counted cost of a PSLD step: numbers that can be worked out by hand, and the SD 1.5 configuration."""

import pytest
import torch
from tiny_sd import SCHEDULER, tiny_unet, tiny_vae

from benchmarks.psld_cost import count_psld, format_cost
from operators import RestoreError
from restore.backbones.schedule import Schedule
from restore.backbones.stable_diffusion import StableDiffusion

OPTIONS = {"size": 32, "dtype": torch.float32, "tokens": 12}


@pytest.fixture(scope="module")
def sd15():
    return count_psld()


@pytest.fixture(scope="module")
def tiny():
    unet = tiny_unet(
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
    )
    return StableDiffusion(unet, tiny_vae(), Schedule.from_config(SCHEDULER), torch.randn(1, 12, 16))


@pytest.fixture(scope="module")
def late(tiny):
    return count_psld(tiny, layers="o3", batch=2, **OPTIONS)


@pytest.mark.slow  # as the tiny networks below, half a minute
def test_sd15_at_512(sd15):
    assert sd15.unet / 1e9 == pytest.approx(803, rel=0.01)
    # A frozen network's gradient costs one more pass, apart from attention's five products for two.
    forward = sd15.unet + sd15.decoder + sd15.encoder
    assert 1.0 < sd15.backward / forward < 1.1
    assert sum(sd15.shares.values()) == pytest.approx(1)
    assert sd15.parameters == 2 * (859_520_964 + 83_653_863)


def test_the_report_has_every_part(late, monkeypatch):
    monkeypatch.setattr("benchmarks.psld_cost.count_psld", lambda **options: late)
    text = format_cost()
    assert all(f"{part} | " in text for part in late.shares) and "GB" in text


@pytest.mark.slow
def test_sharing_the_prefix_leaves_72_percent_of_the_unet(sd15):
    assert sd15.weak / sd15.unet == pytest.approx(0.72, abs=0.005)
    assert sd15.weak_unshared / sd15.unet == pytest.approx(1, abs=0.005)
    assert 1.05 < sd15.overhead < sd15.overhead_unshared < 1.25


@pytest.mark.slow
def test_memory_with_checkpointing(sd15):
    assert sd15.peak_pag <= 1.1 * sd15.peak
    assert sd15.peak_checkpointing < 0.5 * sd15.peak_pag
    assert sd15.parameters + sd15.peak_checkpointing < 12e9
    # Below this the three largest feature maps of the decoder would not fit: the count missed something.
    assert sd15.peak_checkpointing > 3 * 256 * 512 * 512 * 2


@pytest.mark.slow
def test_a_tiny_autoencoder_takes_the_decoder_and_the_encoder_away(sd15):
    """What docs/transformers.md states: a step of PSLD at 512 pixels has a quarter of the arithmetic and memory."""
    tiny = count_psld(tiny_vae=True)
    assert tiny.unet == sd15.unet
    assert tiny.decoder < sd15.decoder / 15 and tiny.encoder < sd15.encoder / 9
    assert sd15.total / tiny.total == pytest.approx(3.95, abs=0.05)
    assert sd15.peak / tiny.peak == pytest.approx(4.05, abs=0.1)


def test_any_backbone_and_layers(tiny, late):
    # As of Stable Diffusion: a frozen network's gradient costs one more pass, sharing lowers PAG's cost, and
    # checkpointing the memory.
    assert 1.0 < late.backward / (late.unet + late.decoder + late.encoder) < 1.2
    assert sum(late.shares.values()) == pytest.approx(1)
    assert 0.95 < late.weak_unshared / late.unet <= 1
    assert 1 < late.overhead < late.overhead_unshared
    assert late.peak_checkpointing < late.peak_pag
    assert 0 < late.weak < 0.5 * late.weak_unshared
    # conv_out: 2 images, 4 x 16 channels, 3 x 3 taps, 8 x 8 cells, a multiply-add being two.
    assert late.weak > 2 * 4 * 16 * 9 * 64 * 2
    with pytest.raises(RestoreError, match="no attention layer is called 'i77'"):
        count_psld(tiny, layers="i77", **OPTIONS)
