"""DISTS, VIF and ARNIQA against torchmetrics' own functions, on random weights where the published ones would be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torchvision

from operators import RestoreError
from restore.metrics import perceptual
from restore.metrics.table import BASE_METRICS, METRICS, MetricOptions, check_metrics, select_metrics

functional = pytest.importorskip("torchmetrics.functional.image", reason="torchmetrics is not installed")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A torch hub folder with the files that torchmetrics downloads for ARNIQA, and those of a VGG-16; the latter."""
    folder = tmp_path_factory.mktemp("hub")
    files = folder / "checkpoints"
    files.mkdir()
    torch.manual_seed(0)
    vgg = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    for parameter in vgg.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    torch.save({f"features.{key}": value for key, value in vgg.state_dict().items()}, files / "vgg.pth")
    encoder = torch.nn.Sequential(*list(torchvision.models.resnet50().children())[:-1]).eval()
    torch.save({f"model.{key}": value for key, value in encoder.state_dict().items()}, files / "ARNIQA.pth")

    class Regressor(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weights", torch.randn(1, 4096))
            self.register_buffer("biases", torch.tensor(50.0))

        def forward(self, x):
            return x @ self.weights.T + self.biases

    torch.jit.script(Regressor()).save(files / "regressor_koniq10k.pth")
    return folder, vgg


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    truth = (torch.rand(2, 3, 48, 64, generator=generator) * 255).round() / 127.5 - 1
    return (0.9 * truth + 0.1 * torch.rand(2, 3, 48, 64, generator=generator)).clamp(-1, 1), truth


def unit(image):
    return ((image + 1) * 127.5).round() / 255


def test_dists(published, images, monkeypatch):
    image, truth = images
    folder, vgg = published
    options = MetricOptions(weights={"vgg16": str(folder / "checkpoints" / "vgg.pth")})
    measure = METRICS["dists"].function(options, "cpu")
    monkeypatch.setattr(functional.dists, "vgg16", lambda **_: SimpleNamespace(features=vgg))
    expected = functional.dists.deep_image_structure_and_texture_similarity(unit(image), unit(truth))
    assert torch.allclose(measure(image, truth).float(), expected, atol=1e-5) and (expected > 1e-3).all()
    assert measure(truth[:1], truth[:1]).shape == (1,) and measure(truth, truth).abs().max() < 1e-6
    entry = check_metrics(select_metrics(["dists"]), options)
    assert "torchmetrics" in entry["implementation"] and entry["weights"]["vgg16"]["file"] == "vgg.pth"


def test_vif(images):
    image, truth = images
    expected = functional.visual_information_fidelity(unit(image) * 255, unit(truth) * 255, reduction="none")
    assert torch.allclose(perceptual.vif(image, truth).float(), expected, rtol=1e-3) and (expected < 0.99).all()
    assert torch.allclose(perceptual.vif(truth, truth), torch.ones(2).double(), atol=1e-6)
    with pytest.raises(RestoreError, match="41"):
        perceptual.vif(truth[..., :40], truth[..., :40])
    assert set(BASE_METRICS) == {"psnr", "ssim"}  # it is measured only if asked for


def test_arniqa(published, images, monkeypatch):
    (folder, _), image = published, images[0]
    files = folder / "checkpoints"
    models = {"arniqa": str(files / "ARNIQA.pth"), "arniqa_regressor": str(files / "regressor_koniq10k.pth")}
    score = METRICS["arniqa"].function(MetricOptions(models=models, offline=True), "cpu")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))
    expected = functional.arniqa(unit(image), reduction="none")
    assert torch.allclose(score(image, [""] * 2).float(), expected, atol=1e-4) and expected.std() > 1e-5
    assert score(image[:1], [""]).shape == (1,)
    models["arniqa"] = str(files / "vgg.pth")
    with pytest.raises(RestoreError, match="arniqa .* published"):
        METRICS["arniqa"].function(MetricOptions(models=models, offline=True), "cpu")


def test_without_torchmetrics_one_sentence(monkeypatch):
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    for name in ("dists", "vif", "arniqa"):
        with pytest.raises(RestoreError, match=rf"{name} needs torchmetrics.*\[metrics\]"):
            check_metrics(select_metrics([name]), MetricOptions())
