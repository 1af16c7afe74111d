"""The page's event handlers: values in, gradio's updates out, by the names of `Parts`. The work itself is in `work`."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from operators import RestoreError
from restore.app.page import models, pictures, work
from restore.app.page.models import Priors
from restore.app.page.request import Request, estimate_sigma, estimate_std, parse_request
from restore.app.page.store import make_work_folder
from restore.app.page.text import (
    format_plan,
    format_status,
    format_versions,
    hide_folders,
    label_versions,
    to_sentence,
)
from restore.app.page.visits import Asked, Visit, Visits

VERSIONS = 3  # offered of a restored photo


class Handlers:
    """The handlers of one page. parts: its components, a layout.Parts, for handlers with several outputs."""

    # The results that a new restoration hides first.
    RESULTS = ("forming", "which", "slider", "download", "offer", "gallery", "guessed", "files", "experts")

    def __init__(self, priors: Priors, parts: Any = None) -> None:
        self.priors, self.parts, self.visits = priors, parts, Visits()

    def open_photo(self, photo: str | None) -> dict[Any, Any]:
        pixels = None
        try:
            pixels = pictures.read_photo(photo).pixels if photo else None
        except RestoreError as error:  # shown, and the frame is empty again
            gr.Warning(to_sentence(hide_folders(str(error), photo)))
        if pixels is None:
            empty = {"photo": gr.update(value=None, visible=True), "stage": gr.update(photo="", visible="hidden")}
            return self.parts.updates(**empty, again=gr.update(visible=False))
        return self.parts.updates(
            photo=gr.update(visible="hidden"),
            stage=gr.update(photo=pictures.to_data_url(pictures.render(pixels)), visible=True),
            again=gr.update(visible=True),
            noise=estimate_sigma(pixels),
            std=estimate_std(pixels),
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
            return estimate_std(_read_edited(photo, stage))

    def estimate(self, photo: str | None, stage: str, more: Any, prior: str, **values: Any) -> dict[Any, Any]:
        """Say what the first photo takes, and whether the prior fits it."""
        plan, text, photos = None, "", _list_photos(photo, more)
        if photos:
            try:
                request, others = _read_requests(**values)
                request = request if photo else others
                selected = self.priors.select(prior, "estimate", request)
                with make_work_folder() as folder:
                    outcome = work.estimate(photos[0], selected, request, folder, _read_edits(photo, stage))
                plan, text = outcome.plan, format_plan(outcome.plan, len(photos), outcome.note)
            except RestoreError as error:
                text = html.escape(to_sentence(str(error)))
        return self.parts.updates(plan=text, fits=models.describe_fit(self.priors, prior, plan))

    def begin(self, session: gr.Request) -> dict[Any, Any]:
        """Answer the button at once; other visitors may come first."""
        self.visits.begin(session.session_hash)
        hidden = {name: gr.update(visible=False) for name in self.RESULTS}
        return self.parts.updates(status=format_status("Waiting for its turn …"), **hidden) | self._buttons(False)

    def begin_versions(self, session: gr.Request) -> dict[Any, Any]:
        self.visits.get(session.session_hash).stop.clear()
        waiting = {"status": format_status("Waiting for its turn …"), "offer": gr.update(visible=False)}
        return self.parts.updates(**waiting) | self._buttons(False)

    def finish(self) -> dict[Any, Any]:
        return self._buttons(True)

    def report_failure(self) -> str:
        """Answer an unexpected exception; gradio's log has the traceback."""
        return format_status("something went wrong; the terminal of this page shows what", bad=True)

    def restore(
        self, session: gr.Request, photo: str | None, stage: str, more: Any, prior: str, **values: Any
    ) -> Iterator[dict[Any, Any]]:
        visit, photos = self.visits.get(session.session_hash), _list_photos(photo, more)
        try:
            (request, others), edits = _read_requests(**values), _read_edits(photo, stage)
        except RestoreError as error:
            yield self.parts.updates(status=format_status(str(error), bad=True))
            return
        own = [(edits, request if photo else others)] + [(None, others)] * (len(photos) - 1)
        asked = [Asked(path, edits, prior, wanted) for path, (edits, wanted) in zip(photos, own, strict=False)]
        yield from self._run(visit, asked, "first")

    def restore_versions(self, session: gr.Request, which: int | None) -> Iterator[dict[Any, Any]]:
        """Restore the photo that is shown again, several times."""
        visit, k = self.visits.get(session.session_hash), which or 0
        if k < len(visit.asked):
            request = dataclasses.replace(visit.asked[k].request, samples=VERSIONS)
            yield from self._run(visit, [dataclasses.replace(visit.asked[k], request=request)], f"versions-{k}", k)

    def _run(self, visit: Visit, asked: list[Asked], folder: str, place: int | None = None) -> Iterator[dict[Any, Any]]:
        """Restore photos and show each; place: of the result that is replaced, None for new ones."""
        outcomes: list[tuple[str, bool]] = []
        shown: dict[str, Any] = {"forming": gr.update(visible=False)}
        if not asked:
            yield self.parts.updates(status=format_status("choose a photo first", bad=True))
            return
        first = asked[0]
        photos, others = [each.photo for each in asked], asked[-1].request
        try:
            prior = self.priors.select(first.prior, "restore", first.request)
        except RestoreError as error:
            yield self.parts.updates(status=format_status(str(error), bad=True))
            return
        with visit.run():
            run = (photos, prior, first.request, visit.folder(folder), visit.stop)
            for item in work.restore(*run, first.edits, others=others):
                lines = [line for line, _ in outcomes]
                if isinstance(item, work.Step):
                    picture = gr.skip() if item.picture is None else gr.update(value=item.picture, visible=True)
                    status = format_status(item.sentence, item.share, item.detail, lines)
                    yield self.parts.updates(status=status, forming=picture)
                    continue
                outcomes.append((item.line(), item.error is None))
                if item.error is None:
                    k = visit.add(item, asked[len(outcomes) - 1], place)
                    status = format_status("Done.", detail=item.note, lines=[*lines, item.line()])
                    shown = self._show(visit, k)
                    if len(outcomes) < len(asked):  # the last photo's is in the answer below
                        yield self.parts.updates(status=status, **shown)
            # The last yield stands inside of the block: a visitor's files are removed once the page has copied them. It
            # says all again: a busy browser may pass over what came before the last.
            done = sum(succeeded for _, succeeded in outcomes)
            last = outcomes[-1][0] if len(outcomes) == 1 else f"{done} of {len(photos)} photos done"
            lines = [line for line, _ in outcomes] if len(outcomes) > 1 else []
            note = visit.results[-1].note if done and len(photos) == 1 else ""
            status = format_status(last, detail=note, lines=lines, bad=done < len(photos))
            yield self.parts.updates(status=status, **shown)

    def show(self, session: gr.Request, which: int | None) -> dict[Any, Any]:
        """Show another photo of the queue."""
        visit, k = self.visits.get(session.session_hash), which or 0
        return self.parts.updates(**self._show(visit, k)) if k < len(visit.results) else {self.parts.slider: gr.skip()}

    def _show(self, visit: Visit, k: int) -> dict[str, Any]:
        done = visit.results[k]
        several, files = len(done.samples) > 1, [str(path) for each in visit.results for path in each.files]
        versions = [(image, f"version {n + 1}") for n, image in enumerate(done.samples)]
        label = label_versions(done.sidecar.get("spread"))
        names = [(each.name, n) for n, each in enumerate(visit.results)]
        return {
            "forming": gr.update(visible=False),
            "which": gr.update(choices=names, value=k, visible=len(names) > 1),
            "slider": gr.update(value=(done.before, done.samples[0]), visible=True),
            "download": gr.update(value=str(done.files[0]), visible=True),
            "gallery": gr.update(value=versions, label=label, visible=several),
            "guessed": gr.update(value=done.guessed, visible=several),
            "files": gr.update(value=files, visible=True),
            "experts": gr.update(visible=True),
            "guidance": gr.update(value=done.guidance and str(done.guidance), visible=done.guidance is not None),
            "sidecar": done.sidecar,
        }

    def offer_versions(self, session: gr.Request, which: int | None) -> dict[Any, Any]:
        """Say what several versions of the photo that is shown would take."""
        visit, k, plan = self.visits.get(session.session_hash), which or 0, None
        if k < len(visit.results) and len(visit.results[k].samples) == 1:
            asked = visit.asked[k]
            request = dataclasses.replace(asked.request, samples=VERSIONS)
            try:
                with make_work_folder() as folder:
                    prior = self.priors.select(asked.prior, "estimate", request)
                    plan = work.estimate(asked.photo, prior, request, folder, asked.edits).plan
            except RestoreError:  # there is a result; what more there could be is not worth an error
                pass
        text = format_versions(plan) if plan is not None and plan.fits else ""
        return self.parts.updates(offer=gr.update(visible=bool(text)), versions=text)

    def cancel(self, session: gr.Request) -> str:
        self.visits.get(session.session_hash).stop.set()
        return format_status("Cancelling …")

    def leave(self, session: gr.Request) -> None:
        self.visits.leave(session.session_hash)

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


def _read_requests(*, task: str, noise: float, sigma: str, std: float, **values: Any) -> tuple[Request, Request]:
    """Return what is asked of the photo that is shown and of more photos, each of which is measured by itself."""
    request = parse_request(task=task, sigma=sigma, std=std, samples=1, **values)
    others = dataclasses.replace(request, std=None)
    if task == "denoise" and request.sigma is None:
        request = dataclasses.replace(request, sigma=float(noise))
    return request, others


def _read_edits(photo: str | None, stage: str) -> pictures.Edits | None:
    """The edits of the first photo, which `more` may hold."""
    return pictures.parse_edits(stage) if photo else None


def _read_edited(photo: str | None, stage: str) -> Any:
    """The pixels of the photo as it was turned and cropped."""
    if not photo:
        raise RestoreError("choose a photo first")
    return pictures.apply_edits(pictures.read_photo(photo), pictures.parse_edits(stage)).pixels
