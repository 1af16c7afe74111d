"""Names, paths and the shipped registry."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from operators import RestoreError
from restore import zoo
from restore.zoo import registry
from tests.zoo.servers import archive

# A tensor of each kind of pipeline whose published single files are not read.
OTHERS = ("conditioner.embedders.0.weight", "text_encoders.clip_l.weight", "joint_blocks.0.weight", "double_blocks.0.x")


def test_locate_by_name_or_path(cache, tmp_path, monkeypatch):
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
    others = {name: tmp_path / f"{name.partition('.')[0]}.safetensors" for name in OTHERS}
    for path, key in (
        (adm, "out.0.weight"),
        (sd, "model.diffusion_model.out.0.weight"),
        *map(reversed, others.items()),
    ):
        header = json.dumps({key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    (tmp_path / "c.pt").write_bytes(archive(100))
    (tmp_path / "d.ckpt").write_bytes(archive(100))
    expected = {pipeline: "stable-diffusion", network: "adm", ddpm: "adm", adm: "adm", sd: "stable-diffusion"}
    expected |= {tmp_path / "c.pt": "adm", tmp_path / "d.ckpt": "stable-diffusion"}
    torch.save({"state_dict": {"model.time_embed.0.weight": torch.zeros(1)}}, tmp_path / "e.ckpt")
    expected |= {tmp_path / "e.ckpt": "adm"}
    for path, kind in expected.items():
        found = zoo.locate(str(path))
        assert (found.kind, found.path, found.entry) == (kind, path, None)
    found = zoo.locate("nobody/nothing")
    assert (found.kind, found.path, found.hub.repo) == ("stable-diffusion", None, "nobody/nothing")
    adm.write_bytes(adm.read_bytes()[:10])
    for wrong, message in (
        ("adm-ffhq-265", "did you mean 'adm-ffhq-256'"),
        (str(tmp_path / "x.pt"), "no file or folder"),
        (str(tmp_path), "must be a model folder"),
        (str(adm), "cut off"),
        (__file__, "weight file must end in"),
        *((str(path), "must be a folder of a pipeline") for path in others.values()),
    ):
        with pytest.raises(RestoreError, match=message):
            zoo.locate(wrong)


def test_locating_imports_no_torch():
    code = "import sys; from restore import zoo; zoo.locate('adm-ffhq-256'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_the_page_of_models_names_every_entry():
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert not [name for name in zoo.read_registry() if f"`{name}`" not in text and "adm-imagenet" not in name]


def test_every_shipped_entry_is_complete():
    entries = zoo.read_registry()
    assert {"embedded", "adm-ffhq-256", "adm-imagenet-256", "adm-imagenet-512", "sd-1.5"} <= set(entries)
    for entry in entries.values():
        assert entry.licence and entry.title and entry.resolution in (64, 128, 224, 256, 299, 512, 1024)
        if entry.download:
            assert entry.download.file.endswith((".pt", ".ckpt", ".pth")) and all(
                url.startswith("https://") for url in entry.download.urls
            )
            assert entry.kind in ("latent", "metric") or entry.options["attention_order"] in ("legacy", "new")
            assert "restore models import" in zoo.explain_download(entry)
    assert entries["adm-imagenet-256"].download.size > 4 * entries["adm-imagenet-256"].parameters
    assert entries["adm-imagenet-256-cond"].classes and not entries["adm-ffhq-256"].classes


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
        message = "not readable YAML"
    with pytest.raises(RestoreError, match=message):
        registry.read_registry(tmp_path)
