"""The page's event handlers: values in, gradio's updates out, by the names of `Parts`. The work itself is in `work`."""

from __future__ import annotations

import html
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from operators import RestoreError
from restore.app.options import parse_steps
from restore.app.page import models, pictures, work
from restore.app.page.build import RESULTS
from restore.app.page.models import Priors
from restore.app.page.request import Request, parse_number, parse_path
from restore.app.page.text import format_plan, format_status, hide_folders, to_sentence
from restore.images import estimate


@dataclass(frozen=True)
class PageInputs:
    """What is set on the page, by the names of its parts."""

    photo: str | None
    stage: str
    more: list[str] | None
    task: str
    factor: int
    blur: str
    std: float
    path: str
    extent: float
    noise: float
    sensitivity: float
    quality: str
    three: bool
    steps: str
    seed: float
    scale: str
    sigma: str
    traced: bool
    prior: str
    label: str | None

    @property
    def photos(self) -> list[str]:
        return [path for path in (self.photo, *(self.more or [])) if path]

    def edits(self) -> pictures.Edits | None:
        """Return the edits of the first photo. Raises RestoreError if they cannot be read."""
        return pictures.parse_edits(self.stage) if self.photo else None

    def request(self) -> Request:
        """Raises RestoreError if something typed or drawn cannot be read."""
        motion = self.task == "sharpen" and self.blur == "motion"
        return Request(
            task=self.task,
            factor=self.factor,
            blur=self.blur,
            std=self.std,
            path=parse_path(self.path, self.extent) if motion else (),
            sigma=self.noise if self.task == "denoise" else parse_number(self.sigma, "sigma_y"),
            sensitivity=self.sensitivity,
            quality=self.quality,
            samples=3 if self.three else 1,
            steps=parse_steps((self.steps or "").strip() or None),
            seed=int(self.seed or 0),
            pag_scale=parse_number(self.scale, "PAG scale"),
            trajectory=self.traced,
            label=self.label or None,
        )


class Handlers:
    """The handlers of one page. parts: its components, a layout.Parts; None where nothing is updated by name."""

    def __init__(self, priors: Priors, parts: Any = None) -> None:
        self.priors, self.parts = priors, parts
        self.stops: dict[str, threading.Event] = {}  # by session, which is a tab of the browser

    def open_photo(self, photo: str | None) -> dict[Any, Any]:
        if not photo:
            empty = {"photo": gr.update(visible=True), "stage": gr.update(photo="", visible="hidden")}
            return self.parts.updates(**empty, again=gr.update(visible=False))
        with show_errors(photo):
            preview = pictures.preview_photo(photo)
        return self.parts.updates(
            photo=gr.update(visible="hidden"),
            stage=gr.update(photo=preview.address, visible=True),
            again=gr.update(visible=True),
            noise=preview.noise,
        )

    def count(self, photo: str | None, more: list[str] | None) -> str:
        """Return the text of the button."""
        photos = bool(photo) + len(more or [])
        return f"Restore {photos} photos" if photos > 1 else "Restore"

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

    def estimate(self, **values: Any) -> dict[Any, Any]:
        """Say what the first photo takes, and whether the prior fits it."""
        inputs, plan, text = PageInputs(**values), None, ""
        if inputs.photos:
            try:
                prior, planner = self.priors.get(inputs.prior), self.priors.planner(inputs.prior, "estimate")
                edits = inputs.edits()
                with TemporaryDirectory(prefix="restore-") as folder:
                    plan = work.estimate(inputs.photos[0], prior, inputs.request(), planner, folder, edits)
                text = format_plan(plan, len(inputs.photos))
            except RestoreError as error:
                text = html.escape(to_sentence(str(error)))
        return self.parts.updates(plan=text, fits=models.describe_fit(self.priors, inputs.prior, plan))

    def begin(self, request: gr.Request) -> dict[Any, Any]:
        """Answer the button at once; other visitors may come first."""
        self.stops[request.session_hash] = threading.Event()
        hidden = {name: gr.update(visible=False) for name in RESULTS}
        return self.parts.updates(status=format_status("Waiting for its turn …"), **hidden) | self._buttons(False)

    def finish(self) -> dict[Any, Any]:
        return self._buttons(True)

    def report_failure(self) -> str:
        """Answer an unexpected exception; gradio's log has the traceback."""
        return format_status("something went wrong; the terminal of this page shows what", bad=True)

    def restore(self, request: gr.Request, **values: Any) -> Iterator[dict[Any, Any]]:
        stop = self.stops.setdefault(request.session_hash, threading.Event())
        inputs, files, outcomes = PageInputs(**values), [], []
        try:
            wanted, edits, photos = inputs.request(), inputs.edits(), inputs.photos
            prior, planner = self.priors.get(inputs.prior), self.priors.planner(inputs.prior, "restore")
        except RestoreError as error:
            yield self.parts.updates(status=format_status(str(error), bad=True))
            return
        with TemporaryDirectory(prefix="restore-") as folder:
            for item in work.restore(photos, prior, wanted, planner, folder, stop, edits):
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

    def cancel(self, request: gr.Request) -> str:
        if request.session_hash in self.stops:
            self.stops[request.session_hash].set()
        return format_status("Cancelling …")

    def leave(self, request: gr.Request) -> None:
        self.cancel(request)
        self.stops.pop(request.session_hash, None)

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
        return self.describe_prior(prior) | self.parts.updates(
            prior=gr.update(choices=self.priors.choices(), value=prior)
        )

    def _buttons(self, ready: bool) -> dict[Any, Any]:
        return self.parts.updates(go=gr.update(interactive=ready), cancel=gr.update(interactive=not ready))


class show_errors:
    """Context manager that shows a RestoreError as a sentence on the page, without the folders of `paths`."""

    def __init__(self, *paths: str | None) -> None:
        self.paths = paths

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, RestoreError):
            message = hide_folders(str(error), *self.paths)
            raise gr.Error(to_sentence(message), print_exception=False) from None


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
