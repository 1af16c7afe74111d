"""The page as a server: its endpoints for gradio_client, and its password."""

import time

import PIL.Image
import pytest

import restore
from restore.paths import data_dir

PHOTO = data_dir() / "photos" / "astronaut-face-64.png"
SCRATCHED = data_dir() / "photos" / "astronaut-face-64-scratched.png"
MASK = data_dir() / "masks" / "scratches-64.png"


@pytest.fixture(scope="module")
def restorer():
    return restore.load("embedded")


def test_endpoints_answer_and_report_mistakes(restorer, monkeypatch, tmp_path):
    import gradio_client

    from restore import method
    from restore.app.page import build_page, launch, store

    page = build_page(restorer)
    _, url, _ = launch(page, prevent_thread_lock=True, quiet=True)
    try:
        client = gradio_client.Client(url, verbose=False, download_files=str(tmp_path / "got"))
        photo, scratched, mask = (gradio_client.handle_file(str(path)) for path in (PHOTO, SCRATCHED, MASK))

        def ask(endpoint="/restore", photo=photo, **given):
            return client.predict(photo=photo, api_name=endpoint, **{"quality": "fast", "steps": "2", **given})

        files, sidecar = ask(photo=scratched, mask=mask, task="fill", samples=2)
        assert [len(files), PIL.Image.open(files[0]).size] == [5, (64, 64)]
        assert sidecar["protocol"]["method"]["steps"] == 2 and sidecar["residual_ratio"] > 0
        _, sidecar = ask(task="denoise", label="photo")
        assert sidecar["settings"]["label"] == "photo"
        line = ask("/estimate", task="denoise")
        assert line.startswith("64 x 64, diffpir in 2 steps, 2 evaluations, about") and "of memory" in line
        # Cancelled in the middle, and nothing is left behind.
        job = client.submit(photo=photo, task="denoise", steps="1000", api_name="/restore")
        while not job.done() and not job.status().progress_data:
            time.sleep(0.1)
        client.predict(api_name="/cancel")
        with pytest.raises(Exception, match="[Cc]ancelled"):
            job.result(timeout=60)
        assert not list(store.open_store().glob("work-*"))
        wrong = [
            ({"task": "fill", "mask": photo}, "mask .* has colours"),
            ({"task": "paint"}, "There is no task called"),
            ({"task": "enlarge", "factor": 3}, "enlarged by 2, 4, 8, not by 3"),
            ({"task": "denoise", "sigma": "much"}, "[Ss]igma must be a number"),
            ({"task": "denoise", "sigma": "nan"}, "must be a finite number"),
            ({"task": "denoise", "quality": "super"}, "no quality called"),
            ({"task": "denoise", "prior": "/etc"}, "no prior called"),
            ({"task": "denoise", "label": "cat"}, "no class called 'cat'; known: face, photo"),
            ({"task": "sharpen", "blur": "motion"}, "raw how the camera moved first"),
            ({"photo": None, "task": "denoise"}, "Choose a photo first"),
        ]
        outside = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
        wrong.append(({"photo": outside, "task": "denoise"}, "."))
        for given, sentence in wrong:
            with pytest.raises(Exception, match=sentence):
                ask(**given)
        # A field that nobody touched: the preset's PAG, where the default has one, as DPS has.
        monkeypatch.setattr(method, "find_default", lambda *_: {"sampler": "dps"})
        _, sidecar = ask(task="denoise")
        assert sidecar["protocol"]["method"]["guidance"][0]["pag"]["scale"] == 1.0
        files, _ = ask(task="denoise", pag_scale="0")
        assert not any("guidance" in path for path in files)
        for label in ("PAG scale", "Steps"):  # what the browser posts for a field nobody touched
            fields = [part for part in page.config["components"] if str(part["props"].get("label")).startswith(label)]
            assert [field["type"] for field in fields] == ["textbox"] and not fields[0]["props"].get("value")
        public = {
            dependency["api_name"]
            for dependency in page.config["dependencies"]
            if dependency["api_visibility"] == "public"
        }
        assert public == {"restore", "estimate", "cancel"}
    finally:
        page.close()


def test_a_password_is_required(restorer):
    import requests
    from typer.testing import CliRunner

    from restore.app import cli

    for auth in ("me", "me:", ":secret", ""):
        result = CliRunner().invoke(cli.app, ["ui", "--auth", auth])
        assert "auth= must be user:password" in str(result.exception)
    from restore.app.page import build_page, launch

    page = build_page(restorer)
    _, url, _ = launch(page, prevent_thread_lock=True, quiet=True, auth=("anna", "secret"))
    try:
        assert requests.get(f"{url}config", timeout=60).status_code == 401
        session = requests.Session()
        assert (
            session.post(f"{url}login", data={"username": "anna", "password": "wrong"}, timeout=60).status_code == 400
        )
        assert session.post(f"{url}login", data={"username": "anna", "password": "secret"}, timeout=60).ok
        assert session.get(f"{url}config", timeout=60).ok
    finally:
        page.close()
