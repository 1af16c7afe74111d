"""`restore ui` as a process: from its first line to the removal of what visitors uploaded."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from operators import RestoreError
from restore.app.page.store import clear_store, open_store

LOCAL = ("127.0.0.1", "localhost", "::1")
ENDINGS = ("SIGINT", "SIGTERM", "SIGHUP")


def serve(
    load: Callable[[], Any],
    *,
    host: str,
    port: int | None,
    building: Mapping[str, Any] | None = None,
    **launching: Any,
) -> None:
    """Serve the page until the process is told to end, then remove every upload and result.

    load: returns the Restorer that the page opens with. port: None for the first free one from 7860 on. building:
    options of build_page; launching: of `launch`. Raises RestoreError if it cannot listen there.
    """
    _say("starting the page, which takes a few seconds ...")
    os.umask(0o077)
    _check_port(host, port)
    numbers = [getattr(signal, name) for name in ENDINGS if hasattr(signal, name)]
    previous = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    open_store()  # before gradio is imported, which makes folders then
    try:
        from restore.app.page import build_page, launch

        page = build_page(load(), **building or {})
        try:
            options = {"server_name": host, "server_port": port, "prevent_thread_lock": True, "quiet": True}
            _, address, public = launch(page, **options, **launching)
        except OSError as error:
            raise RestoreError(f"host={host} cannot be listened on: {error}") from error
        _say(f"the page is at {public or address.rstrip('/')} (Ctrl-C ends it)")
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        clear_store()
        _say("the page has ended, and what was uploaded is removed")
        os._exit(0)  # a thread in the middle of a network would abort the interpreter's own end
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check_port(host: str, port: int | None) -> None:
    """Raise RestoreError, before anything is loaded, if something else listens at this port."""
    if port is None:
        return
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RestoreError(f"port={port} must be free on host={host}, got: {error.strerror or error}") from None


def _say(sentence: str) -> None:
    print(f"restore: {sentence}", file=sys.stderr, flush=True)
