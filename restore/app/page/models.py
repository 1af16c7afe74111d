"""Priors on the page: what each knows, whether it fits a photo, and the fetching of another one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from operators import RestoreError
from restore import restorer, zoo
from restore.app.plan import Plan, Planner
from restore.zoo.registry import Model


class Priors:
    """The prior that the page was opened with and at most one other, each with a planner.

    offline: nothing is ever fetched. fetching: whether a visitor may fetch. options: of restore.load for the others.
    """

    def __init__(self, first: Any, offline: bool = False, fetching: bool = True, **options: Any) -> None:
        self.first, self.offline, self.fetching, self.options = first, offline, fetching, options
        self.loaded = {first.name: first}
        self.planners: dict[tuple[str, str], Planner] = {}
        self.lock = threading.Lock()

    def get(self, name: str | None) -> Any:
        """The Restorer of this name, loaded if it is on this machine. Raises RestoreError where it is not."""
        name = name or self.first.name
        with self.lock:
            if name not in self.loaded:
                if name not in offered():
                    raise RestoreError(f"there is no prior called {name} to choose here")
                if zoo.locate(name).path is None:
                    raise RestoreError(f"the prior {name} is not on this machine yet: fetch it first")
                loaded = restorer.load(name, **{**self.options, "offline": True})
                self.loaded = {self.first.name: self.first, name: loaded}
            return self.loaded[name]

    def planner(self, name: str | None, use: str) -> Planner:
        """Each use has its own: a Planner is not for several threads."""
        found = self.get(name)
        key = (found.name, use)
        if key not in self.planners or self.planners[key].restorer is not found:
            self.planners[key] = Planner(found)
        return self.planners[key]

    def choices(self) -> list[tuple[str, str]]:
        """(what stands in the list, name)."""
        known = offered()
        own = [] if self.first.name in known else [(f"{self.first.name} (yours)", self.first.name)]
        return own + [(_line(name, entry), name) for name, entry in known.items()]

    def fetch(self, name: str, progress: Callable[[int, int | None], None]) -> None:
        """Download a prior of the list. Raises RestoreError where that fails or is not allowed here."""
        if name not in offered():
            raise RestoreError(f"there is no prior called {name} to fetch here")
        if not self.fetching:
            raise RestoreError(
                f"this page is open to others, so it fetches nothing: run `restore models pull {name}` on its machine"
            )
        if zoo.is_offline(self.offline or None):
            raise RestoreError("this page is offline: it fetches nothing")
        try:
            zoo.pull(name, progress=progress)
        except RestoreError as error:  # with the folders and addresses of this machine
            raise RestoreError(
                f"{name} could not be fetched: is there a connection, does its publisher ask for a login? "
                f"`restore models pull {name}` on the machine of this page says why"
            ) from error


def offered() -> dict[str, Model]:
    """Registered priors that need no class, smallest pictures first."""
    priors = {name: entry for name, entry in zoo.models().items() if entry.kind != "autoencoder" and not entry.classes}
    return dict(sorted(priors.items(), key=lambda item: item[1].resolution))


def labels(found: Any) -> list[tuple[str, str]]:
    """(what stands on the page, label) of the classes of a Restorer's prior that have names; [] where none has."""
    names = getattr(found.backbone, "labels", ())
    return [("not told", ""), *((name, name) for name in names)] if names else []


def knows(found: Any) -> str:
    """ "64-pixel faces": what this Restorer's prior was trained on, by its own description."""
    entry = zoo.models().get(found.name)
    side = found.backbone.resolution * found.backbone.downscale
    return f"{side}-pixel {entry.subject if entry is not None and entry.subject else 'pictures'}"


def fit(found: Any, plan: Plan | None = None) -> str:
    """Whether the prior fits the photo, in a sentence or two. plan: of this photo, for its size."""
    entry = zoo.models().get(found.name)
    sentence = f"This prior knows {knows(found)}."
    if plan is not None and plan.windows > 1:
        height, width = plan.size
        sentence += (
            f" Your result of {width} × {height} pixels does not fit into it: it is restored in {plan.windows} "
            f"overlapping windows, and in none of them does the prior see the whole photo."
        )
    if entry is not None and entry.narrow:
        sentence += f" Anything else is filled in with what {entry.subject} taught it."
    return sentence


def described(name: str) -> str:
    """Markdown: licence, size, whether it is here, and where it is from."""
    entry = offered().get(name)
    if entry is None:
        return f"**{name}** is your own model."
    here = "on this machine" if zoo.locate(name).path is not None else "not on this machine yet"
    lines = [f"**{entry.title}** ({here})", f"Licence: {entry.licence}", f"Size: {size(entry)}"]
    lines += [f"[Where it is from]({entry.page})"] if "://" in entry.page else []
    lines += [f"*{' '.join(entry.notes.split())}*"] if entry.notes else []
    return "  \n".join(lines)


def missing(name: str) -> bool:
    """Whether a prior of the list is not on this machine."""
    return name in offered() and zoo.locate(name).path is None


def size(entry: Model) -> str:
    """Of what is fetched, as far as it is known before."""
    if entry.folder is not None:
        return "comes with the package"
    if entry.download is not None and entry.download.size:
        return _bytes(entry.download.size)
    if entry.parameters:
        return f"about {_bytes(4 * entry.parameters)} ({entry.parameters / 1e6:.0f} million parameters)"
    return "not stated; several GB" if entry.hub is not None else "not stated"


def _line(name: str, entry: Model) -> str:
    here = "" if zoo.locate(name).path is not None else ", to be fetched"
    return f"{entry.resolution} px {entry.subject or 'pictures'}: {name}{here}"


def _bytes(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"
