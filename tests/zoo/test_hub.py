"""Models of the Hugging Face hub, from a server that speaks its protocol."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as downloading one repository takes."""

    files = {
        "model_index.json": b"{}",
        "unet/config.json": b'{"a": 1}',
        "unet/big_model.safetensors": b"0123456789" * 1000,
        "extra.ckpt": b"no",
        "text_encoder_3/model-00001-of-00001.safetensors": b"1",
        "text_encoder_3/model.fp16-00001-of-00001.safetensors": b"no",
        "tokenizer_3/spiece.model": b"2",
    }
    pixels = {  # pickles, and one part with a variant
        "model_index.json": b'{"unet": ["diffusers", "UNet2DModel"], "vae": ["diffusers", "AutoencoderKL"]}',
        "unet/config.json": b'{"_class_name": "UNet2DModel"}',
        "unet/diffusion_pytorch_model.bin": b"3",
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": b"4",
        "vae/diffusion_pytorch_model.fp16.safetensors": b"5",
        "safety_checker/model.safetensors": b"no",
    }
    repos = {"owner/tiny": files, "owner/pixels": pixels, "owner/plan": pixels}
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
        if path.startswith("/move/"):
            Hub.commit = path.removeprefix("/move/")
            return self.reply(b"moved")
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        files = self.repos.get(repo, {})
        if path.startswith("/api/models/") and files:
            listing = [
                {"rfilename": name, "type": "file", "path": name, "size": len(body), "oid": "0"}
                for name, body in files.items()
            ]
            if "/tree/" in path:
                return self.reply(json.dumps(listing).encode(), Content_Type="application/json")
            info = {"id": repo, "modelId": repo, "sha": self.commit, "siblings": listing}
            return self.reply(json.dumps(info).encode(), Content_Type="application/json")
        body = files.get(path.split(f"/resolve/{self.commit}/")[-1])
        if body is None:
            return self.send_error(404)
        self.reply(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=self.commit)

    do_HEAD = do_GET


def test_hub_models_come_from_the_hub_once_and_then_from_its_cache(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    code = """
import os
import shutil
import requests
from operators import RestoreError
from restore import zoo
from restore.zoo import registry, store
from restore.zoo.hub import fetch_snapshot
from restore.zoo.registry import Hub
hub = Hub("owner/tiny", files=("model_index.json", "unet/*"))
assert fetch_snapshot(hub, offline=True) is None
few = fetch_snapshot(Hub("owner/tiny", files=store._CONFIGURATION_FILES), offline=False)
assert sorted(path.name for path in few.rglob("*.*")) == ["config.json", "model_index.json"]
assert fetch_snapshot(hub, offline=True) is None  # not yet whole
folder = fetch_snapshot(hub, offline=False)
names = sorted(path.name for path in folder.rglob("*.*"))
assert names == ["big_model.safetensors", "config.json", "model_index.json"], names
names = {path.name for path in zoo.pull("owner/tiny", offline=False).rglob("*.*")}
assert {"model-00001-of-00001.safetensors", "spiece.model"} <= names, names  # weights in shards, T5's tokenizer
assert "model.fp16-00001-of-00001.safetensors" not in names and "extra.ckpt" not in names, names
assert zoo.pull("owner/tiny", offline=True) == folder == zoo.locate("owner/tiny").path
for repo in ("owner/missing",):
    for offline in (True, False):
        try:
            zoo.pull(repo, offline=offline)
        except RestoreError as error:
            assert repo in str(error), error
        else:
            raise AssertionError("pulled a repository that is not there")

# What another program has left in the cache, without the client's record of the repository's files, is completed.
whole = zoo.pull("owner/pixels", offline=False)
assert zoo.locate("owner/pixels").path == whole and (whole / "unet" / "diffusion_pytorch_model.bin").is_file()
assert not (whole / "safety_checker").exists()
shutil.rmtree(whole.parents[1] / "trees", ignore_errors=True)
for lost in ("unet/diffusion_pytorch_model.bin", "model_index.json", "unet/config.json"):
    (whole / lost).unlink()
    assert zoo.locate("owner/pixels").path is None, lost
    assert zoo.pull("owner/pixels", offline=False) == whole == zoo.locate("owner/pixels").path
half = zoo.pull("owner/pixels", offline=False, variant="fp16")
assert (half / "vae" / "diffusion_pytorch_model.fp16.safetensors").is_file()
assert "vae/diffusion_pytorch_model.fp16.safetensors" in zoo.hash_weights("owner/pixels", variant="fp16")
seen = zoo.pull_configuration("owner/plan")
assert sorted(path.name for path in seen.rglob("*.*")) == ["config.json", "config.json", "model_index.json"]
try:
    fetch_snapshot(Hub("owner/tiny", files=("vae/config.json",)), offline=False)
except RestoreError as error:
    assert "vae/config.json" in str(error)
else:
    raise AssertionError

entry = registry.Model("tiny", "sd3", "t", "p", "MIT", 512, hub=Hub("owner/tiny", files=("model_index.json",)))
registry.read_registry = lambda folder=None: {"tiny": entry}
first = zoo.pull("tiny", offline=False)
move = lambda commit: requests.get(f"{os.environ['HF_ENDPOINT']}/move/{commit}")
move("b" * 40)  # the publisher replaces its files
assert zoo.pull("tiny", offline=False) == first == zoo.locate("tiny").path and first.name == "a" * 40
zoo.forget_checksum("tiny")
assert zoo.pull("tiny", offline=False).name == "b" * 40
assert store.query_size(zoo.locate("tiny"), offline=False) == 2
"""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "RESTORE_OFFLINE": "0",
        "RESTORE_CACHE": str(tmp_path / "cache"),
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


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path):
    code = """
from operators import RestoreError
from restore import zoo
from restore.backbones.pipeline_files import download_model
from restore.zoo.hub import fetch_snapshot
assert "size unknown" in zoo.describe_download("sd-1.5")
for fetch in (lambda: zoo.pull("owner/tiny", offline=False), lambda: download_model("owner/tiny")):
    try:
        fetch()
    except RestoreError as error:
        assert "owner/tiny" in str(error), error
    else:
        raise AssertionError
"""
    settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    settings |= {"RESTORE_OFFLINE": "0", "RESTORE_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
