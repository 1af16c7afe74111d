"""The ADM backbone: parity with the official network, loading, saving, and refusing what does not fit."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from operators import RestoreError
from restore.backbones.adm import ADM
from restore.backbones.base import Backbone
from restore.backbones.memory_options import enable_block_checkpointing

GOLDEN = Path(__file__).parent.parent / "golden"
ORDER = {"a": "legacy", "b": "legacy", "c": "new"}


def load(name, **options):
    path = GOLDEN / f"nets/adm_{name}.safetensors"
    return ADM.load(path, head_channels=16, attention_order=ORDER[name], **options)


@pytest.fixture(scope="module")
def models():
    return {name: load(name) for name in ORDER}


@pytest.fixture(scope="module")
def golden():
    return {name: load_file(GOLDEN / f"adm_forward_adm_{name}.safetensors") for name in ORDER}


def relative(a, b):
    return float(torch.linalg.norm(a.detach() - b) / torch.linalg.norm(b))


def whole(prediction):
    return torch.cat([prediction.eps, prediction.variance], dim=1)


def gradient(model, g):
    x = g["x"].clone().requires_grad_()
    out = whole(model.predict(x, g["t"], g.get("y")))
    return torch.autograd.grad((out * g["v"].float()).sum(), x)[0]


@pytest.mark.parametrize("name", ORDER)
def test_forward_and_input_gradient_match_the_official_network(models, golden, name):
    g = golden[name]
    with torch.no_grad():
        out = whole(models[name].predict(g["x"], g["t"], g.get("y")))
    assert relative(out, g["out"]) < 1e-5
    assert relative(gradient(models[name], g), g["grad_x"]) < 2e-5


def test_fractional_timesteps_match(models, golden):
    g = golden["b"]
    with torch.no_grad():
        out = whole(models["b"].predict(g["x"], g["t_frac"], g["y"]))
    assert relative(out, g["out_t_frac"]) < 1e-5


def test_attention_order_matters(golden):
    wrong = ADM.load(GOLDEN / "nets/adm_c.safetensors", head_channels=16, attention_order="legacy")
    with torch.no_grad():
        assert relative(whole(wrong.predict(golden["c"]["x"], golden["c"]["t"])), golden["c"]["out"]) > 1e-2


def test_backbone_protocol(models):
    model = models["a"]
    assert isinstance(model, Backbone)
    assert (model.channels, model.resolution, model.multiple, model.null_condition) == (3, 64, 8, None)
    assert not any(p.requires_grad for p in model.network.parameters()) and not model.network.training
    assert [layer.short for layer in model.attention.values()] == ["i5", "i7", "m1", "o0", "o1", "o2", "o3"]
    for path, layer in model.attention.items():
        assert model.network.get_submodule(path) is layer.module
        assert layer.heads * 16 == layer.channels


def test_integer_t_equals_a_tensor_of_it(models, golden):
    x = golden["a"]["x"]
    with torch.no_grad():
        assert torch.equal(models["a"].predict(x, 480).eps, models["a"].predict(x, torch.tensor([480])).eps)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedules(name, models):
    schedule = ADM(models["a"].network, schedule=name).schedule
    got = schedule.alphas_cumprod
    assert got.dtype == torch.float64 and got.shape == (1000,)
    expected, product = [], 1.0
    for i in range(1000):
        if name == "linear":
            beta = 1e-4 + (0.02 - 1e-4) * i / 999
        else:
            f = [math.cos((s / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for s in (i, i + 1)]
            beta = min(1 - f[1] / f[0], 0.999)
        product *= 1 - beta
        expected.append(product)
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)


def test_checkpointing_gives_the_same_gradient_and_keeps_less(models, golden):
    g, checkpointed = golden["a"], load("a")
    enable_block_checkpointing(checkpointed)

    def kept_bytes(model):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in model.network.parameters()}
        x = g["x"].clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            prediction = model.predict(x, 480)
        total = sum(size for pointer, size in storages.items() if pointer not in weights)
        del prediction
        return total

    assert torch.equal(gradient(checkpointed, g), gradient(models["a"], g))
    assert kept_bytes(checkpointed) < 0.5 * kept_bytes(models["a"])


def test_low_precision_and_channels_last_stay_close(models, golden):
    g = golden["a"]
    with torch.no_grad():
        reference = models["a"].predict(g["x"], 480).eps
        low = load("a", dtype="bf16").predict(g["x"], 480)
        last = load("a", channels_last=True).predict(g["x"], 480).eps
    assert low.eps.dtype == low.variance.dtype == torch.float32
    assert 1e-5 < relative(low.eps, reference) < 5e-2
    assert relative(last, reference) < 1e-5 and models["a"].network.conv_out.weight.is_contiguous()


def test_folder_round_trip_and_half_precision_storage(models, golden, tmp_path):
    g, model = golden["b"], models["b"]
    model.save(tmp_path / "full")
    model.save(tmp_path / "half", dtype="fp16")
    for folder in ("full", "half"):  # the golden weights are fp16 values, so even that loses nothing
        again = ADM.load(tmp_path / folder)
        assert all(p.dtype == torch.float32 for p in again.network.parameters())
        with torch.no_grad():
            assert torch.equal(whole(again.predict(g["x"], 3, g["y"])), whole(model.predict(g["x"], 3, g["y"])))
    full, half = (os.path.getsize(tmp_path / f / "diffusion_pytorch_model.safetensors") for f in ("full", "half"))
    assert half < 0.6 * full


def test_folder_is_a_diffusers_model(models, golden, tmp_path):
    """Without the exceptions, the saved folder is read by diffusers itself."""
    models["a"].save(tmp_path)
    network = UNet2DModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        out = network(golden["a"]["x"], golden["a"]["t"]).sample
    assert relative(out, golden["a"]["out"]) < 1e-5


def test_diffusers_folder_loads(tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    network = UNet2DModel(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, **blocks)
    network.save_pretrained(tmp_path)
    model = ADM.load(tmp_path, schedule="cosine")
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        prediction = model.predict(x, 10)
        assert torch.equal(prediction.eps, network.eval()(x, 10).sample)
    assert prediction.variance is None
    assert [layer.short for layer in model.attention.values()] == ["i3", "m1", "o0", "o1"]
    assert float(model.schedule.alphas_cumprod[999]) == pytest.approx(2.428735e-9, rel=1e-6)  # the cosine's last


def test_schedule_and_resolution_survive_saving(tmp_path):
    load("a", schedule="cosine", resolution=96).save(tmp_path)
    again = ADM.load(tmp_path)
    cosine = ADM(again.network, schedule="cosine").schedule
    assert torch.equal(again.schedule.alphas_cumprod, cosine.alphas_cumprod) and again.resolution == 96


def test_class_labels(models, golden):
    g, model = golden["b"], models["b"]
    with torch.no_grad():
        one = model.predict(g["x"], 5, 3).eps
        many = model.predict(g["x"], 5, torch.tensor([3, 3])).eps
        other = model.predict(g["x"], 5, torch.tensor([3, 4])).eps
    assert torch.equal(one, many) and torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    assert model.null_condition is None


def test_null_class_is_the_condition_of_no_condition(golden, tmp_path):
    g, model = golden["b"], load("b", null_class=0)
    with torch.no_grad():
        assert torch.equal(model.predict(g["x"], 5).eps, model.predict(g["x"], 5, 0).eps)
    model.save(tmp_path)
    assert torch.equal(ADM.load(tmp_path).null_condition, torch.tensor([0]))
    with pytest.raises(RestoreError, match="null_class .*got 1000"):
        load("b", null_class=1000)


def test_1001_classes_have_a_null_class(tmp_path):
    state = load_file(GOLDEN / "nets/adm_b.safetensors")
    state["label_emb.weight"] = torch.cat([state["label_emb.weight"], torch.zeros(1, 128, dtype=torch.float16)])
    save_file(state, tmp_path / "model.safetensors")
    model = ADM.load(tmp_path / "model.safetensors", head_channels=16)
    assert torch.equal(model.null_condition, torch.tensor([1000]))


@pytest.mark.parametrize(
    "name, x, t, condition, match",
    [
        ("a", (1, 3, 30, 32), 0, None, r"divisible by 8"),
        ("a", (1, 4, 32, 32), 0, None, r"\(B, 3, H, W\)"),
        ("a", (1, 3, 32, 32), 1000, None, "0 to 999"),
        ("a", (1, 3, 32, 32), -1, None, "0 to 999"),
        ("a", (1, 3, 32, 32), 0, 1, "unconditional"),
        ("b", (1, 3, 32, 32), 0, None, "class-conditional"),
        ("b", (1, 3, 32, 32), 0, 1000, r"0\.\.999"),
        ("b", (3, 3, 32, 32), 0, torch.tensor([1, 2]), "3, one per image"),
        ("b", (1, 3, 32, 32), 0, torch.tensor([0.5]), "integer"),
    ],
)
def test_bad_inputs(models, name, x, t, condition, match):
    with pytest.raises(RestoreError, match=match):
        models[name].predict(torch.zeros(x), t, condition)


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["RESTORE_TEST_PAYLOAD"],)


def test_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("RESTORE_TEST_PAYLOAD", str(tmp_path / "ran"))
    torch.save({"time_embed.0.weight": torch.zeros(1), "x": Payload()}, tmp_path / "model.pt")
    with pytest.raises(RestoreError, match="refused.*run code"):
        ADM.load(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(tmp_path, suffix, share):
    state = load_file(GOLDEN / "nets/adm_c.safetensors")
    path = tmp_path / f"model{suffix}"
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(RestoreError, match="not a readable checkpoint"):
        ADM.load(path, head_channels=16)


def test_other_wrong_files(tmp_path):
    with pytest.raises(RestoreError, match="no file"):
        ADM.load(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint at all")
    with pytest.raises(RestoreError, match="not a readable checkpoint"):
        ADM.load(tmp_path / "text.pt")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "nested.pt")
    with pytest.raises(RestoreError, match="flat state dict"):
        ADM.load(tmp_path / "nested.pt")
    save_file({"model.diffusion_model.out.0.weight": torch.zeros(4)}, tmp_path / "sd.safetensors")
    with pytest.raises(RestoreError, match="not a guided-diffusion U-Net.*model.diffusion_model.out.0.weight"):
        ADM.load(tmp_path / "sd.safetensors")


def test_heads_that_weights_do_not_tell_are_asked_for():
    with pytest.raises(RestoreError, match="pass head_channels"):
        ADM.load(GOLDEN / "nets/adm_a.safetensors")


def test_damaged_folders(models, tmp_path):
    with pytest.raises(RestoreError, match="no config.json"):
        ADM.load(tmp_path)
    models["c"].save(tmp_path)
    weights, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    with pytest.raises(RestoreError, match="heads.*converted model"):
        ADM.load(tmp_path, heads=2)
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if k != "conv_out.bias"}, weights)
    with pytest.raises(RestoreError, match=r"[Mm]issing.*conv_out\.bias"):
        ADM.load(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RestoreError, match="not a readable checkpoint"):
        ADM.load(tmp_path)
    weights.unlink()
    with pytest.raises(RestoreError, match="no file"):
        ADM.load(tmp_path)
    config.write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(RestoreError, match="UNet2DModel, got AutoencoderKL"):
        ADM.load(tmp_path)
    config.write_text("{")
    with pytest.raises(RestoreError, match="config.json cannot be read as JSON"):
        ADM.load(tmp_path)


@pytest.mark.parametrize("options, match", [({"dtype": "fp8"}, "fp32, bf16, fp16"), ({"schedule": "x"}, "linear")])
def test_bad_options(options, match):
    with pytest.raises(RestoreError, match=match):
        load("a", **options)


def test_bad_attention_order():
    with pytest.raises(RestoreError, match="legacy"):
        ADM.load(GOLDEN / "nets/adm_a.safetensors", head_channels=16, attention_order="old")


def test_gradients_in_half_precision_do_not_vanish(tiny_adm):
    """A data term's gradient, spread over the activations, is below float16's smallest number."""
    x, found = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), {}
    for dtype in ("fp32", "fp16"):
        x_t = x.clone().requires_grad_()
        eps = ADM.load(tiny_adm, dtype=dtype).predict(x_t, 300).eps
        (found[dtype],) = torch.autograd.grad(1e-6 * eps.norm(), x_t)
    assert float((found["fp16"] - found["fp32"]).norm() / found["fp32"].norm()) < 0.03
