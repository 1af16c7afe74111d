"""The browser page, driven through its own web server."""

import sys

import numpy as np
import pytest
from PIL import Image

import restore
from operators import RestoreError
from restore.app import ui
from restore.paths import data_dir

PHOTO = data_dir() / "photos" / "coffee-64.png"


@pytest.fixture(scope="module")
def restorer():
    return restore.load("embedded")


def test_a_photo_is_restored_as_by_the_command(restorer, tmp_path):
    from restore.app import files, run, tasks

    restored, degraded, sidecar = ui.restore_photo(restorer, PHOTO, "sr4", degrade=True, pag_scale=0, steps=2)
    assert Image.open(degraded).size == (16, 16) and sidecar["psnr"] > 5 and sidecar["protocol"]["method"]["steps"] == 2
    photos, plain = files.find_photos([str(PHOTO)], tmp_path), run.ChangedPAG(0)
    options = {"degrade": True, "guidance": plain, "steps": 2}
    (outcome,) = run.restore_files(photos, restorer, tasks.find_task("sr4"), **options)
    assert np.array_equal(np.asarray(Image.open(outcome.photo.target)), np.asarray(Image.open(restored)))
    with pytest.raises(RestoreError, match="choose a photo first"):
        ui.restore_photo(restorer, None, "sr4")
    with pytest.raises(RestoreError, match="needs mask=FILE"):
        ui.restore_photo(restorer, PHOTO, "inpaint", steps=2)


def test_every_offered_task_is_one(restorer):
    from restore.app import tasks

    for task in ui.offered():
        assert tasks.find_task(task).build(64, 64).A(restore_photo_pixels()).ndim == 4


def test_without_gradio_it_says_what_to_install(restorer, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(RestoreError, match=r"install restore\[ui\]"):
        ui.build(restorer)


def restore_photo_pixels():
    from restore.images import io

    return io.read_image(PHOTO).pixels


def test_the_page_answers_and_reports_mistakes(restorer, monkeypatch):
    import gradio_client

    from restore import method

    page = ui.build(restorer)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = gradio_client.Client(url, verbose=False)
        photo = gradio_client.handle_file(str(PHOTO))
        restored, degraded, sidecar = client.predict(photo, "sr4", None, True, "0", "2", 0, api_name="/restore")
        assert Image.open(restored).size == (64, 64) and degraded and sidecar["protocol"]["method"]["steps"] == 2
        # A greyscale mask arrives as it was saved: two values, no lossy format in between.
        scratched, mask = (
            gradio_client.handle_file(str(data_dir() / name))
            for name in ("photos/astronaut-face-64-scratched.png", "masks/scratches-64.png")
        )
        restored, degraded, sidecar = client.predict(
            scratched, "inpaint", mask, False, "0", "2", 0, api_name="/restore"
        )
        assert Image.open(restored).size == (64, 64) and degraded is None and sidecar["residual_ratio"] > 0
        with pytest.raises(Exception, match="needs mask=FILE"):
            client.predict(photo, "inpaint", None, False, "0", "2", 0, api_name="/restore")
        # A field that nobody touched: the preset's PAG, where the default has one, as DPS has.
        monkeypatch.setattr(method, "default", lambda *_: {"sampler": "dps"})
        _, _, sidecar = client.predict(photo, "sr4", None, True, "", "2", 0, api_name="/restore")
        assert sidecar["protocol"]["method"]["guidance"][0]["pag"]["scale"] == 1.0
        with pytest.raises(Exception, match="PAG scale must be a number, not 'much'"):
            client.predict(photo, "sr4", None, True, "much", "2", 0, api_name="/restore")
        for label in ("PAG scale", "Steps"):  # what the browser posts for a field nobody touched
            (field,) = [part for part in page.config["components"] if label in str(part["props"].get("label"))]
            assert field["type"] == "textbox" and not field["props"].get("value")
    finally:
        page.close()
