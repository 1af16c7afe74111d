"""What weights do not tell is known of a published file, given, or asked for; never guessed."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

import restore
from operators import RestoreError
from restore import zoo
from restore.app import cli
from restore.backbones.adm import ADM
from restore.zoo import registry

NET = Path(__file__).parents[1] / "golden" / "nets" / "adm_c.safetensors"  # 16 channels a head, the new order
TOLD = {"head_channels": 16, "attention_order": "new", "schedule": "cosine"}


@pytest.fixture
def folder(cache, tmp_path):
    """Files of ADM and Stable Diffusion without anything that tells how they were trained."""
    torch.save(load_file(NET), tmp_path / "mine.pt")
    return tmp_path


@pytest.mark.parametrize("left_out", ["head_channels", "attention_order", "schedule"])
def test_a_file_named_directly_asks_for_what_its_weights_do_not_tell(folder, left_out):
    told = {name: value for name, value in TOLD.items() if name != left_out}
    asked = {"head_channels": "heads=NUMBER or head_channels", "attention_order": "legacy or new", "schedule": "cosine"}
    with pytest.raises(RestoreError, match=asked[left_out]) as refusal:
        restore.load(folder / "mine.pt", device="cpu", **told)
    assert not any(f"{name}=" in str(refusal.value) for name in told)


def test_given_options_make_the_network_and_stand_in_the_protocol(folder):
    options = {"heads": 2, "attention_order": "new", "schedule": "cosine"}
    restorer = restore.load(folder / "mine.pt", device="cpu", **options)
    expected = ADM.load(folder / "mine.pt", heads=2, attention_order="new", schedule="cosine")
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    label = 0 if restorer.backbone.classes else None
    for t in (10.0, 500.0):
        assert torch.equal(restorer.backbone.predict(x, t, label).eps, expected.predict(x, t, label).eps)
    network = restorer.protocol(None, restorer.method(None, sampler="dps", steps=2, parameters={"zeta": 1.0}))[
        "network"
    ]
    assert network.items() >= {"attention_order": "new", "schedule": "cosine", "prediction_type": "epsilon"}.items()
    assert set(network["attention_heads"].values()) == {2}
    linear = restore.load(folder / "mine.pt", device="cpu", **options | {"schedule": "linear"})
    method = linear.method(None, sampler="dps", steps=2, parameters={"zeta": 1.0})
    assert linear.protocol(None, method)["network"]["noise_levels"] != network["noise_levels"]
    other = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 4000}
    with pytest.raises(RestoreError, match="rescale_timesteps=true or false"):
        restore.load(folder / "mine.pt", device="cpu", **options | {"schedule": other})
    # improved-diffusion's networks count to 1000 with 4000 levels, unless they were trained otherwise.
    priors = [
        restore.load(folder / "mine.pt", device="cpu", **options | {"schedule": other, "rescale_timesteps": rescale})
        for rescale in (True, False)
    ]
    seen = []
    for prior in priors:
        prior.backbone.network.register_forward_pre_hook(lambda module, given: seen.append(float(given[1])))
        prior.backbone.predict(x, 2000, label)
        assert len(prior.backbone.schedule) == 4000
    assert seen == [500.0, 2000.0]
    priors[0].save_pretrained(folder / "saved")
    assert restore.load(folder / "saved", device="cpu").backbone.time_scale == 0.25


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head": 2}, "did you mean 'heads'"),
        ({"heads": 2.5}, "heads must be a whole number"),
        ({"heads": 0}, "heads must be a whole number"),
        ({"ema": True}, "kind adm has no option"),
    ],
)
def test_wrong_options_are_refused(folder, options, message):
    with pytest.raises(RestoreError, match=message):
        restore.load(folder / "mine.pt", device="cpu", **TOLD | options)


def test_a_published_file_is_known_by_its_content(cache, register, tmp_path):
    import hashlib

    torch.save(load_file(NET), tmp_path / "renamed.pt")
    content = (tmp_path / "renamed.pt").read_bytes()
    register(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, backbone = zoo.load_backbone(tmp_path / "renamed.pt")
    assert found.options == {"head_channels": 16, "attention_order": "new", "resolution": 64}
    assert {layer.channels // layer.heads for layer in backbone.attention.values()} == {16}
    content = content + b"0"
    (tmp_path / "renamed.pt").write_bytes(content)
    with pytest.raises(RestoreError, match="heads=NUMBER"):
        zoo.load_backbone(tmp_path / "renamed.pt")


def test_a_published_file_name_is_believed_with_a_notice_unless_it_cannot_be_that_file(cache, register, tmp_path):
    register()
    torch.save(load_file(NET), tmp_path / "weights.pt")
    with pytest.warns(
        UserWarning, match="taken for small by its file name.*head_channels=16.*attention_order=new"
    ) as said:
        found, backbone = zoo.load_backbone(tmp_path / "weights.pt")
    assert len(said) == 1 and found.options["attention_order"] == "new"
    path = registry.configs_dir() / "model" / "small.yaml"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parameters": 12345}))
    with pytest.warns(UserWarning), pytest.raises(RestoreError, match="not 12345; give heads=NUMBER"):
        zoo.load_backbone(tmp_path / "weights.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.load_backbone(tmp_path / "weights.pt", options=TOLD)


def test_published_names_have_the_published_options():
    """OpenAI's and DPS' files under the names of their publishers and of deepinv."""
    entries = zoo.read_registry().values()
    names = {
        n: e.options for e in entries if e.kind == "adm" and e.download for n in (e.download.file, *e.download.names)
    }
    linear = {"attention_order": "legacy", "head_channels": 64, "schedule": "linear"}
    assert names["64x64_diffusion.pt"] == {"attention_order": "new", "head_channels": 64, "schedule": "cosine"}
    assert names["128x128_diffusion.pt"] == {"attention_order": "legacy", "heads": 4, "schedule": "linear"}
    for name in ("256x256_diffusion_uncond.pt", "ffhq_10m.pt", "diffusion_ffhq_10m.pt", "diffusion_openai.pt"):
        assert names[name] == linear


def test_a_network_without_a_scheduler_has_diffusers_defaults_with_a_notice(cache, tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    UNet2DModel(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, **blocks).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no scheduler_config.json.*linear.*give schedule="):
        assert restore.load(tmp_path, device="cpu").options == {"schedule": "linear"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = restore.load(tmp_path, device="cpu", schedule="cosine").backbone
    DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path)
    known = restore.load(tmp_path, device="cpu").backbone
    assert (given.schedule.ratios == known.schedule.ratios).all()


def stable_diffusion(path, width, *more):
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({key: torch.zeros(320, width), **{name: torch.zeros(1) for name in more}}, path)
    return path


@pytest.mark.parametrize(
    "name, width, more, told",
    [
        ("merged.safetensors", 1024, (), None),
        ("merged.safetensors", 1024, ("v_pred",), "v_prediction"),
        ("v2-1_768-ema-pruned.safetensors", 1024, (), "v_prediction"),
        ("v2-1_512-ema-pruned.safetensors", 1024, (), "epsilon"),
        ("merged.safetensors", 768, (), "epsilon"),
        ("merged.safetensors", 999, (), None),
    ],
)
def test_what_a_file_of_stable_diffusion_predicts_is_known_or_asked_for(cache, tmp_path, name, width, more, told):
    found = zoo.locate(stable_diffusion(tmp_path / name, width, *more))
    assert found.kind == "stable-diffusion"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if told is None:
            with pytest.raises(RestoreError, match="prediction_type=epsilon, v_prediction"):
                zoo.options.resolve_options(found, {})
        else:
            assert zoo.options.resolve_options(found, {}).options == {"prediction_type": told}
    assert len(said) == (told is not None and not more)
    assert zoo.options.resolve_options(found, {"prediction_type": "sample"}).options == {"prediction_type": "sample"}


def test_the_command_line_gives_and_asks_by_its_option(folder, capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["restore", "models", "layers", str(folder / "mine.pt"), *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr()

    code, said = run()
    assert code == 2 and said.err.count("\n") == 1
    assert (
        "--model-option heads=NUMBER or --model-option head_channels=WIDTH; --model-option attention_order" in said.err
    )
    code, said = run(*(f"--model-option={name}={value}" for name, value in TOLD.items()))
    assert code == 0 and "m1" in said.out
    assert run("--model-option", "haeds=2")[1].err.strip().endswith("did you mean 'heads'?")
    assert "key=value" in run("--model-option", "4")[1].err
