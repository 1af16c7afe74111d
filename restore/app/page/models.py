"""Priors on the page: what each knows, whether it fits a photo, and the download of another one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from operators import RestoreError
from restore import restorer, zoo
from restore.app.page.request import Request
from restore.app.page.text import to_sentence
from restore.app.priors import FACES, PHOTOS, PriorChooser
from restore.backbones.memory_options import free_memory
from restore.memory import Plan, Planner
from restore.zoo.registry import Model

CHOSEN = "chosen"  # for each photo


class Priors:
    """The prior that the page was opened with and at most one other, each with a planner.

    named: somebody asked for that prior, so it is what the page begins with. offline: never download. fetching: whether
    a visitor may download. options: of restore.load for the others.
    """

    def __init__(
        self, first: Any, offline: bool = False, fetching: bool = True, named: bool = False, **options: Any
    ) -> None:
        self.first, self.offline, self.fetching, self.named, self.options = first, offline, fetching, named, options
        self.loaded = {first.name: first}
        self.choosers: dict[tuple[str | None, str], PriorChooser] = {}
        self.planners: dict[tuple[str, str], Planner] = {}
        self.lock = threading.RLock()

    def get(self, name: str | None) -> Any:
        """Return the Restorer of this name, loaded. Raises RestoreError if it is not on this machine."""
        name = self.first.name if name in (None, CHOSEN) else name
        with self.lock:
            if name not in self.loaded:
                if name not in list_priors():
                    raise RestoreError(f"there is no prior called {name} to choose here")
                if zoo.locate(name).path is None:
                    raise RestoreError(f"the prior {name} is not on this machine yet: download it first")
                self._unload()
                self.loaded[name] = restorer.load(name, **{**self.options, "offline": True})
            return self.loaded[name]

    def _unload(self) -> None:
        """Forget the other prior and all that holds it; a restoration that still runs with it keeps its own."""
        self.loaded = {self.first.name: self.first}
        self.planners = {key: own for key, own in self.planners.items() if own.restorer is self.first}
        for key, chooser in list(self.choosers.items()):
            if any(own.restorer is not self.first for own in list(chooser.planners.values())):
                del self.choosers[key]
        free_memory(self.first.device)

    def planner(self, name: str | None, use: str) -> Planner:
        """Return the planner of a prior and a use; a Planner must not be shared by several threads."""
        with self.lock:
            prior = self.get(name)
            if (prior.name, use) not in self.planners:
                self.planners[prior.name, use] = Planner(prior)
            return self.planners[prior.name, use]

    def select(self, name: str | None, use: str, request: Request) -> Planner | PriorChooser:
        """Return the planner of a prior or, for CHOSEN, what chooses one of the shipped priors for each photo.

        A class and PAG are the first prior's own.
        """
        if name != CHOSEN:
            return self.planner(name, use)
        special = request.label is not None or request.pag_scale is not None or is_missing(PHOTOS)
        key = (FACES if special else None, use)
        with self.lock:
            if key not in self.choosers:
                self.choosers[key] = PriorChooser(self.get, key[0])
            return self.choosers[key]

    @property
    def default(self) -> str:
        """What to begin with: chosen for each photo, if the page was opened with no prior but the shipped one."""
        return CHOSEN if self.first.name == FACES and not self.named else self.first.name

    def choices(self) -> list[tuple[str, str]]:
        """Return (text, name) of every prior to choose from."""
        known = list_priors()
        chosen = [("Chosen for the photo", CHOSEN)] if self.first.name == FACES else []
        own = chosen if self.first.name in known else [(f"{self.first.name} (yours)", self.first.name)]
        texts = {name: f"{entry.resolution} px {entry.subject or 'pictures'}: {name}" for name, entry in known.items()}
        return own + [(text + ", to be downloaded" * is_missing(name), name) for name, text in texts.items()]

    def fetch(self, name: str, progress: Callable[[int, int | None], None]) -> None:
        """Download a prior of the list. Raises RestoreError if that fails or is not allowed here."""
        if name not in list_priors():
            raise RestoreError(f"there is no prior called {name} to download here")
        if not self.fetching:
            raise RestoreError(
                f"this page is open to others, so it downloads nothing: run `restore models pull {name}` on its machine"
            )
        if zoo.is_offline(self.offline or None):
            raise RestoreError("this page is offline: it downloads nothing")
        try:
            zoo.pull(name, progress=progress)
        except RestoreError as error:  # its message has the folders and addresses of this machine
            raise RestoreError(
                f"{name} could not be downloaded: is there a connection, does its publisher ask for a login? "
                f"`restore models pull {name}` on the machine of this page says why"
            ) from error


def list_priors() -> dict[str, Model]:
    """Return the registered priors that need no class, smallest pictures first."""
    known = [
        item
        for item in zoo.read_registry().items()
        if item[1].kind not in ("autoencoder", "metric", "pipeline") and not item[1].classes
    ]
    return dict(sorted(known, key=lambda item: item[1].resolution))


def class_choices(prior: Any) -> list[tuple[str, str]]:
    """Return (text, label) of the named classes of a Restorer's prior; [] if it has none."""
    names = getattr(prior.backbone, "labels", ())
    return [("decide for me", ""), *((name, name) for name in names)] if names else []


def describe_fit(priors: Priors, name: str | None, plan: Plan | None = None) -> str:
    """Return what a prior knows, or why it cannot be used."""
    try:
        return format_fit(priors.get(name), plan)
    except RestoreError as error:
        return to_sentence(str(error))


def format_fit(prior: Any, plan: Plan | None = None) -> str:
    """Return what the prior of a Restorer knows and whether the photo fits. plan: of this photo, for its size."""
    entry = zoo.read_registry().get(prior.name)
    side = prior.backbone.resolution * prior.backbone.downscale
    sentence = f"This prior knows {side}-pixel {(entry and entry.subject) or 'pictures'}."
    if plan is not None and plan.windows > 1:
        height, width = plan.size
        sentence += (
            f" Your result of {width} × {height} pixels does not fit into it: it is restored in {plan.windows} "
            f"overlapping windows, and in none of them does the prior see the whole photo."
        )
    if entry is not None and entry.narrow:
        sentence += f" Anything else is filled in with what {entry.subject} taught it."
    return sentence


def describe_prior(name: str) -> str:
    """Return Markdown: licence, size, whether it is here, and where it is from."""
    entry = list_priors().get(name)
    if name == CHOSEN:
        return f"Small pictures and faces: *embedded*; photos: *{PHOTOS}*."
    if entry is None:
        return f"**{name}** is your own model."
    here = "not on this machine yet" if is_missing(name) else "on this machine"
    lines = [f"**{entry.title}** ({here})", f"Licence: {entry.licence}", f"Size: {_format_size(entry)}"]
    lines += [f"[Where it is from]({entry.page})"] if "://" in entry.page else []
    lines += [f"*{' '.join(entry.notes.split())}*"] if entry.notes else []
    return "  \n".join(lines)


def is_missing(name: str) -> bool:
    """Return whether a prior of the list is not on this machine."""
    return name in list_priors() and zoo.locate(name).path is None


def _format_size(entry: Model) -> str:
    """Return what is known of a download's size before it begins."""
    if entry.folder is not None:
        return "comes with the package"
    if entry.download is not None and entry.download.size:
        return _format_bytes(entry.download.size)
    if entry.parameters:
        return f"about {_format_bytes(4 * entry.parameters)} ({entry.parameters / 1e6:.0f} million parameters)"
    return "not stated; several GB" if entry.hub is not None else "not stated"


def _format_bytes(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"
