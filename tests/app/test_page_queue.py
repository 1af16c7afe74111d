"""Photos without one that is shown: each is measured by itself, as the page says."""

from types import SimpleNamespace

import pytest

import restore
from restore.app.page import models, work
from restore.paths import data_dir

pytest.importorskip("gradio")

TYPED = {"path": "[]", "pag_scale": "", "steps": "2", "label": "photo", "factor": 2, "seed": 0, "blur": "focus"}
TYPED |= {"quality": "fast", "sensitivity": 0.5, "trajectory": False, "extent": 21, "std": 2.5, "noise": 0.06}
PHOTOS = [str(data_dir() / "photos" / name) for name in ("astronaut-face-64.png", "astronaut-face-64-scratched.png")]


class Parts:
    def updates(self, **changes):
        return changes


@pytest.mark.parametrize("task, field, typed", [("denoise", "sigma", 0.06), ("sharpen", "std", 2.5)])
@pytest.mark.parametrize("shown", [True, False])
def test_what_the_sliders_say_is_of_the_photo_that_is_shown(monkeypatch, task, field, typed, shown):
    from restore.app.page.handlers import Handlers

    handlers, estimated = Handlers(models.Priors(restore.load("embedded"), offline=True), Parts()), []

    def estimate(photo, prior, request, folder, edits):
        estimated.append(request)
        return SimpleNamespace(plan=None, note="")

    monkeypatch.setattr(handlers, "_run", lambda visit, asked, folder: iter([asked]))
    monkeypatch.setattr(work, "estimate", estimate)
    monkeypatch.setattr("restore.app.page.handlers.format_plan", lambda *_: "")
    values = {"task": task, "sigma": "", **TYPED}
    photo, more = (PHOTOS[0], PHOTOS[1:]) if shown else (None, PHOTOS)
    (asked,) = handlers.restore(SimpleNamespace(session_hash="a"), photo, "", more, "embedded", **values)
    handlers.estimate(photo, "", more, "embedded", **values)
    assert [getattr(each.request, field) for each in asked] == [typed if shown else None, None]
    assert estimated == [asked[0].request]  # what is told before is what is done
