"""Loaded weights lie in their own aligned memory, so that results do not depend on their offsets in a file."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from tiny_sd import save_folder, save_single_file

from operators import RestoreError
from restore import disk
from restore.backbones.adm import ADM
from restore.backbones.stable_diffusion import StableDiffusion
from restore.backbones.weights import align_memory, as_dtype, read_weights

BLOCKS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}


def pad(path, residue):
    """Lengthen the header of a safetensors file with spaces until its data starts at `residue` modulo 64."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip(b" ")
    header += b" " * ((residue - 8 - len(header)) % 64)
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def tensors(*modules):
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def aligned(*modules):
    return all(tensor.data_ptr() % 64 == 0 for tensor in tensors(*modules))


def test_every_place_in_a_file_gives_the_same_bits(tmp_path):
    torch.manual_seed(0)
    UNet2DModel(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, **BLOCKS).save_pretrained(tmp_path)
    path, outputs = tmp_path / "diffusion_pytorch_model.safetensors", []
    x = torch.randn(1, 3, 8, 8)
    misplaced = 0
    for residue in range(64):
        pad(path, residue)
        misplaced += any(tensor.data_ptr() % 64 for tensor in load_file(path).values())
        model = ADM.load(tmp_path)
        assert aligned(model.network), residue
        with torch.no_grad():
            outputs.append(model.predict(x, 250).eps)
    assert misplaced >= 63  # else the padding would test nothing
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_no_weight_is_part_of_the_file_or_of_another(tmp_path):
    """A file replaced while a model is in memory does not change it; q, k and v are no views of one tensor."""
    torch.manual_seed(0)
    UNet2DModel(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, **BLOCKS).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    model = ADM.load(tmp_path)
    before = [tensor.clone() for tensor in tensors(model.network)]
    with path.open("r+b") as handle:
        handle.seek(path.stat().st_size // 2)
        handle.write(b"\x01" * (path.stat().st_size // 2))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(model.network), strict=True))
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors(model.network))


@pytest.mark.parametrize("residue", [0, 4, 21, 32, 52])
def test_every_part_of_stable_diffusion_is_aligned(tmp_path, residue):
    folder = save_folder(tmp_path / "model")
    straight = StableDiffusion.load(folder)
    moved = shutil.copytree(folder, tmp_path / "moved")
    for path in moved.glob("*/*.safetensors"):
        pad(path, residue)
    single = save_single_file(tmp_path / "single.safetensors", folder)
    pad(single, residue)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for source, options in ((moved, {}), (single, {"config": folder, "offline": True})):
        backbone = StableDiffusion.load(source, **options)
        assert aligned(backbone.network, backbone.vae)
        with torch.no_grad():
            assert torch.equal(backbone.predict(z, 401).eps, straight.predict(z, 401).eps)
            assert torch.equal(backbone.decode(z), straight.decode(z))
        assert torch.equal(backbone.encode_prompt("a cat"), straight.encode_prompt("a cat"))


def test_own_memory_moves_parameters_and_buffers():
    store = torch.zeros(64)
    module = torch.nn.BatchNorm1d(7)
    module.weight.data, module.running_mean = store[1:8], store[9:16]
    assert align_memory(module) is module and aligned(module)
    store.fill_(5.0)
    assert not module.weight.any() and not module.running_mean.any()


def test_precisions():
    assert as_dtype(None) == as_dtype("fp32") == as_dtype(torch.float32) == torch.float32
    assert (as_dtype("bf16"), as_dtype("fp16")) == (torch.bfloat16, torch.float16)
    for wrong in ("fp8", torch.float64, 16, ["fp32"]):
        with pytest.raises(RestoreError, match="one of fp32, bf16, fp16"):
            as_dtype(wrong)


def test_the_content_of_a_file_tells_its_format_not_its_name(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "weights.pt")
    torch.save({"a": torch.ones(3)}, tmp_path / "weights.safetensors")
    assert all(torch.equal(read_weights(path)["a"], torch.ones(3)) for path in tmp_path.iterdir())
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(RestoreError, match="JSON object, got a list"):
        disk.read_json(tmp_path / "list.json", required=True)
