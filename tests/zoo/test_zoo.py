"""The zoo against real HTTP servers on this machine: cut connections, corrupted bytes, two pulls at once."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from operators import RestoreError
from restore import zoo
from restore.zoo import download, registry


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


@contextmanager
def serving(content, **options):
    server = Server(content, **options)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def fetch(server, target, **options):
    return download.fetch_file((server.url,), target, patience=0.01, **options)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RESTORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RESTORE_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def register(tmp_path, monkeypatch):
    """Adds a model to a copy of the configuration folder, read by the real registry."""
    root = tmp_path / "configs"
    (root / "model").mkdir(parents=True)
    monkeypatch.setattr(registry, "configs_dir", lambda: root)

    def add(name="small", sha256=None, size=None, urls=("http://127.0.0.1:9/weights.pt",)):
        entry = {"kind": "adm", "title": "t", "page": "p", "licence": "MIT", "resolution": 64}
        entry["download"] = {"file": "weights.pt", "urls": list(urls), "size": size, "sha256": sha256}
        entry["options"] = {"head_channels": 16, "attention_order": "new"}
        (root / "model" / f"{name}.yaml").write_text(json.dumps(entry))

    return add


def sha(content):
    return hashlib.sha256(content).hexdigest()


def test_a_cut_download_continues_where_it_stopped(tmp_path):
    content, seen = archive(), []
    with serving(content, cut=[100_000, 50_000]) as server:
        digest = fetch(
            server, tmp_path / "w.pt", sha256=sha(content), progress=lambda done, total: seen.append((done, total))
        )
    first, second = (int(wanted[6:-1]) for wanted in server.requests[1:])  # whole blocks are kept
    assert server.requests[0] is None and len(server.requests) == 3
    assert 60_000 < first <= 100_000 and first < second <= first + 50_000
    assert digest == sha(content) and (tmp_path / "w.pt").read_bytes() == content
    assert seen[-1] == (len(content), len(content)) and sorted(seen) == seen
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_a_killed_process_leaves_a_part_that_the_next_one_finishes(tmp_path):
    content = archive()
    code = "import sys; from pathlib import Path; from restore.zoo import download;"
    code += "download.fetch_file((sys.argv[1],), Path(sys.argv[2]), progress=lambda *_: __import__('os')._exit(9))"
    with serving(content, cut=[120_000]) as server:
        target = tmp_path / "w.pt"
        done = subprocess.run([sys.executable, "-c", code, server.url, str(target)], cwd=Path(__file__).parents[2])
        assert done.returncode == 9 and not target.exists()
        kept = (tmp_path / "w.pt.part").stat().st_size
        assert 0 < kept <= 120_000
        fetch(server, target, sha256=sha(content))
    assert server.requests == [None, f"bytes={kept}-"] and target.read_bytes() == content


def test_a_server_without_ranges_or_with_a_new_file_starts_over(tmp_path):
    content, other = archive(), archive(seed=1)
    with serving(content, cut=[100_000], ranges=False) as server:
        fetch(server, tmp_path / "w.pt", sha256=sha(content))
    assert server.requests == [None, "bytes=98304-"] and (tmp_path / "w.pt").read_bytes() == content
    with serving(content, cut=[100_000] * 3) as server:
        with pytest.raises(RestoreError):
            fetch(server, tmp_path / "v.pt", sha256="0" * 64, attempts=0)  # gives up at the first cut
        server.content = other  # the publisher replaces the file: its parts must not be mixed
        server.cut = []
        fetch(server, tmp_path / "v.pt")
    assert (tmp_path / "v.pt").read_bytes() == other and server.requests[-1] == "bytes=98304-"


def test_a_complete_or_overlong_part_is_recognised(tmp_path):
    content = archive()
    for part in (content, content + b"x"):
        with serving(content) as server:
            (tmp_path / "w.pt.part").write_bytes(part)
            (tmp_path / "w.pt.part.json").write_text(json.dumps({"url": server.url, "validator": None}))
            fetch(server, tmp_path / "w.pt", sha256=sha(content))
        assert (tmp_path / "w.pt").read_bytes() == content
        assert server.requests == [f"bytes={len(part)}-"] + ([None] if part is not content else [])


def test_a_bad_old_part_is_thrown_away_once(tmp_path):
    content = archive()
    with serving(content) as server:
        (tmp_path / "w.pt.part").write_bytes(b"x" * 1000)
        (tmp_path / "w.pt.part.json").write_text(json.dumps({"url": server.url, "validator": None}))
        fetch(server, tmp_path / "w.pt", sha256=sha(content))
    assert server.requests == ["bytes=1000-", None] and (tmp_path / "w.pt").read_bytes() == content


def test_wrong_content_is_refused_and_nothing_is_left(tmp_path):
    content = archive()
    cases = (
        ({"corrupt": True}, {"sha256": sha(content)}, f"expected SHA-256 {sha(content)}, got "),
        ({}, {"size": 5}, f"has {len(content)} bytes instead of 5"),
        ({"html": True}, {}, "web page.*by hand"),
        ({"status": 404}, {}, "404.*by hand"),
    )
    for server_options, options, message in cases:
        with serving(content, **server_options) as server, pytest.raises(RestoreError, match=message):
            fetch(server, tmp_path / "w.pt", by_hand="Do it by hand.", **options)
        assert len(server.requests) == 1
    with serving(content[:-2000]) as server, pytest.raises(RestoreError, match="end of its archive is missing"):
        fetch(server, tmp_path / "w.pt")  # truncated at the publisher, no checksum known
    with pytest.raises(RestoreError, match="broke 2 times"):
        download.fetch_file(("http://127.0.0.1:9/w.pt",), tmp_path / "w.pt", patience=0.01, attempts=2)
    assert list(tmp_path.iterdir()) == []


def test_the_second_address_is_tried(tmp_path):
    content = archive()
    with serving(content, html=True) as first, serving(content) as second:
        download.fetch_file((first.url, second.url), tmp_path / "w.pt", sha256=sha(content))
    assert len(first.requests) == len(second.requests) == 1


def test_pull_caches_verifies_and_heals(cache, register):
    content = archive()
    with serving(content) as server:
        register(sha256=sha(content), size=len(content), urls=[server.url])
        assert zoo.locate("small").path is None
        path = zoo.pull("small")
        assert path == cache / "small" / "weights.pt" and zoo.locate("small").path == path
        assert zoo.pull("small") == path and len(server.requests) == 1
        path.write_bytes(content[:-1] + b"!")
        assert zoo.pull("small", verify=False) == path and len(server.requests) == 1
        with pytest.raises(RestoreError, match="expected SHA-256.*offline.*models import small"):
            zoo.pull("small", offline=True)
        assert zoo.pull("small").read_bytes() == content and len(server.requests) == 2


def test_an_unknown_checksum_is_recorded_and_then_verified(cache, register):
    content = weights()
    with serving(content) as server:
        register(urls=[server.url])
        path = zoo.pull("small")
        record = json.loads((cache / "small" / "weights.pt.json").read_text())
        assert record["sha256"] == sha(content) and record["checksum_from"] == "first use"
        path.unlink()
        server.content = weights(**{"out.2.bias": torch.ones(6).half()})
        with pytest.raises(RestoreError, match=f"{sha(content)}.*restore models forget small"):
            zoo.pull("small")
        zoo.forget_checksum("small")
        assert zoo.pull("small").read_bytes() == server.content
        zoo.forget_checksum("small")
        with pytest.raises(RestoreError, match="nothing to forget"):
            zoo.forget_checksum("small")
        assert zoo.locate("small").path == path  # the weights themselves stay


def test_two_processes_download_once(cache, register, tmp_path):
    content = archive()
    code = "import sys; from pathlib import Path; from restore.zoo import pull, registry;"
    code += "registry.configs_dir = lambda: Path(sys.argv[1]); print(pull('small'))"
    with serving(content, delay=1.0) as server:
        register(sha256=sha(content), urls=[server.url])
        command = [sys.executable, "-c", code, str(tmp_path / "configs")]
        root = Path(__file__).parents[2]
        both = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        paths = {process.communicate(timeout=60)[0].strip() for process in both}
        assert paths == {str(cache / "small" / "weights.pt")} and len(server.requests) == 1
        assert Path(paths.pop()).read_bytes() == content


def test_offline_never_asks_the_network(cache, register, monkeypatch):
    with serving(weights()) as server:
        register(urls=[server.url])
        for offline, variable in ((True, ""), (None, "1")):
            monkeypatch.setenv("RESTORE_OFFLINE", variable)
            with pytest.raises(RestoreError, match=f"{cache}/small/weights.pt.*offline.*{server.url}.*models import"):
                zoo.pull("small", offline=offline)
        assert server.requests == []
        zoo.pull("small", offline=False)  # the argument wins over the variable
        assert zoo.pull("small", offline=True).exists() and len(server.requests) == 1


def test_a_file_fetched_by_hand_is_verified_and_copied(cache, register, tmp_path):
    content = weights()
    good, bad, short = (tmp_path / name for name in ("good.pt", "bad.pt", "short.pt"))
    good.write_bytes(content)
    bad.write_bytes(content[:1000] + b"?" + content[1001:])
    short.write_bytes(content[:-5000])
    register(sha256=sha(content), size=len(content))
    register("unknown")
    with pytest.raises(RestoreError, match=f"bad.pt.*expected SHA-256 {sha(content)}, got {sha(bad.read_bytes())}"):
        zoo.import_file("small", bad)
    with pytest.raises(RestoreError, match=f"{len(content) - 5000} bytes instead of {len(content)}"):
        zoo.import_file("small", short)
    with pytest.raises(RestoreError, match="cut off"):
        zoo.import_file("unknown", short)
    (tmp_path / "page.pt").write_text("<html>")
    with pytest.raises(RestoreError, match="web page"):
        zoo.import_file("unknown", tmp_path / "page.pt")
    assert zoo.locate("small").path is None and zoo.locate("unknown").path is None
    path = zoo.import_file("small", good)
    assert path.read_bytes() == content and zoo.pull("small", offline=True) == path and good.exists()
    zoo.import_file("unknown", good)
    with pytest.raises(RestoreError, match="expected SHA-256.*restore models forget unknown"):
        zoo.import_file("unknown", bad)  # another file than the first time
    assert zoo.import_file("small", path) == path and path.read_bytes() == content


class Code:
    def __reduce__(self):
        return os.mkdir, (os.environ["RESTORE_TEST_PAYLOAD"],)


def other_files(folder):
    """What people have at hand instead of a checkpoint, and what the refusal says."""
    Image.new("RGB", (32, 32)).save(folder / "photo.png")
    (folder / "page.pt").write_text("Please log in to continue.\n<html></html>")
    torch.save({"time_embed.0.weight": torch.zeros(1), "hook": Code()}, folder / "code.pt")
    torch.save({"conv.weight": torch.zeros(1)}, folder / "other.pt")
    state = torch.load(io.BytesIO(weights()))
    torch.save({name: state[name] for name in state if name != "out.2.bias"}, folder / "incomplete.pt")
    return {
        "photo.png": "not a readable checkpoint",
        "page.pt": "not a readable checkpoint",
        "code.pt": "asks to run code",
        "other.pt": "not a guided-diffusion U-Net",
        "incomplete.pt": "1 tensors missing",
    }


def test_only_what_is_a_model_is_kept(cache, register, tmp_path, monkeypatch):
    monkeypatch.setenv("RESTORE_TEST_PAYLOAD", str(tmp_path / "ran"))
    (tmp_path / "files").mkdir()
    with serving(b"") as server:
        register(urls=[server.url])
        for file, message in other_files(tmp_path / "files").items():
            with pytest.raises(RestoreError, match=message):
                zoo.import_file("small", tmp_path / "files" / file)
            server.content = (tmp_path / "files" / file).read_bytes()
            with pytest.raises(RestoreError, match=f"{message}.*models import small"):
                zoo.pull("small")
            assert zoo.locate("small").path is None
            (cache / "small" / "weights.pt").write_bytes(server.content)  # put there by hand
            with pytest.raises(RestoreError, match=f"{message}.*offline"):
                zoo.pull("small", offline=True)
            (cache / "small" / "weights.pt").unlink()
            assert not (cache / "small" / "weights.pt.json").exists()
        assert not (tmp_path / "ran").exists()
        server.content = weights()
        found, backbone = zoo.load_backbone("small")
    assert found.path.read_bytes() == weights() and backbone.resolution == 64


def test_a_stable_diffusion_file_is_looked_into(cache, register, tmp_path):
    register()
    path = registry.configs_dir() / "model" / "small.yaml"
    path.write_text(path.read_text().replace('"adm"', '"stable-diffusion"'))
    (tmp_path / "adm.pt").write_bytes(weights())
    with pytest.raises(RestoreError, match="Stable Diffusion.*model.diffusion_model"):
        zoo.import_file("small", tmp_path / "adm.pt")
    torch.save({"state_dict": {"model.diffusion_model.out.0.weight": torch.zeros(1)}}, tmp_path / "sd.pt")
    assert zoo.import_file("small", tmp_path / "sd.pt").exists()


def test_what_a_name_or_path_means(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipeline, network, ddpm = tmp_path / "pipeline", tmp_path / "network", tmp_path / "ddpm"
    for folder, file, text in (
        (ddpm, "model_index.json", '{"unet": ["diffusers", "UNet2DModel"]}'),
        (pipeline, "model_index.json", "{}"),
        (network, "config.json", '{"_class_name": "UNet2DModel"}'),
    ):
        folder.mkdir()
        (folder / file).write_text(text)
    adm, sd = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path, key in ((adm, "out.0.weight"), (sd, "model.diffusion_model.out.0.weight")):
        header = json.dumps({key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    (tmp_path / "c.pt").write_bytes(archive(100))
    (tmp_path / "d.ckpt").write_bytes(archive(100))
    expected = {pipeline: "stable-diffusion", network: "adm", ddpm: "adm", adm: "adm", sd: "stable-diffusion"}
    expected |= {tmp_path / "c.pt": "adm", tmp_path / "d.ckpt": "stable-diffusion"}
    for path, kind in expected.items():
        found = zoo.locate(str(path))
        assert (found.kind, found.path, found.entry) == (kind, path, None)
    found = zoo.locate("nobody/nothing")
    assert (found.kind, found.path, found.hub.repo) == ("stable-diffusion", None, "nobody/nothing")
    adm.write_bytes(adm.read_bytes()[:10])
    for wrong, message in (
        ("adm-ffhq-265", "did you mean 'adm-ffhq-256'"),
        (str(tmp_path / "x.pt"), "no file or folder"),
        (str(tmp_path), "no model folder"),
        (str(adm), "cut off"),
        (__file__, "no weight file"),
    ):
        with pytest.raises(RestoreError, match=message):
            zoo.locate(wrong)


def test_finding_things_imports_no_torch():
    code = "import sys; from restore import zoo; zoo.locate('adm-ffhq-256'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_every_shipped_entry_is_complete():
    entries = zoo.read_registry()
    assert {"embedded", "adm-ffhq-256", "adm-imagenet-256", "adm-imagenet-512", "sd-1.5"} <= set(entries)
    for entry in entries.values():
        assert entry.licence and entry.title and entry.resolution in (64, 128, 256, 512, 1024)
        if entry.download:
            assert entry.download.file.endswith((".pt", ".ckpt")) and all(
                url.startswith("https://") for url in entry.download.urls
            )
            assert entry.kind == "latent" or entry.options["attention_order"] in ("legacy", "new")
            assert "restore models import" in zoo.explain_download(entry)
    assert entries["adm-imagenet-256"].download.size > 4 * entries["adm-imagenet-256"].parameters
    assert entries["adm-imagenet-256-cond"].class_conditional and not entries["adm-ffhq-256"].class_conditional


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licens": "MIT"}, "unknown key 'licens'; did you mean 'licence'"),
        (
            {"download": {"file": "a", "urls": [], "sha": "0"}},
            "key 'download.sha'; did you mean 'download.sha256'",
        ),
        ({"download": {"file": "a", "urls": [], "sha256": "12"}}, "64 hexadecimal"),
        ({"download": {"file": "a"}}, "download.urls is missing"),
        ({"kind": "amd"}, "unknown kind 'amd'; did you mean 'adm'"),
        ({"folder": "x"}, "exactly one"),
        ({"title": None}, None),
    ],
)
def test_registry_mistakes_are_named(tmp_path, change, message):
    entry = {
        "kind": "adm",
        "title": "t",
        "page": "p",
        "licence": "MIT",
        "resolution": 64,
        "download": {"file": "a", "urls": []},
    }
    (tmp_path / "m.yaml").write_text(json.dumps(entry | change))
    if message is None:
        assert registry.read_registry(tmp_path)["m"].resolution == 64
        (tmp_path / "m.yaml").write_text("a: [1")
        message = "not a readable YAML"
    with pytest.raises(RestoreError, match=message):
        registry.read_registry(tmp_path)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as downloading one repository takes."""

    files = {
        "model_index.json": b"{}",
        "unet/config.json": b'{"a": 1}',
        "unet/big_model.safetensors": b"0123456789" * 1000,
        "extra.ckpt": b"no",
    }
    commit = "a" * 40

    def log_message(self, *_):
        pass

    def reply(self, body, **headers):
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/owner/tiny"):
            listing = [
                {"rfilename": name, "type": "file", "path": name, "size": len(body), "oid": "0"}
                for name, body in self.files.items()
            ]
            if "/tree/" in path:
                return self.reply(json.dumps(listing).encode(), Content_Type="application/json")
            info = {"id": "owner/tiny", "modelId": "owner/tiny", "sha": self.commit, "siblings": listing}
            return self.reply(json.dumps(info).encode(), Content_Type="application/json")
        body = self.files.get(path.split(f"/resolve/{self.commit}/")[-1])
        if body is None:
            return self.send_error(404)
        self.reply(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=self.commit)

    do_HEAD = do_GET


def test_hub_models_come_from_the_hub_once_and_then_from_its_cache(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    code = """
from operators import RestoreError
from restore import zoo
from restore.zoo import store
from restore.zoo.registry import Hub
hub = Hub("owner/tiny", files=("model_index.json", "unet/*"))
assert store._snapshot(hub, offline=True) is None
folder = store._snapshot(hub, offline=False)
names = sorted(path.name for path in folder.rglob("*.*"))
assert names == ["big_model.safetensors", "config.json", "model_index.json"], names
assert zoo.pull("owner/tiny", offline=True) == folder == zoo.locate("owner/tiny").path
for repo in ("owner/missing",):
    for offline in (True, False):
        try:
            zoo.pull(repo, offline=offline)
        except RestoreError as error:
            assert repo in str(error), error
        else:
            raise AssertionError("pulled a repository that is not there")
try:
    store._snapshot(Hub("owner/tiny", files=("vae/config.json",)), offline=False)
except RestoreError as error:
    assert "vae/config.json" in str(error)
else:
    raise AssertionError
"""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "RESTORE_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
