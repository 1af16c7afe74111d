"""Training and its cards replace no file that this program did not write."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import config

from operators import RestoreError
from restore.training import train
from restore.training.card import write_card


def test_training_keeps_weights_without_their_checkpoint(folders, tmp_path):
    theirs = tmp_path / "out" / "ema" / "diffusion_pytorch_model.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"weeks of work")
    with pytest.raises(RestoreError, match="ema exists without checkpoint.pt"):
        train(config("prior-v2", folders, tmp_path / "out", "steps=1"))
    assert theirs.read_bytes() == b"weeks of work"


@pytest.mark.parametrize("content", [{"state_dict": {}}, torch.zeros(2), None], ids=["other", "tensor", "text"])
def test_training_refuses_a_checkpoint_of_another_program(folders, tmp_path, content):
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    if content is None:
        checkpoint.write_bytes(b"not a checkpoint")
    else:
        torch.save(content, checkpoint)
    before = checkpoint.read_bytes()
    with pytest.raises(RestoreError, match="checkpoint.pt (must be|cannot be read as) a checkpoint"):
        train(config("prior-v2", folders, tmp_path / "out", "steps=1"))
    assert checkpoint.read_bytes() == before


def test_training_is_not_continued_with_another_split(folders, tmp_path):
    """A file that sorts first would move every held-out image: those that count as such have been trained on."""
    faces = shutil.copytree(folders / "faces", tmp_path / "faces")
    settings = ["prior-v2", folders, tmp_path / "out"]

    def go_on(step, *more, folder=faces):
        train(config(*settings, f"data.sets.faces.folder={folder}", f"steps={step}", *more))

    go_on(1)
    shutil.copy(faces / "03.png", faces / "0.png")
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    with pytest.raises(RestoreError, match=r"data must have the files and held_out_every .*checkpoint\.pt"):
        go_on(2)
    (faces / "0.png").unlink()
    with pytest.raises(RestoreError, match="data must have the files and held_out_every"):
        go_on(2, "data.held_out_every=3")
    assert checkpoint.read_bytes() == before
    go_on(2, folder=faces.rename(tmp_path / "moved"))

    state = torch.load(checkpoint, weights_only=True)
    del state["split"]  # of an earlier version
    torch.save(state, checkpoint)
    go_on(3, "data.held_out_every=3", folder=tmp_path / "moved")


def test_training_is_not_continued_on_another_task(folders, autoencoder, tmp_path):
    """The weights would fit, and what they were trained to do is another thing."""
    vae = shutil.copytree(autoencoder[0], tmp_path / "vae")
    settings = ["latent", folders, tmp_path / "out", f"autoencoder={vae}"]

    def go_on(step, *more):
        train(config(*settings, f"steps={step}", *more))

    go_on(1)
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    with pytest.raises(RestoreError, match="prediction_type must be v_prediction to continue .*got epsilon"):
        go_on(2, "prediction_type=epsilon")
    with pytest.raises(RestoreError, match="schedule must be .*0.0195.* to continue .*got .*0.02"):
        go_on(2, "schedule.beta_end=0.02")
    with pytest.raises(RestoreError, match="patch must be 1 to continue .*got 2"):
        go_on(2, "patch=2")
    weights = vae / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({k: v * (1 - 2 * k.startswith("quant_conv")) for k, v in state.items()}, weights)
    with pytest.raises(RestoreError, match="autoencoder must have the encoder on whose latents .*checkpoint.pt"):
        go_on(2)
    assert checkpoint.read_bytes() == before
    save_file({k: v * (1 - 2 * k.startswith("decoder.")) for k, v in state.items()}, weights)
    go_on(2)

    state = torch.load(checkpoint, weights_only=True)
    for name in ("kind", "schedule", "prediction_type", "patch", "encoder"):  # of an earlier version
        del state[name]
    torch.save(state, checkpoint)
    go_on(3)


def test_a_continued_run_has_the_options_that_it_is_given(folders, tmp_path):
    more = ["discriminator.start=0", "discriminator.channels=8", "steps=1"]
    train(config("autoencoder", folders, tmp_path, *more))
    changes = ["optimizer.lr=1e-3", "optimizer.betas=[0.8,0.95]", "optimizer.weight_decay=0.1"]
    train(config("autoencoder", folders, tmp_path, *more, "steps=2", *changes, "ema.decay=0.5", "ema.power=0.6"))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (state["ema"]["decay"], state["ema"]["power"]) == (0.5, 0.6)
    for name, decay in {"optimizer": 0.1, "judging": 0.0}.items():
        (group,) = state[name]["param_groups"]
        assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (1e-3, (0.8, 0.95), decay)


@pytest.mark.parametrize("name", ["card.json", "samples.png"])
def test_card(folders, tmp_path, name):
    path = tmp_path / "card" / name
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(RestoreError, match=f"{name} exists .*overwrite=True"):
        write_card(config("prior-v2", folders, tmp_path / "out"), "embedded", path.parent)
    assert path.read_bytes() == b"mine"


def test_a_card_replaces_its_own_files(folders, autoencoder, tmp_path):
    settings = config("autoencoder", folders, tmp_path / "out")
    card = write_card(settings, autoencoder[0], tmp_path / "card")
    assert write_card(settings, autoencoder[0], tmp_path / "card") == card
    assert json.loads((tmp_path / "card" / "card.json").read_text())["files"] == ["card.json", "pairs.png"]
    assert (tmp_path / "card" / "pairs.png").exists()


def test_a_card_measures_every_folder(folders, autoencoder, tmp_path):
    other = shutil.copytree(folders / "faces", tmp_path / "other" / "faces")
    (other / "00.png").unlink()
    both = f"[{folders / 'faces'},{other}]"
    settings = config("autoencoder", folders, tmp_path / "out", f"data.folder={both}", f"card.folders={both}")
    rows = write_card(settings, autoencoder[0], tmp_path / "card")["reconstruction"]
    counts = {name: row["images"] for name, row in rows.items()}
    assert counts == {"held-out images": 6, str(folders / "faces"): 12, str(other): 11}


def test_latents_of_replaced_images_are_encoded_again(folders, autoencoder, tmp_path):
    faces = shutil.copytree(folders / "faces", tmp_path / "faces")
    settings = ["latent", folders, tmp_path / "out", f"autoencoder={autoencoder[0]}", "steps=1", f"data.folder={faces}"]
    train(config(*settings))
    latents = tmp_path / "out" / "latents.safetensors"
    before = latents.read_bytes()
    train(config(*settings[:-2], "steps=2", settings[-1]))
    assert latents.read_bytes() == before
    first, *_, last = sorted(faces.iterdir())
    shutil.copy(last, first)
    train(config(*settings[:-2], "steps=3", settings[-1]))
    assert latents.read_bytes() != before
