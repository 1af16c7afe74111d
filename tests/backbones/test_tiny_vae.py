"""A tiny autoencoder (TAESD) in place of a latent prior's: vae= of every call, and the convention of its latents."""

import os
import sys
from pathlib import Path

import pytest
import tiny_flow
import tiny_sd
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file

import operators
import restore
from operators import RestoreError
from restore import zoo
from restore.app import cli
from restore.backbones.autoencoder import load_vae
from restore.images import io
from restore.paths import data_dir
from restore.samplers.psld import psld

CHANNELS = {"taesd": 4, "taesd3": 16, "taef1": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny-vae")
    tiny_flow.tiny_tae().save_pretrained(root / "tae")
    tiny_flow.tiny_tae(latent_channels=8).save_pretrained(root / "other")
    tiny_sd.save_folder(root / "sd")
    return {"tae": root / "tae", "other": root / "other", "sd": root / "sd"} | {
        kind: tiny_flow.save_folder(kind, root / kind) for kind in ("sd3", "flux", "dit")
    }


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", "dit"])
def test_every_latent_prior_takes_a_tiny_vae(folders, kind):
    """Its latents are x itself: no factor and no shift, whatever the replaced autoencoder's were."""
    restorer = restore.load(folders[kind], vae=folders["tae"])
    prior, plain = restorer.backbone, restore.load(folders[kind])
    vae = tiny_flow.tiny_tae()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        z = vae.encode(image).latents
        assert torch.equal(prior.encode(image), z) and torch.equal(prior.encode(image, torch.ones_like(z)), z)
        assert torch.equal(prior.decode(z), vae.decode(z).sample)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in prior.vae.parameters())
    x = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(prior.encode(prior.decode(x)).square().sum(), x)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    assert restorer.weights_hash() != plain.weights_hash()
    assert plain.backbone.vae.config["_class_name"] == "AutoencoderKL"


def test_psld_with_it(folders):
    restorer = restore.load(folders["sd"], vae=folders["tae"], vae_slicing=True)
    A = operators.SuperResolution(4, noise=operators.GaussianNoise(0.05))
    y = torch.rand(1, 3, 8, 10, generator=torch.Generator().manual_seed(0)) * 2 - 1
    result = restorer(y, A, sampler=psld, steps=3, eta=0.5, gamma=0.05, guidance=restore.PAG(1.0, "m1"))
    assert result.samples.shape == (1, 1, 3, 32, 40) and torch.isfinite(result.samples).all()
    assert result.protocol["autoencoder"] == "AutoencoderTiny"


def test_the_command_line(folders, tmp_path, monkeypatch, capsys):
    Image.open(data_dir() / "photos" / "coffee-64.png").resize((24, 20)).save(tmp_path / "photo.png")
    command = ["run", tmp_path / "photo.png", "--task", "denoise", "--backbone", folders["sd"], "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in ["restore", *command]])
    sys.argv += ["-o", str(tmp_path / "out"), "--vae", "PLACE"]
    for vae, code in ((folders["tae"], 0), (folders["other"], 2)):
        sys.argv[-1] = str(vae)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == code, capsys.readouterr().err
    assert "latents of 4 channels" in capsys.readouterr().err


def test_mistakes(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for kind, name in (("sd", "taesd"), ("sd3", "taesd3"), ("flux", "taef1"), ("dit", "taesd")):
        with pytest.raises(RestoreError, match=f"^{name} is not on this machine and the run is offline"):
            restore.load(folders[kind], vae="tiny", offline=True)
    for source, options, message in (
        ("embedded", {"vae": "tiny"}, "vae must be None for embedded, a model of pixels"),
        (folders["tae"], {}, "is an autoencoder"),
        (folders["sd"], {"vae": folders["sd3"]}, "vae must be an autoencoder.*kind sd3"),
        (folders["sd"], {"vae": folders["tae"], "vae_tiling": True}, "vae_tiling must be False for a tiny autoencoder"),
    ):
        with pytest.raises(RestoreError, match=message):
            restore.load(source, **options)


def test_the_registered_ones():
    for name in CHANNELS:
        entry = zoo.read_registry()[name]
        assert (entry.kind, entry.licence, entry.hub.repo) == ("autoencoder", "MIT", f"madebyollin/{name}")


@pytest.mark.parametrize("name, least", [("taesd", 22.0), ("taesd3", 25.0), ("taef1", 25.0)])
def test_real_weights_on_a_photo(tmp_path, name, least):
    """Encoded and decoded by way of this package's loader: the photo, in latents of about unit variance."""
    path = Path(os.environ.get("RESTORE_TEST_WEIGHTS", "/nowhere")) / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"set RESTORE_TEST_WEIGHTS to a folder with {name}.safetensors")
    vae = AutoencoderTiny(latent_channels=CHANNELS[name])
    vae.load_state_dict({key: tensor.float() for key, tensor in load_file(path).items()})
    vae.save_pretrained(tmp_path)
    prior = restore.backbones.autoencoder.Latents()
    prior.channels = CHANNELS[name]
    prior.use_vae(load_vae(tmp_path))
    x = io.read_image(data_dir() / "photos" / "astronaut.jpg").pixels[..., :256, 96:352]
    with torch.no_grad():
        z = prior.encode(x)
        back = prior.decode(z)
    psnr = float(10 * torch.log10(4 / (back - x).square().mean()))
    assert psnr > least and 0.6 < float(z.std()) < 1.6 and prior.downscale == 8
