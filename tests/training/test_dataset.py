"""Images for training: crops of photos, augmentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import restore
from restore.training import dataset


def test_crops_are_of_every_scale_and_never_enlarged(tmp_path):
    """A ramp: the step from pixel to pixel of a crop tells how much it was reduced."""
    ramp = np.repeat(np.linspace(0, 255, 200, dtype=np.float64)[None, :, None], 160, 0).repeat(3, 2)
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "ramp.png")
    files = dataset.list_files(tmp_path)
    crops = dataset.load_crops(files, 20, 40, seed=1)
    slopes = (crops[:, 0, 10, 18].float() - crops[:, 0, 10, 2].float()) / 16 / (255 / 199)
    assert slopes.min() > 0.8 and slopes.max() < 8.5 and slopes.max() > 3 * slopes.min()
    assert torch.equal(crops, dataset.load_crops(files, 20, 40, seed=1))
    assert not torch.equal(crops, dataset.load_crops(files, 20, 40, seed=2))
    with pytest.raises(restore.RestoreError, match="crops need 300 pixels or more a side"):
        dataset.load_crops(files, 300, 1, seed=1)


def test_whole_pixels_are_not_resampled():
    options = {"rotate_degrees": 0.0, "scale": 0.0, "shift": 0.2, "contrast": 0.0, "brightness": 0.0, "tint": 0.0}
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    levels = images.float() / 127.5 - 1
    for whole in (True, False):
        x = dataset.augment(
            images, 32, torch.Generator().manual_seed(1), OmegaConf.create({**options, "whole_pixels": whole})
        )
        kept = [torch.isclose(a[0, 8:24, 8:24].reshape(-1, 1), b[0].reshape(1, -1), atol=1e-4).any(1).float().mean()
                for a, b in zip(x, levels, strict=True)]  # fmt: skip
        assert (min(kept) > 0.999) == whole


def test_crops_of_photos_are_cut_and_never_resampled(tmp_path):
    """A warp, or a reduction by a fraction of a pixel, would teach a prior that photos are soft."""
    warp, colour = {"rotate_degrees": 9.0, "scale": 0.3, "shift": 0.2}, ("contrast", "brightness", "tint")
    options = OmegaConf.create(warp | dict.fromkeys(colour, 0.0))
    images = torch.randint(0, 256, (6, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = dataset.augment(images, 16, torch.Generator().manual_seed(1), options, cut=True)
    places, mirrored = set(), 0
    for crop, image in zip(x, images.float() / 127.5 - 1, strict=True):
        windows = {
            (i, j, flip): (image.flip(-1) if flip else image)[:, i : i + 16, j : j + 16]
            for i in range(5) for j in range(5) for flip in (False, True)
        }  # fmt: skip
        (found,) = [place for place, window in windows.items() if torch.allclose(crop, window, atol=1e-6)]
        places.add(found[:2])
        mirrored += found[2]
    assert len(places) > 3 and 0 < mirrored < 6
    middle = dataset.to_float(images, 16, cut=True)
    assert torch.allclose(middle, images[..., 2:18, 2:18].float() / 127.5 - 1)

    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    sets = {"photos": {"folder": str(tmp_path), "crops": 2}, "faces": {"folder": str(tmp_path), "stored_size": 20}}
    data = OmegaConf.create({"stored_size": 20, "held_out_every": 3, "sets": sets})
    with pytest.raises(restore.RestoreError, match="needs square images"):
        dataset.load_training_sets(data, 0)
    del data.sets["faces"]
    assert dataset.load_training_sets(data, 0)[0].cut
