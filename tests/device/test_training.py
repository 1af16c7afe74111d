"""Training on the pretended accelerator."""

from __future__ import annotations

import sys

import pytest
import sim_device
import torch
from accelerate import Accelerator
from sim_priors import held
from tiny_training import config, rows, write_folders

from restore.training import train


class OnSim(Accelerator):
    device = property(lambda self: torch.device("sim"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prior-v2", "autoencoder"])
def test_three_steps(sim, kind, tmp_path, monkeypatch):
    """The same losses and weights, to the bit."""
    make, save = torch.Generator, torch.save
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": make())
    monkeypatch.setattr(sim_device, "HOST_GENERATORS", True)
    monkeypatch.setattr(torch, "save", lambda state, file: save(held(state), file))
    folders, states = write_folders(tmp_path), []
    for name in ("cpu", "sim"):
        if name == "sim":
            monkeypatch.setattr(sys.modules["restore.training.train"], "Accelerator", OnSim)
        settings = ["steps=3", "held_out_every_steps=100", "samples_every_steps=100", "checkpoint_every_steps=100"]
        train(config(kind, folders, tmp_path / name, *settings))
        states.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"])
    losses = [
        [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(tmp_path / name / "log.jsonl")]
        for name in ("cpu", "sim")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    here, there = states
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)
