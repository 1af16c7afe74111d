"""HTTP servers on this machine that serve weights, and weights to serve."""

from __future__ import annotations

import hashlib
import http.server
import io
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def archive(size=300_000, seed=0):
    """Bytes built like a torch.save file: a zip archive with its directory at the end."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", np.random.default_rng(seed).bytes(size))
    return buffer.getvalue()


def weights(**changes):
    """Bytes of a guided-diffusion checkpoint, as its authors save it."""
    state = load_file(Path(__file__).parents[1] / "golden" / "nets" / "adm_c.safetensors")
    buffer = io.BytesIO()
    torch.save(state | changes, buffer)
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at every path. cut: bytes after which the connection breaks, once each."""

    daemon_threads = True

    def __init__(self, content, cut=(), ranges=True, corrupt=False, delay=0.0, html=False, status=None):
        self.content, self.cut, self.ranges, self.corrupt, self.delay = content, list(cut), ranges, corrupt, delay
        self.html, self.status = html, status
        self.requests: list[str | None] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/weights.pt"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append(wanted)
        if server.status or server.html:
            self.send_response(server.status or 200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(b"<!DOCTYPE html><p>too many downloads</p>")
            return
        content, tag = server.content, f'"{hashlib.md5(server.content).hexdigest()}"'
        honoured = wanted and server.ranges and self.headers.get("If-Range", tag) == tag
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if honoured else 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[start:]
        self.send_response(206 if honoured else 200)
        if honoured:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", tag)
        self.end_headers()
        if server.corrupt:
            body = bytes(body[:1000]) + bytes([body[1000] ^ 1]) + bytes(body[1001:])
        time.sleep(server.delay)
        if server.cut:
            self.wfile.write(body[: server.cut.pop(0)])
            self.close_connection = True  # fewer bytes than announced
            return
        self.wfile.write(body)


def serving(content, **options):
    return running(Server(content, **options))


@contextmanager
def running(server):
    """Serve in a thread of its own until the block ends."""
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def sha(content):
    return hashlib.sha256(content).hexdigest()
