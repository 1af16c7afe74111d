from __future__ import annotations

import json

import pytest

from restore.zoo import registry


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
