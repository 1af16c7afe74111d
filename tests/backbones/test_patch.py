"""Networks that see squares of pixels as the channels of one cell."""

import pytest
import torch
from diffusers import UNet2DModel

import restore
from operators import RestoreError
from restore.backbones.adm import ADM


@pytest.fixture
def network():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    channels = {"in_channels": 12, "out_channels": 12, "block_out_channels": (8, 16), "norm_num_groups": 4}
    return UNet2DModel(sample_size=8, layers_per_block=1, add_attention=False, **blocks, **channels).eval()


def test_the_network_sees_squares_of_pixels(network):
    backbone = ADM(network, patch=2)
    assert (backbone.channels, backbone.multiple, backbone.resolution, len(backbone.attention)) == (3, 4, 16, 0)
    x = torch.randn(2, 3, 16, 12)
    # Cell (i, j) holds, for every channel, the pixels (2i, 2j), (2i, 2j + 1), (2i + 1, 2j), (2i + 1, 2j + 1).
    cells = torch.stack([x[:, c, i::2, j::2] for c in range(3) for i in (0, 1) for j in (0, 1)], 1)
    with torch.no_grad():
        out = network(cells, torch.full((2,), 40.0)).sample
    eps = torch.empty_like(x)
    for k, (c, i, j) in enumerate((c, i, j) for c in range(3) for i in (0, 1) for j in (0, 1)):
        eps[:, c, i::2, j::2] = out[:, k]
    assert torch.equal(backbone.predict(x, 40.0).eps, eps)


def test_patches_are_saved_and_loaded(network, tmp_path):
    backbone = ADM(network, patch=2)
    backbone.save(tmp_path / "model")
    loaded = ADM.load(tmp_path / "model", resolution=16)
    assert (loaded.patch, loaded.resolution, loaded.multiple) == (2, 16, 4)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(loaded.predict(x, 7.0).eps, backbone.predict(x, 7.0).eps)


def test_a_whole_photo_goes_through(network, tmp_path):
    ADM(network, patch=2).save(tmp_path / "model")
    restorer = restore.load(tmp_path / "model")
    y = torch.rand(1, 3, 21, 37) * 2 - 1
    from operators import Denoising, GaussianNoise

    result = restorer(y, Denoising(noise=GaussianNoise(0.1)), sampler="dpir", steps=1)
    assert result.samples.shape == (1, 1, 3, 21, 37)


@pytest.mark.parametrize("patch", [0, 5, -2])
def test_a_patch_must_fit_the_channels(network, patch):
    with pytest.raises(RestoreError, match="patch must"):
        ADM(network, patch=patch)
