"""The command line with class-conditional priors and with latent diffusion: classes by name, folders as backbones."""

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from tiny_ldm import save_ldm

from restore.app import cli
from restore.backbones.adm import ADM
from restore.bench import sampling
from restore.bench.config import load_config as load_benchmark
from restore.method import Method
from restore.paths import configs_dir, data_dir
from restore.restorer import load


def run(monkeypatch, capsys, *command):
    """(exit code, stdout, stderr) of `restore ...`."""
    monkeypatch.setattr(sys, "argv", [str(part) for part in ["restore", *command]])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr()
    return stop.value.code, shown.out, shown.err


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A folder with a prior of faces and photos, no class being the last."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    config = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, **blocks}
    network = UNet2DModel(**config, num_class_embeds=3, attention_head_dim=16)
    folder = tmp_path_factory.mktemp("prior") / "classes"
    ADM(network, null_class=2, labels=("face", "photo")).save(folder)
    return folder


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.open(data_dir() / "photos" / "coffee-64.png").resize((20, 16)).save(path)
    return path


def test_a_class_by_name(tmp_path, monkeypatch, capsys, classes, photo):
    made = {}
    for label in (None, "face", "photo", "1"):
        options = [] if label is None else ["--label", label]
        out = tmp_path / f"out-{label}"
        command = ["run", photo, "--task", "sr4", "--backbone", classes, "--sampler", "dps", "zeta=1", "--steps", "3"]
        code, _, error = run(monkeypatch, capsys, *command, *options, "-o", out)
        assert code == 0, error
        made[label] = (out / "photo.png").read_bytes()
        assert json.loads((out / "photo.json").read_text())["settings"].get("label") == label
    assert made["photo"] == made["1"] and len({made[None], made["face"], made["photo"]}) == 3
    other = [*command, "--label", "face", "-o", tmp_path / "out-photo"]
    assert "another" in run(monkeypatch, capsys, *other)[2]  # a result of other settings is not replaced
    code, _, error = run(monkeypatch, capsys, *command, "--label", "phto", "-o", tmp_path / "out")
    assert code == 2 and "did you mean 'photo'" in error
    command[command.index(classes)] = "embedded-latent"
    code, _, error = run(monkeypatch, capsys, *command, "--label", "face", "-o", tmp_path / "out")
    assert code == 2 and "label" in error and "no classes" in error


def test_samples_of_classes_by_name(tmp_path, monkeypatch, capsys, classes):
    command = ["generate", "-n", 2, "--backbone", classes, "--steps", 2, "--cfg-scale", 1]
    for labels in ("photo,face", "1,0"):
        code, _, error = run(monkeypatch, capsys, *command, "--labels", labels, "-o", tmp_path / labels)
        assert code == 0, error
    for i, label in enumerate(("photo", "face")):
        name = f"sample-{i:04d}"
        assert json.loads((tmp_path / "photo,face" / f"{name}.json").read_text())["label"] == label
        assert (tmp_path / "photo,face" / f"{name}.png").read_bytes() == (tmp_path / "1,0" / f"{name}.png").read_bytes()


def test_benchmarks_take_classes_by_name(classes, photo):
    restorer = load(classes, device="cpu")
    task = {"labels": ["photo", "face"]}
    method = Method("ddim", 2)
    mixed = sampling.generate_batch(restorer, ["0", "1"], task, method, seed=0).samples
    numbers = sampling.generate_batch(restorer, ["0", "1"], {"labels": [1, 0]}, method, seed=0).samples
    assert torch.equal(mixed, numbers)
    one = sampling.generate_batch(restorer, ["0", "1"], {"labels": "photo"}, method, seed=0).samples
    assert torch.allclose(one[0], mixed[0], atol=1e-5) and not torch.allclose(one[1], mixed[1], atol=1e-3)
    drawn = sampling.generate_batch(restorer, [str(i) for i in range(8)], {"labels": "uniform"}, method, seed=0).samples
    plain = sampling.generate_batch(restorer, [str(i) for i in range(8)], {"labels": None}, method, seed=0).samples
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(drawn, plain, strict=True))  # the null class is none

    task = {
        "operator": {"name": "denoising", "noise": {"name": "gaussian", "sigma": 0.2}},
        "per_image": False,
        "solve_at": None,
        "resample": "bicubic",
    }
    x, method = torch.zeros(1, 3, 16, 16), Method("dps", 2, {"zeta": 1.0})
    options = {"seed": 0, "samples": 1, "device": torch.device("cpu")}
    found = {
        label: sampling.restore_batch(restorer, x, ["a"], {**task, "labels": label}, method, **options).samples
        for label in (None, "face", "photo", 1)
    }
    assert torch.equal(found["photo"], found[1]) and not torch.equal(found["photo"], found["face"])
    with pytest.raises(sampling.RestoreError, match="a restoration takes one class"):
        sampling.restore_batch(restorer, x, ["a"], {**task, "labels": ["face"]}, method, **options)
    assert load_benchmark(configs_dir() / "benchmark" / "embedded.yaml", ["data.folder=x", "tasks.box.labels=photo"])


def test_latent_diffusion_is_a_backbone_like_any_other(tmp_path, monkeypatch, capsys, photo):
    folder = save_ldm(tmp_path / "model")
    command = [
        "run",
        photo,
        "--task",
        "sr4",
        "--backbone",
        folder,
        "--steps",
        "2",
        "--pag-scale",
        "1",
        "--layers",
        "m1",
    ]
    code, _, error = run(monkeypatch, capsys, *command, "-o", tmp_path / "out")
    assert code == 0, error
    method = json.loads((tmp_path / "out" / "photo.json").read_text())["protocol"]["method"]
    assert method["sampler"] == "psld" and Image.open(tmp_path / "out" / "photo.png").size == (80, 64)
    code, shown, _ = run(monkeypatch, capsys, "models", "layers", folder)
    assert code == 0 and "mid_block.attentions.0" in shown and "middle_block.1" in shown
    code, shown, _ = run(monkeypatch, capsys, "models", "show", folder)
    assert code == 0 and "latent" in shown
    code, shown, _ = run(monkeypatch, capsys, "models", "show", "ldm-celebahq-256")
    assert code == 0 and "Apache-2.0" in shown and "CompVis/ldm-celebahq-256 at main" in shown
    code, _, error = run(
        monkeypatch,
        capsys,
        "run",
        photo,
        "--task",
        "sr4",
        "--backbone",
        "ldm-ffhq-256",
        "--offline",
        "-o",
        tmp_path / "x",
    )
    assert code == 2 and "restore models import ldm-ffhq-256" in error


def test_the_shipped_prior_has_two_classes_and_none(tmp_path, monkeypatch, capsys):
    """CFG, and CFG with PAG (PAG, eq. 14), run on it; a face and a photo are not the same sample."""
    made = {}
    for name, options in {
        "plain": ["--labels", "photo"],
        "face": ["--labels", "face"],
        "none": [],
        "cfg": ["--labels", "photo", "--cfg-scale", 1],
        "cfg-pag": ["--labels", "photo", "--cfg-scale", 1, "--pag-scale", 1, "--layers", "i5"],
    }.items():
        command = ["generate", "-n", 1, "--steps", 3, *options, "-o", tmp_path / name]
        code, _, error = run(monkeypatch, capsys, *command)
        assert code == 0, error
        made[name] = (tmp_path / name / "sample-0000.png").read_bytes()
    assert len(set(made.values())) == 5


def test_trajectories_of_samples(command, classes, tmp_path):
    """One pair of pictures for each sample, the same for any batch size; the side-car lists them."""
    arguments = ["generate", "-n", 2, "--backbone", classes, "--steps", 4, "--labels", "0,1", "--cfg-scale", 2]
    for name, size in (("one", 1), ("two", 2)):
        code, _, err = command(*arguments, "--trajectory-steps", 3, "--batch-size", size, "-o", tmp_path / name)
        assert code == 0, err
    names = [f"sample-0001{ending}" for ending in (".png", ".json", "-trajectory.png", "-guidance.png")]
    assert json.loads((tmp_path / "one" / "sample-0001.json").read_text())["files"] == names
    first, other = (Image.open(tmp_path / "one" / f"sample-000{i}-trajectory.png") for i in (0, 1))
    assert first.tobytes() != other.tobytes() and 3 * 128 < other.width < 5 * 128
    pairs = [[np.asarray(Image.open(tmp_path / folder / names[2]), int) for folder in ("one", "two")]]
    assert all(a.shape == b.shape and abs(a - b).max() <= 2 for a, b in pairs)
    code, _, err = command(*arguments, "--save-trajectory", "--cfg-scale", 0, "-o", tmp_path / "plain")
    assert code == 0 and not list((tmp_path / "plain").glob("*-guidance.png"))
    assert len(list((tmp_path / "plain").glob("*-trajectory.png"))) == 2
