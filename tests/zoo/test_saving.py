"""What a prior that comes from a folder is saved with: its weights, as safetensors, and how it was loaded."""

from pathlib import Path

import pytest
import tiny_flow
import torch
from safetensors.torch import load_file

import restore
from operators import RestoreError
from restore import Restorer


def pickle_weights(folder: Path) -> list[Path]:
    """Turn a folder's weights into pickles, as the hub has those of DiT."""
    made = []
    for path in sorted(folder.rglob("*.safetensors")):
        made.append(path.with_suffix(".bin"))
        torch.save(load_file(path), made[-1])
        path.unlink()
    return made


def test_options_of_a_pipeline_come_back(tmp_path):
    folder = tiny_flow.save_folder("flux", tmp_path / "flux", guidance=True)
    prior = restore.load(folder, device="cpu", text_tokens=8, distilled_guidance=9.0)
    prior.save_pretrained(tmp_path / "saved")
    found = Restorer.from_pretrained(tmp_path / "saved", device="cpu")
    assert found.backbone.encode_prompt("a cat").shape == prior.backbone.encode_prompt("a cat").shape
    assert found.options["text_tokens"] == 8
    assert found.options["distilled_guidance"] == 9.0
    assert restore.load(tmp_path / "saved", device="cpu", text_tokens=12).options["text_tokens"] == 12
    other = restore.load(folder, device="cpu", vae=folder / "vae")
    with pytest.raises(RestoreError, match="vae="):
        other.save_pretrained(tmp_path / "other")


def test_pickled_weights_are_saved_as_safetensors(tmp_path):
    folder = tiny_flow.save_folder("dit", tmp_path / "dit")
    weights = restore.load(folder, device="cpu").backbone.network.state_dict()
    pickles = pickle_weights(folder)
    assert len(pickles) == 2
    prior = restore.load(folder, device="cpu")
    prior.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*.bin"))
    found = Restorer.from_pretrained(tmp_path / "saved", device="cpu").backbone.network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    for path in pickles:
        path.rename(path.with_name("diffusion_pytorch_model-00001-of-00002.bin"))
    with pytest.raises(RestoreError, match="as safetensors first"):
        prior.save_pretrained(tmp_path / "again")
