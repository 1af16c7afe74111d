"""`restore run` says "finished before" only if every file is there, as it was written, by the same code."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image, ImageOps

from restore.app import cli
from restore.method import Method
from restore.paths import data_dir

FACE = data_dir() / "photos" / "astronaut-face-64.png"


@pytest.fixture
def restore(tmp_path, monkeypatch, capsys):
    def run(*options):
        command = ["run", FACE, "--task", "sr4", "--steps", 1, "-o", tmp_path / "out", *options]
        monkeypatch.setattr(sys, "argv", ["restore", *map(str, command)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return run


def test_a_deleted_companion_is_made_again_and_a_changed_one_is_kept(restore, tmp_path):
    options = ["--degrade", "--samples", 2, "--sampler", "diffpir"]
    assert restore(*options)[0] == 0
    assert "finished before" in restore(*options)[1]
    out = tmp_path / "out"
    whole = {path: path.read_bytes() for path in out.glob("*.png")}
    assert {path.stem.removeprefix(FACE.stem) for path in whole} == {"", "-degraded", "-mean", "-sample1", "-spread"}
    for path in whole:
        path.unlink()
        code, said, err = restore(*options)
        assert code == 0 and "finished before" not in said, (path.name, err)
        assert path.read_bytes() == whole[path]

        for change in ("truncated", "retouched"):
            if change == "truncated":
                path.write_bytes(path.read_bytes()[:-20])
            else:
                ImageOps.mirror(Image.open(path)).save(path)
            theirs = path.read_bytes()
            code, said, err = restore(*options)
            assert code == 2 and path.name in err and "--overwrite" in err and "finished before" not in said
            assert path.read_bytes() == theirs  # somebody may have retouched it
        path.write_bytes(whole[path])
    assert "finished before" in restore(*options)[1]


def test_side_cars_of_earlier_versions_stay_valid(restore, tmp_path):
    assert restore()[0] == 0
    sidecar = next((tmp_path / "out").glob("*.json"))
    content = json.loads(sidecar.read_text())
    del content["written"]
    sidecar.write_text(json.dumps(content))
    assert "finished before" in restore()[1]


def test_a_machine_that_chooses_another_precision_keeps_results(restore, tmp_path, monkeypatch):
    """The side-car says what was used; who names a precision asks for that one."""

    def choose(*, native):
        monkeypatch.setattr("restore.backbones.precision.has_native_bf16", lambda device=None: native)

    options = ["--backbone", "embedded-photo"]
    for native, used in ((True, "bfloat16"), (False, "float32")):
        choose(native=native)
        code, said, err = restore(*options, "--overwrite")
        assert code == 0, err
        sidecar, result = (tmp_path / "out" / (FACE.stem + end) for end in (".json", ".png"))
        found = json.loads(sidecar.read_text())
        assert found["settings"]["precision"] == found["protocol"]["precision"] == used
        before = result.read_bytes()
        choose(native=not native)
        for more in ([], ["--precision", "auto"]):
            assert "finished before" in restore(*options, *more)[1] and result.read_bytes() == before
        asked = "fp32" if native else "bf16"
        code, _, err = restore(*options, "--precision", asked)
        assert code == 2 and "precision" in err and "--overwrite" in err
    choose(native=True)  # measured with the default samplers only
    assert restore(*options, "--sampler", "diffpir", "--overwrite")[0] == 0
    assert json.loads(sidecar.read_text())["settings"]["precision"] == "float32"


def test_an_edited_sampler_makes_another_result(restore, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = "def adjoint(prior, operator, y, *, noise, steps, guidance=None, condition=None, callback=None):\n"

    def write(gain):
        Path(tmp_path / "edited_sampler.py").write_text(f"{code}    return {gain} * operator.A_adjoint(y)\n")
        sys.modules.pop("edited_sampler", None)

    options = ["--degrade", "--sampler", "edited_sampler:adjoint"]
    write(1.0)
    assert restore(*options)[0] == 0 and "finished before" in restore(*options)[1]
    # What a function imports is part of it before it has run, as after.
    Path(tmp_path / "late_helper.py").write_text("GAIN = 1\n")
    code = code.replace("\n", "\n    import late_helper\n", 1)
    write(1.0)
    restore(*options, "--overwrite")
    sidecar = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert set(sidecar["settings"]["code"]) == {"edited_sampler", "late_helper"}
    sys.modules.pop("late_helper")
    assert "finished before" in restore(*options)[1]
    write(0.55)
    status, said, err = restore(*options)
    assert status == 2 and "code.edited_sampler" in err and "--overwrite" in err and "finished before" not in said
    sys.modules.pop("edited_sampler", None)


@pytest.mark.slow
def test_an_exchanged_weaker_model_makes_another_result(restore, tmp_path):
    def save():
        blocks = {"down_block_types": ["AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D"], "norm_num_groups": 8}
        network = UNet2DModel(sample_size=64, block_out_channels=(16,), layers_per_block=1, **blocks)
        DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "weak")

    save()
    guidance = f"{{autoguidance: {{scale: 1, model: {tmp_path / 'weak'}}}}}"
    options = ["--sampler", "diffpir", "--guidance", guidance]
    assert restore(*options)[0] == 0
    save()  # other weights
    code, _, err = restore(*options)
    assert code == 2 and "weak_models" in err


def test_another_schedule_of_the_same_weights_is_another_result(restore, tmp_path, tiny_adm):
    """A model's folder says how its network was trained, which its weights do not tell."""
    model = tmp_path / "model"
    shutil.copytree(tiny_adm, model)
    options = ["--backbone", model, "--sampler", "diffpir"]
    assert restore(*options)[0] == 0 and "finished before" in restore(*options)[1]
    scheduler = model / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(config | {"beta_end": 0.03}))
    code, _, err = restore(*options)
    assert code == 2 and "another result (network.noise_levels" in err


def test_tiles_of_an_autoencoder_are_part_of_a_result():
    """Their borders are blended, which changes the picture."""
    from restore.restorer import load

    plain, tiled = (
        load("embedded-latent", vae_tiling=tiling).protocol(None, Method("psld", 2)) for tiling in (False, True)
    )
    assert "vae_tiling" not in plain and tiled["vae_tiling"] is True
