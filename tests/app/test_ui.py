"""The browser page, driven through its own web server."""

import functools
import json
import sys
import tempfile
import time

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

    page = tmp_path / "page"
    restored = ui.restore_photo(restorer, PHOTO, "sr4", page, degrade=True, pag_scale=0, steps=2)
    sidecar = json.loads(restored.photo.sidecar.read_text())
    assert Image.open(restored.photo.beside("-degraded")).size == (16, 16)
    assert sidecar["psnr"] > 5 and sidecar["protocol"]["method"]["steps"] == 2
    photos, plain = files.find_photos([str(PHOTO)], tmp_path), run.ChangedPAG(0)
    options = {"degrade": True, "guidance": plain, "steps": 2}
    (outcome,) = run.restore_files(photos, restorer, tasks.find_task("sr4"), **options)
    assert np.array_equal(np.asarray(Image.open(outcome.photo.target)), np.asarray(Image.open(restored.photo.target)))
    with pytest.raises(RestoreError, match="choose a photo first"):
        ui.restore_photo(restorer, None, "sr4", page)
    with pytest.raises(RestoreError, match="needs mask=FILE"):
        ui.restore_photo(restorer, PHOTO, "inpaint", page, steps=2)


def test_messages_name_no_folder_and_large_photos_are_refused(restorer, tmp_path):
    broken = tmp_path / "secret" / "a.png"
    broken.parent.mkdir()
    broken.write_bytes(PHOTO.read_bytes()[:200])
    with pytest.raises(RestoreError, match="a.png") as caught:
        ui.restore_photo(restorer, broken, "denoise", tmp_path / "out")
    assert "secret" not in str(caught.value) and "/" not in str(caught.value)
    Image.new("1", (9000, 9000)).save(broken)
    with pytest.raises(RestoreError, match="9000 x 9000 pixels, at most 64 million"):
        ui.restore_photo(restorer, broken, "denoise", tmp_path / "out")


def test_every_offered_task_is_one(restorer):
    from restore.app import tasks

    assert not {"blur", "inpaint-box", "inpaint-random"} & set(ui.offered())
    for task in ui.offered(degrade=True):
        assert tasks.find_task(task).build(64, 64).A(restore_photo_pixels()).ndim == 4


def test_without_gradio_it_says_what_to_install(restorer, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(RestoreError, match=r"install restore\[ui\]"):
        ui.build(restorer)


def restore_photo_pixels():
    from restore.images import io

    return io.read_image(PHOTO).pixels


def test_the_page_answers_and_reports_mistakes(restorer, monkeypatch, tmp_path):
    import gradio_client

    from restore import method

    page = ui.build(restorer)
    here = functools.partial(tempfile.TemporaryDirectory, dir=tmp_path)
    monkeypatch.setattr(ui, "TemporaryDirectory", here)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, max_file_size=ui.LARGEST_FILE)
    try:
        client = gradio_client.Client(url, verbose=False)
        photo = gradio_client.handle_file(str(PHOTO))
        restored, degraded, sidecar = client.predict(photo, "sr4", None, True, "0", "2", 0, api_name="/restore")
        assert Image.open(restored).size == (64, 64) and degraded and sidecar["protocol"]["method"]["steps"] == 2
        line = client.predict(photo, "sr4", None, True, "0", "2", 0, api_name="/estimate")
        assert line.startswith("64 x 64, diffpir in 2 steps, 2 evaluations, about") and "of memory" in line
        # Cancelled in the middle, and nothing is left behind.
        job = client.submit(photo, "sr4", None, True, "0", "1000", 0, api_name="/restore")
        while not job.done() and not job.status().progress_data:
            time.sleep(0.1)
        client.predict(api_name="/cancel")
        with pytest.raises(Exception, match="cancelled"):
            job.result(timeout=60)
        assert not list(tmp_path.glob("restore-*"))
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
