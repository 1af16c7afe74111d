"""The page's event handlers: values in, gradio's updates out, by the names of `Parts`. The work itself is in `work`."""

from __future__ import annotations

import html
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from operators import RestoreError
from restore.app.page import models, pictures, work
from restore.app.page.models import Priors
from restore.app.page.request import Request, estimate_sigma, parse_request
from restore.app.page.store import make_work_folder
from restore.app.page.text import format_plan, format_status, hide_folders, to_sentence
from restore.images import estimate


class Handlers:
    """The handlers of one page. parts: its components, a layout.Parts, for handlers with several outputs."""

    # The results that a new restoration hides first.
    RESULTS = ("forming", "slider", "download", "gallery", "guessed", "files", "experts")

    def __init__(self, priors: Priors, parts: Any = None) -> None:
        self.priors, self.parts = priors, parts
        self.stops: dict[str, threading.Event] = {}  # by session, which is a tab of the browser

    def open_photo(self, photo: str | None) -> dict[Any, Any]:
        if not photo:
            empty = {"photo": gr.update(visible=True), "stage": gr.update(photo="", visible="hidden")}
            return self.parts.updates(**empty, again=gr.update(visible=False))
        with show_errors(photo):
            pixels = pictures.read_photo(photo).pixels
        return self.parts.updates(
            photo=gr.update(visible="hidden"),
            stage=gr.update(photo=pictures.to_data_url(pictures.render(pixels)), visible=True),
            again=gr.update(visible=True),
            noise=estimate_sigma(pixels),
        )

    def count(self, photo: str | None, more: list[str] | None) -> str:
        """Return the text of the button."""
        count = len(_list_photos(photo, more))
        return f"Restore {count} photos" if count > 1 else "Restore"

    def choose_task(self, task: str) -> dict[Any, Any]:
        """Show only what the task needs."""
        needs = {"filling": "fill", "factor": "enlarge", "sharpening": "sharpen", "noise": "denoise"}
        shown = {name: gr.update(visible=task == needed) for name, needed in needs.items()}
        return self.parts.updates(stage=gr.update(painting=task == "fill"), **shown)

    def choose_blur(self, blur: str) -> dict[Any, Any]:
        return self.parts.updates(**{name: gr.update(visible=blur == name) for name in ("focus", "motion")})

    def propose_mask(self, photo: str | None, stage: str, sensitivity: float) -> Any:
        with show_errors(photo):
            pixels = _read_edited(photo, stage)
            return gr.update(proposal=pictures.draw_paint(pictures.propose_mask(pixels, sensitivity)))

    def paint_mask(self, mask: str | None) -> Any:
        """Turn an uploaded mask into paint, which can be corrected."""
        with show_errors(mask):
            return gr.update(proposal=pictures.draw_paint(pictures.read_missing(mask))) if mask else gr.skip()

    def measure_blur(self, photo: str | None, stage: str) -> float:
        with show_errors(photo):
            return max(0.3, round(estimate.estimate_blur(_read_edited(photo, stage)), 1))

    def estimate(self, photo: str | None, stage: str, more: Any, prior: str, **values: Any) -> dict[Any, Any]:
        """Say what the first photo takes, and whether the prior fits it."""
        plan, text, photos = None, "", _list_photos(photo, more)
        if photos:
            try:
                planner, request = self.priors.planner(prior, "estimate"), _read_request(**values)
                edits = _read_edits(photo, stage)
                with make_work_folder() as folder:
                    plan = work.estimate(photos[0], planner, request, folder, edits)
                text = format_plan(plan, len(photos))
            except RestoreError as error:
                text = html.escape(to_sentence(str(error)))
        return self.parts.updates(plan=text, fits=models.describe_fit(self.priors, prior, plan))

    def begin(self, session: gr.Request) -> dict[Any, Any]:
        """Answer the button at once; other visitors may come first."""
        self.stops[session.session_hash] = threading.Event()
        hidden = {name: gr.update(visible=False) for name in self.RESULTS}
        return self.parts.updates(status=format_status("Waiting for its turn …"), **hidden) | self._buttons(False)

    def finish(self) -> dict[Any, Any]:
        return self._buttons(True)

    def report_failure(self) -> str:
        """Answer an unexpected exception; gradio's log has the traceback."""
        return format_status("something went wrong; the terminal of this page shows what", bad=True)

    def restore(
        self, session: gr.Request, photo: str | None, stage: str, more: Any, prior: str, **values: Any
    ) -> Iterator[dict[Any, Any]]:
        stop = self.stops.setdefault(session.session_hash, threading.Event())
        photos, files, outcomes = _list_photos(photo, more), [], []
        try:
            request, edits = _read_request(**values), _read_edits(photo, stage)
            planner = self.priors.planner(prior, "restore")
        except RestoreError as error:
            yield self.parts.updates(status=format_status(str(error), bad=True))
            return
        with make_work_folder() as folder:
            for item in work.restore(photos, planner, request, folder, stop, edits):
                lines = [line for line, _ in outcomes]
                if isinstance(item, work.Step):
                    picture = gr.skip() if item.picture is None else gr.update(value=item.picture, visible=True)
                    status = format_status(item.sentence, item.share, item.detail, lines)
                    yield self.parts.updates(status=status, forming=picture)
                    continue
                outcomes.append((item.line(), item.error is None))
                if item.error is None:
                    files += map(str, item.files)
                    status = format_status("Done.", lines=[*lines, item.line()])
                    yield self.parts.updates(status=status, **_show_result(item, files))
            # The last yield stands inside of the block: the files are removed once the page has copied them.
            done = sum(succeeded for _, succeeded in outcomes)
            last = outcomes[-1][0] if len(outcomes) == 1 else f"{done} of {len(photos)} photos done"
            lines = [line for line, _ in outcomes] if len(outcomes) > 1 else []
            status = format_status(last, lines=lines, bad=done < len(photos))
            yield self.parts.updates(status=status, forming=gr.update(visible=False))

    def cancel(self, session: gr.Request) -> str:
        if session.session_hash in self.stops:
            self.stops[session.session_hash].set()
        return format_status("Cancelling …")

    def leave(self, session: gr.Request) -> None:
        self.cancel(session)
        self.stops.pop(session.session_hash, None)

    def offer_labels(self, prior: str) -> Any:
        """Ask what the photo shows if the prior knows several kinds of picture."""
        try:
            choices = models.class_choices(self.priors.get(prior))
        except RestoreError:  # which the line about the prior says
            choices = []
        return gr.update(choices=choices, value="", visible=bool(choices))

    def describe_prior(self, prior: str) -> dict[Any, Any]:
        fetch = gr.update(visible=models.is_missing(prior))
        return self.parts.updates(about=models.describe_prior(prior), fetch=fetch)

    def fetch(self, prior: str, progress: Any = gr.Progress()) -> dict[Any, Any]:  # noqa: B008
        def show(done: int, total: int | None) -> None:
            progress((done // 1_000_000, total and total // 1_000_000), desc=f"downloading {prior}", unit="MB")

        progress(0, desc=f"downloading {prior}")
        try:
            self.priors.fetch(prior, show)
        except RestoreError as error:
            text = f"**{to_sentence(str(error))}**\n\n{models.describe_prior(prior)}"
            return self.describe_prior(prior) | self.parts.updates(about=text)
        choices = gr.update(choices=self.priors.choices(), value=prior)
        return self.describe_prior(prior) | self.parts.updates(prior=choices)

    def _buttons(self, ready: bool) -> dict[Any, Any]:
        return self.parts.updates(go=gr.update(interactive=ready), cancel=gr.update(interactive=not ready))


@contextmanager
def show_errors(*paths: str | None) -> Iterator[None]:
    """Show a RestoreError of the block as a sentence on the page, without the folders of `paths`."""
    try:
        yield
    except RestoreError as error:
        raise gr.Error(to_sentence(hide_folders(str(error), *paths)), print_exception=False) from None


def _list_photos(photo: str | None, more: list[str] | None) -> list[str]:
    return [path for path in (photo, *(more or [])) if path]


def _read_request(*, task: str, noise: float, sigma: str, three: bool, **values: Any) -> Request:
    sigma = str(noise) if task == "denoise" else sigma
    return parse_request(task=task, sigma=sigma, samples=3 if three else 1, **values)


def _read_edits(photo: str | None, stage: str) -> pictures.Edits | None:
    """The edits of the first photo, which `more` may hold."""
    return pictures.parse_edits(stage) if photo else None


def _read_edited(photo: str | None, stage: str) -> Any:
    """The pixels of the photo as it was turned and cropped."""
    if not photo:
        raise RestoreError("choose a photo first")
    return pictures.apply_edits(pictures.read_photo(photo), pictures.parse_edits(stage)).pixels


def _show_result(done: work.Result, files: list[str]) -> dict[str, Any]:
    several = len(done.samples) > 1
    captions = [f"version {k + 1}" for k in range(len(done.samples))]
    return {
        "forming": gr.update(visible=False),
        "slider": gr.update(value=(done.before, done.samples[0]), visible=True),
        "download": gr.update(value=str(done.files[0]), visible=True),
        "gallery": gr.update(value=list(zip(done.samples, captions, strict=True)), visible=several),
        "guessed": gr.update(value=done.guessed, visible=several),
        "files": gr.update(value=list(files), visible=True),
        "experts": gr.update(visible=True),
        "guidance": gr.update(value=done.guidance and str(done.guidance), visible=done.guidance is not None),
        "sidecar": done.sidecar,
    }
