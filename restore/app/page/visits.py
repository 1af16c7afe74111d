"""What a visitor, a tab of the browser, has running and has got: kept while the tab is open."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from restore.app.page.pictures import Edits
from restore.app.page.request import Request
from restore.app.page.store import make_work_folder
from restore.app.page.work import Result


@dataclass(frozen=True)
class Asked:
    """One photo and what was asked of it, to be asked again."""

    photo: str
    edits: Edits | None
    prior: str
    request: Request


@dataclass
class Visit:
    """The restorations that a tab shows, in their own folder. results, asked: of each photo that succeeded."""

    stop: threading.Event = field(default_factory=threading.Event)
    work: TemporaryDirectory | None = None
    results: list[Result] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    running: bool = False
    left: bool = False

    def folder(self, name: str) -> Path:
        self.work = self.work or make_work_folder()
        return Path(self.work.name) / name

    def add(self, result: Result, asked: Asked, place: int | None = None) -> int:
        """Keep the result of a photo, in the place of an earlier one of it; return its place."""
        if place is None:
            self.results.append(result)
            self.asked.append(asked)
            return len(self.results) - 1
        self.results[place] = result
        return place

    @contextmanager
    def run(self) -> Iterator[None]:
        """Within the block, the folder is in use."""
        self.running = True
        try:
            yield
        finally:
            self.running = False
            if self.left:
                self._clean()

    def leave(self) -> None:
        """Stop what is running and remove the files, now or once it has stopped."""
        self.stop.set()
        self.left = True
        if not self.running:
            self._clean()

    def _clean(self) -> None:
        if self.work is not None:
            self.work.cleanup()


class Visits:
    """The visits to one page, by session."""

    def __init__(self) -> None:
        self.by_session: dict[str, Visit] = {}

    def begin(self, session: str) -> Visit:
        """Return a new visit of this session; the files of the one before are removed."""
        self.leave(session)
        visit = self.by_session[session] = Visit()
        return visit

    def get(self, session: str) -> Visit:
        return self.by_session.get(session) or self.begin(session)

    def leave(self, session: str) -> None:
        if visit := self.by_session.pop(session, None):
            visit.leave()
