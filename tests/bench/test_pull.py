"""`restore bench CONFIG --pull`: which models a configuration needs, and their download from a local server."""

from __future__ import annotations

import functools
import hashlib
import http.server
import shutil
import threading

import pytest
import torch
import yaml

from operators import RestoreError
from restore import zoo
from restore.bench import sampling
from restore.bench.config import load_config
from restore.bench.pull import list_needed_models
from restore.bench.run import hash_backbones
from restore.metrics.weights import find_weights
from restore.paths import configs_dir
from restore.search.hunt import find_layers
from restore.zoo import registry


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        ("table8-ffhq", ["adm-ffhq-256", "inception", "vgg16"]),
        ("table4-ffhq", ["sd-1.5", "inception", "vgg16"]),
        ("table1", ["adm-imagenet-256", "adm-imagenet-256-cond", "inception"]),
        ("defaults", ["embedded", "alexnet"]),
    ],
)
def test_models_of_a_configuration(config, needed):
    """Without its data: folders that it leaves open are not needed to know its models."""
    assert list_needed_models(load_config(config, placeholder="-")) == needed


def test_files_of_ones_own_are_not_fetched(tiny_adm):
    config = {"name": "n", "backbone": str(tiny_adm), "data": {"folder": "f"}, "tasks": {"sr4": "sr4"}}
    weak = {"autoguidance": {"scale": 1.0, "model": "adm-ffhq-256"}}
    config |= {"methods": {"dps": {"sampler": "dps", "steps": 2, "parameters": {"zeta": 1.0}, "guidance": weak}}}
    config |= {"metrics": {"names": ["lpips", "fid"], "weights": {"alexnet": "mine.pth"}}}
    assert list_needed_models(load_config(config)) == ["adm-ffhq-256", "inception"]


def test_a_tiny_autoencoder_is_that_of_its_model():
    backbones, tiny = ("sd-1.5", "sd-3-medium", "flux.1-dev"), {"vae": "tiny"}
    own = {"operator": "sr4", "model_options": tiny}
    tasks = {f"own{i}": {**own, "backbone": name} for i, name in enumerate(backbones)}
    config = {"name": "n", "backbone": "embedded", "data": {"folder": "f"}, "tasks": {"sr4": "sr4", **tasks}}
    config |= {"methods": {"dps": {"sampler": "dps", "steps": 2, "parameters": {"zeta": 1.0}}}}
    config["metrics"] = {"names": ["psnr"]}
    needed = list_needed_models(load_config(config))
    assert needed == ["embedded", *backbones, "taesd", "taesd3", "taef1"]
    given = config | {"tasks": {"sr4": "sr4"}, "backbone": "sd-2.1-base", "model_options": {"vae": "taesd3"}}
    assert list_needed_models(load_config(given)) == ["sd-2.1-base", "taesd3"]
    with pytest.raises(RestoreError, match="vae must be None for embedded"):
        list_needed_models(load_config(config | {"tasks": {"sr4": "sr4"}, "model_options": tiny}))


def test_the_environment_keeps_every_command_offline(tmp_path, monkeypatch, command):
    """Where the configuration and the options say nothing."""

    def fetch(hub, offline):
        return None if offline else pytest.fail(f"{hub.repo} was asked for in the network")

    monkeypatch.setattr("restore.zoo.store.fetch_snapshot", fetch)
    monkeypatch.setenv("RESTORE_OFFLINE", "1")
    config = {"name": "n", "backbone": "sd-1.5", "data": {"folder": "f"}, "tasks": {"sr4": "sr4"}}
    config |= {"methods": {"dps": {"sampler": "dps", "steps": 2, "parameters": {"zeta": 1.0}}}}
    calls = [
        lambda: sampling.load_pipeline("sd-1.5", device=torch.device("cpu"), precision="fp32", offline=False),
        lambda: hash_backbones(load_config(config)),
        lambda: find_layers("sd-1.5", False),
    ]
    for call in calls:
        with pytest.raises(RestoreError, match="the run is offline"):
            call()
    code, _, err = command("models", "pull", "taesd")
    assert code == 2 and "the run is offline" in err


def test_pull_says_sizes_and_licences_and_fetches_what_is_missing(tmp_path, monkeypatch, command):
    torch.manual_seed(0)
    torch.save({"features.0.weight": torch.randn(64, 3, 11, 11)}, tmp_path / "alexnet-published.pth")
    content = (tmp_path / "alexnet-published.pth").read_bytes()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    shutil.copytree(configs_dir() / "model", tmp_path / "configs" / "model")
    path = tmp_path / "configs" / "model" / "alexnet.yaml"
    entry = yaml.safe_load(path.read_text())
    entry["download"]["urls"] = [f"http://127.0.0.1:{server.server_address[1]}/alexnet-published.pth"]
    entry["download"]["sha256"] = hashlib.sha256(content).hexdigest()[:8]
    path.write_text(yaml.safe_dump(entry))
    monkeypatch.setattr(registry, "configs_dir", lambda: tmp_path / "configs")
    monkeypatch.setenv("RESTORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RESTORE_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    code, out, err = command("bench", "defaults", "--pull")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "embedded: on this machine"
    assert "AlexNet" in lines[1] and f"{len(content) / 1e6:.0f} MB" in lines[1] and "BSD-3-Clause" in lines[1]
    assert lines[2].startswith("alexnet is at ") and zoo.locate("alexnet").path.read_bytes() == content
    assert find_weights("alexnet") == zoo.locate("alexnet").path
    code, out, err = command("bench", "defaults", "--pull")
    assert code == 0 and out.splitlines() == ["embedded: on this machine", "alexnet: on this machine"]
    entry["download"]["sha256"] = "0" * 8  # another file than the one that its publisher names
    path.write_text(yaml.safe_dump(entry))
    zoo.locate("alexnet").path.unlink()
    code, _, err = command("bench", "defaults", "--pull")
    assert code == 2 and "expected SHA-256 00000000" in err
    code, _, err = command("generate", "-n", 1, "--steps", 2, "--backbone", "alexnet", "-o", tmp_path / "out")
    assert code == 2 and "network of metrics" in err
    server.shutdown()
