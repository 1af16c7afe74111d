"""Numbers are those of what was written: noise of degraded files, PSNR and SSIM of results."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from restore import restorer
from restore.app.choice import MethodChoice
from restore.app.files import find_photos
from restore.app.run import RestoreJob, degrade_files
from restore.images import io
from restore.paths import data_dir
from restore.task import load_task

FACE = data_dir() / "photos" / "astronaut-face-64.png"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp", ".ppm"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("sigma", [0.05, 0.2])
def test_a_degraded_file_has_the_noise_that_was_asked_for(tmp_path, suffix, mode, sigma):
    array = np.full((128, 128) if mode == "L" else (128, 128, 3), 120, np.uint8)
    Image.fromarray(array).save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    photos = find_photos([tmp_path / f"a{suffix}"], tmp_path / "out")
    (outcome,) = degrade_files(photos, load_task("denoise", {"sigma": sigma}))
    assert outcome.error is None
    before, after = (io.read_image(path).pixels for path in (photos[0].source, photos[0].target))
    assert abs(float((after - before).std()) / sigma - 1) < 0.03
    assert abs(float((after[:, 0] - before[:, 0]).std()) / sigma - 1) < 0.03


@pytest.mark.parametrize("task", ["sr2", "gaussian-blur", "inpaint-box"])
def test_a_grey_photo_gets_the_same_noise_in_all_channels(tmp_path, task):
    from restore.task import measure_photo

    Image.open(FACE).convert("L").save(tmp_path / "a.png")
    measured = measure_photo(tmp_path / "a.png", load_task(task), image_id="a", degrade=True)
    y = measured.y
    assert y.shape[1] == 3 and torch.equal(y[:, :1].expand_as(y), y)
    noise = y - measured.operator.A(measured.clean)
    assert abs(float(noise.std()) / 0.05 - 1) < 0.1


@pytest.mark.parametrize(("suffix", "mode"), [(".png", "L"), (".jpg", "RGB"), (".png", "RGB")])
def test_psnr_and_ssim_are_those_of_the_written_file(tmp_path, suffix, mode):
    Image.open(FACE).convert(mode).save(tmp_path / f"a{suffix}")
    photos = find_photos([tmp_path / f"a{suffix}"], tmp_path / "out")
    job = RestoreJob(restorer.load("embedded"), load_task("denoise"), MethodChoice("diffpir", steps=2), degrade=True)
    (outcome,) = job.run(photos)
    truth, written = (
        np.asarray(Image.open(path).convert("RGB"), float) for path in (photos[0].source, photos[0].target)
    )
    psnr = 10 * math.log10(255**2 / np.mean((truth - written) ** 2))
    assert outcome.numbers["psnr"] == pytest.approx(psnr, abs=1e-3)
    assert json.loads(photos[0].sidecar.read_text())["psnr"] == outcome.numbers["psnr"]
