"""The cache: pulled, verified, imported by hand, offline, two processes at once."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from operators import RestoreError
from restore import zoo
from restore.zoo import registry
from tests.zoo.servers import archive, serving, sha, weights


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
    """Files that are no checkpoint, and what the error must contain."""
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
        "incomplete.pt": "1 missing",
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
