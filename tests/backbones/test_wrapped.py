"""Checkpoints as training programs write them: wrapped, prefixed, beside an average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from operators import RestoreError
from restore.backbones.adm import ADM

NET = Path(__file__).parents[1] / "golden" / "nets" / "adm_a.safetensors"
OPTIONS = {"head_channels": 16}


def prefix(state, *parts):
    return {".".join((*parts, name)): tensor for name, tensor in state.items()}


@pytest.fixture(scope="module")
def state():
    return load_file(NET)


def average(state):
    return {name: tensor + 1 for name, tensor in state.items()}


ONE_WAY = {
    "module": lambda s: prefix(s, "module"),
    "compiled": lambda s: prefix(s, "_orig_mod"),
    "both": lambda s: prefix(s, "module", "_orig_mod"),
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": prefix(s, "module"), "optimizer": {"state": {0: {"step": torch.zeros(1)}}}, "step": 7},
    "ema": lambda s: {"ema": s, "args": {"lr": 1e-4}},
    "params_ema": lambda s: {"params_ema": s},
    "lightning": lambda s: {"state_dict": prefix(s, "model") | {"loss.weight": torch.zeros(1)}, "global_step": 1},
}


@pytest.mark.parametrize("name", ONE_WAY)
def test_what_can_be_read_in_one_way_is_unwrapped(tmp_path, state, name):
    torch.save(ONE_WAY[name](state), tmp_path / "model.pt")
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = ADM.load(NET, **OPTIONS).predict(x, 500).eps
    assert torch.equal(ADM.load(tmp_path / "model.pt", **OPTIONS).predict(x, 500).eps, expected)


SEVERAL = {
    "beside": (lambda s: {"model": s, "ema": average(s)}, {"model", "ema"}),
    "flat": (lambda s: prefix(s, "model") | prefix(average(s), "model_ema"), {"model", "model_ema"}),
    "deep": (
        lambda s: {"state_dict": {"net": s, "ema": prefix(average(s), "module")}},
        {"state_dict.net", "state_dict.ema"},
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_networks_one_is_chosen_by_its_key(tmp_path, state, name):
    content, keys = SEVERAL[name]
    torch.save(content(state), tmp_path / "model.pt")
    with pytest.raises(RestoreError, match="weights_key=.*ema") as refusal:
        ADM.load(tmp_path / "model.pt", **OPTIONS)
    assert all(key in str(refusal.value) for key in keys)
    for key in keys:
        got = ADM.load(tmp_path / "model.pt", weights_key=key, **OPTIONS).network.conv_in.bias
        assert torch.equal(got, state["input_blocks.0.0.bias"] + ("ema" in key))
    with pytest.raises(RestoreError, match="no weights_key"):
        ADM.load(tmp_path / "model.pt", weights_key="best", **OPTIONS)


def test_the_weights_in_a_folder_are_unwrapped_too(tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    UNet2DModel(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, **blocks).save_pretrained(tmp_path)
    x = torch.randn(1, 3, 8, 8)
    expected, path = ADM.load(tmp_path).predict(x, 500).eps, tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(prefix(load_file(path), "_orig_mod"), path)
    assert torch.equal(ADM.load(tmp_path).predict(x, 500).eps, expected)


def test_what_is_no_network_is_still_refused(tmp_path, state):
    torch.save({"ema": {"shadow_params": list(state.values())}}, tmp_path / "model.pt")
    with pytest.raises(RestoreError, match="flat state dict"):
        ADM.load(tmp_path / "model.pt", **OPTIONS)
    torch.save(prefix({**state, "extra.weight": torch.zeros(1)}, "module"), tmp_path / "model.pt")
    with pytest.raises(RestoreError, match="1 unexpected"):
        ADM.load(tmp_path / "model.pt", **OPTIONS)
