"""What each thing on the page does: gradio's values in, gradio's updates out. The work itself is in `work`."""

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
from restore.app.page.models import Priors
from restore.app.page.tasks import Wish, drawn, number
from restore.app.plan import Plan, duration
from restore.images import estimate

# What a restoration changes on the page, in this order.
RESULTS = ("status", "forming", "slider", "download", "gallery", "guessed", "files", "experts", "guidance", "sidecar")


class Clicks:
    def __init__(self, priors: Priors) -> None:
        self.priors = priors
        self.stops: dict[str, threading.Event] = {}  # by the browser's tab

    def looked(self, photo: str | None) -> list[Any]:
        """A photo was chosen, or taken away: (upload, stage, again, noise)."""
        empty = [gr.update(visible=True), gr.update(photo="", visible="hidden"), gr.update(visible=False)]
        if not photo:
            return [*empty, gr.skip()]
        with sentences(photo):
            look = pictures.look(photo)
        return [
            gr.update(visible="hidden"),
            gr.update(photo=look.preview, visible=True),
            gr.update(visible=True),
            look.noise,
        ]

    def chosen(self, task: str) -> list[Any]:
        """Only what the task needs: (stage, filling, factor, sharpening, noise)."""
        seen = [task == name for name in ("fill", "enlarge", "sharpen", "denoise")]
        return [gr.update(painting=task == "fill"), *(gr.update(visible=on) for on in seen)]

    def propose(self, photo: str | None, stage: str, sensitivity: float) -> Any:
        with sentences(photo):
            if not photo:
                raise RestoreError("choose a photo first")
            record = pictures.edited(pictures.read(photo), pictures.parse(stage))
            missing = pictures.proposed(pictures.limited(record.pixels), sensitivity)
        return gr.update(proposal=pictures.brush(missing))

    def masked(self, mask: str | None) -> Any:
        """An uploaded mask becomes paint, to be corrected."""
        with sentences(mask):
            return gr.update(proposal=pictures.brush(pictures.uploaded(mask))) if mask else gr.skip()

    def measured(self, photo: str | None, stage: str) -> Any:
        with sentences(photo):
            if not photo:
                raise RestoreError("choose a photo first")
            record = pictures.edited(pictures.read(photo), pictures.parse(stage))
            return max(0.3, round(estimate.blur_size(record.pixels), 1))

    def estimated(self, *given: Any) -> tuple[str, str]:
        """(what it will take, whether the prior fits) for the first photo."""
        asked = Asked(*given)
        if not asked.photos:
            return "", self.fit(asked.prior)
        try:
            edits = asked.edits()
            with TemporaryDirectory(prefix="restore-") as folder:
                prior, planner = self.priors.get(asked.prior), self.priors.planner(asked.prior, "estimate")
                plan = work.estimate(asked.photos[0], prior, asked.wish(), planner, folder, edits)
        except RestoreError as error:
            return html.escape(capital(str(error))), self.fit(asked.prior)
        return takes(plan, len(asked.photos)), self.fit(asked.prior, plan)

    def begin(self, request: gr.Request) -> list[Any]:
        """The button was pressed; others may be before."""
        self.stops[request.session_hash] = threading.Event()
        hidden = [gr.update(visible=False)] * 7
        return [status("Waiting for its turn …"), *hidden, gr.skip(), gr.skip(), *buttons(False)]

    def failed(self) -> list[Any]:
        """Something that no sentence was thought of for; gradio's log has the traceback."""
        return update(status=status("something went wrong; the page's console says what", bad=True))

    def restore(self, request: gr.Request, *given: Any) -> Iterator[list[Any]]:
        stop = self.stops.setdefault(request.session_hash, threading.Event())
        asked, files, said = Asked(*given), [], []
        try:
            wish, edits, photos = asked.wish(), asked.edits(), asked.photos
            prior, planner = self.priors.get(asked.prior), self.priors.planner(asked.prior, "restore")
        except RestoreError as error:
            yield update(status=status(str(error), bad=True))
            return
        with TemporaryDirectory(prefix="restore-") as folder:
            for item in work.restore(photos, prior, wish, planner, folder, stop, edits):
                if isinstance(item, work.Step):
                    picture = gr.skip() if item.picture is None else gr.update(value=item.picture, visible=True)
                    words = status(item.sentence, item.share, item.detail, said)
                    yield update(status=words, forming=picture)
                    continue
                said.append(_said(item))
                if item.error is None:
                    files += map(str, item.files)
                    yield update(**self._seen(item, files), status=status("Done.", said=said))
            # A generator: what comes after a yield, the end of the folder, waits until the page has the files.
            good = sum(done for _, done in said)
            end = said[-1][0] if len(said) == 1 else f"{good} of {len(photos)} photos done"
            end = status(end, said=said if len(said) > 1 else (), bad=good < len(photos))
            yield update(status=end, forming=gr.update(visible=False))

    def cancel(self, request: gr.Request) -> str:
        if request.session_hash in self.stops:
            self.stops[request.session_hash].set()
        return status("Cancelling …")

    def left(self, request: gr.Request) -> None:
        self.cancel(request)
        self.stops.pop(request.session_hash, None)

    def fit(self, name: str | None, plan: Plan | None = None) -> str:
        try:
            return f"{models.fit(self.priors.get(name), plan)} Others are under *The prior*, below."
        except RestoreError as error:
            return capital(str(error))

    def shows(self, name: str) -> Any:
        """The question what the photo shows, where the prior knows several kinds."""
        try:
            choices = models.labels(self.priors.get(name))
        except RestoreError:  # which the line about the prior says
            choices = []
        return gr.update(choices=choices, value="", visible=bool(choices))

    def about(self, name: str) -> tuple[str, Any]:
        """(what a prior is, the button that fetches it)."""
        return models.described(name), gr.update(visible=models.missing(name))

    def fetch(self, name: str, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        def told(done: int, whole: int | None) -> None:
            progress((done // 1_000_000, whole and whole // 1_000_000), desc=f"fetching {name}", unit="MB")

        progress(0, desc=f"fetching {name}")
        try:
            self.priors.fetch(name, told)
        except RestoreError as error:
            text, button = self.about(name)
            return [f"**{capital(str(error))}**\n\n{text}", button, gr.skip()]
        return [*self.about(name), gr.update(choices=self.priors.choices(), value=name)]

    @staticmethod
    def _seen(done: work.Done, files: list[str]) -> dict[str, Any]:
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


@dataclass(frozen=True)
class Asked:
    """What stands on the page when something is asked for, in the order of its parts."""

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
        """Of the first photo. Raises RestoreError."""
        return pictures.parse(self.stage) if self.photo else None

    def wish(self) -> Wish:
        """Raises RestoreError for what was typed or drawn and cannot be read."""
        moved = self.task == "sharpen" and self.blur == "motion"
        return Wish(
            task=self.task,
            factor=self.factor,
            blur=self.blur,
            std=self.std,
            path=drawn(self.path, self.extent) if moved else (),
            sigma=self.noise if self.task == "denoise" else number(self.sigma, "sigma_y"),
            sensitivity=self.sensitivity,
            quality=self.quality,
            samples=3 if self.three else 1,
            steps=parse_steps((self.steps or "").strip() or None),
            seed=int(self.seed or 0),
            pag_scale=number(self.scale, "PAG scale"),
            pictures=self.traced,
            label=self.label or None,
        )


class sentences:
    """Context manager that shows a user's mistake as a sentence, without the folders of files."""

    def __init__(self, *paths: str | None) -> None:
        self.paths = paths

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, RestoreError):
            raise gr.Error(capital(work.bare(str(error), *self.paths)), print_exception=False) from None


def update(**changes: Any) -> list[Any]:
    """The changes of a restoration, in order."""
    return [changes.get(name, gr.skip()) for name in RESULTS]


def buttons(ready: bool) -> list[Any]:
    return [gr.update(interactive=ready), gr.update(interactive=not ready)]


def status(sentence: str, share: float | None = None, detail: str = "", said: Any = (), bad: bool = False) -> str:
    """HTML: one sentence, how far it is, what was said of the photos before."""
    parts = [f'<p role="status">{html.escape(capital(sentence))}</p>']
    if share is not None:
        parts.append(f'<progress aria-label="Progress" max="1" value="{share:.3f}"></progress>')
    parts += [f"<small>{html.escape(detail)}</small>"] if detail else []
    if said:
        parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line, _ in said) + "</ul>")
    return f'<div class="status{" bad" if bad else ""}">{"".join(parts)}</div>'


def counted(photo: str | None, more: list[str] | None) -> str:
    """What stands on the button."""
    count = bool(photo) + len(more or [])
    return f"Restore {count} photos" if count > 1 else "Restore"


def idle() -> str:
    return status("Choose a photo, say what should be done, and press Restore.")


def takes(plan: Plan, count: int) -> str:
    """What a photo takes, for a person and below it for an expert."""
    if not plan.fits:
        need, free = plan.memory / 1e9, plan.available / 1e9
        return f"<b>Too large for this machine:</b> {need:.1f} GB of memory, {free:.1f} GB are free. Crop it first."
    each = " for the first photo" if count > 1 else ""
    return f"<b>About {duration(plan.seconds)}</b>{each}<br><small>{html.escape(plan.line())}</small>"


def capital(sentence: str) -> str:
    first = sentence.split(" ")[0]
    start = first if "." in first or "-" in first else first[:1].upper() + first[1:]  # a file's name stays
    return start + sentence[len(first) :] + ("" if sentence[-1:] in ".…!?" else ".")


def _said(done: work.Done) -> tuple[str, bool]:
    if done.error is None:
        return f"{done.name}: done in {duration(done.seconds)}", True
    return done.error if not done.name or done.name in done.error else f"{done.name}: {done.error}", False
