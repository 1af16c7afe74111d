"""Makes the helpers that lie beside the test folders importable; fixtures that several folders share."""

from __future__ import annotations

import gc
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from restore.paths import data_dir

sys.path.insert(0, str(Path(__file__).parent))
THREADS = torch.get_num_threads()
# One long test each: with two workers, begun last they would keep one of them waiting.
FIRST = ("test_device.py", "test_page_browser.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)


def pytest_collection_finish():
    """Half a million objects of the libraries are there for good; looking through them takes the third of a second
    each time that memory is freed."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _threads():
    """Rounding depends on the number of threads: no test may leave its own behind."""
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _own_code(request, monkeypatch):
    """A pretended device runs the networks' own code; its results are compared to the bit with those of the CPU."""
    if "device" in request.path.relative_to(Path(__file__).parent).parts:
        monkeypatch.setattr("restore.restorer.run_lean", nullcontext)


def _smooth_images(n: int, size: int, seed: int) -> np.ndarray:
    """Random smooth colour fields, uint8 (n, size, size, 3): structured enough for SSIM and LPIPS to respond."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 6, 6, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    return (fine.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def _write_images(folder, images: np.ndarray, names=None) -> list:
    folder.mkdir(parents=True, exist_ok=True)
    names = names or [f"{i:05d}" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="session")
def smooth_images():
    return _smooth_images


@pytest.fixture(scope="session")
def write_images():
    return _write_images


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """The real Inception architecture of torch-fidelity with random weights that keep the signal's size."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda url, progress: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    # Logits apart enough for an Inception Score above one.
    network.fc.weight.data *= 100
    path = tmp_path_factory.mktemp("weights") / "inception-random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def trunks(tmp_path_factory):
    """{network: file} with random weights of the convolutions of VGG-16 and AlexNet, all that LPIPS reads."""
    import torchvision

    folder, generator, files = tmp_path_factory.mktemp("trunks"), torch.Generator().manual_seed(3), {}
    for name in ("vgg16", "alexnet"):
        with torch.device("meta"):  # their classifiers, a hundred times larger, are made nowhere
            shapes = {key: value.shape for key, value in getattr(torchvision.models, name)().state_dict().items()}
        shapes = {key: shape for key, shape in shapes.items() if key.startswith("features.")}
        state = {  # of the size that keeps the signal's, and biases, without which the size of a layer does not matter
            key: torch.randn(shape, generator=generator) * ((2 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else 0.1)
            for key, shape in shapes.items()
        }
        files[name] = folder / f"{name}.pth"
        torch.save(state, files[name])
    return files


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A torch hub folder holding AlexNet with random weights where torchvision looks for the published ones."""
    import torchvision

    folder = tmp_path_factory.mktemp("hub")
    (folder / "checkpoints").mkdir()
    torch.manual_seed(1)
    torch.save(torchvision.models.alexnet().state_dict(), folder / "checkpoints" / "alexnet-owt-7be5be79.pth")
    return folder


def _adm(folder, size: int, widths: tuple, layers: int, attention: tuple, classes: int | None = None):
    """A folder with an ADM of random weights. attention: the levels that have it, besides the middle."""
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    n = len(widths)
    network = UNet2DModel(
        sample_size=size,
        in_channels=3,
        out_channels=6,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=tuple("AttnDownBlock2D" if i in attention else "ResnetDownsampleBlock2D" for i in range(n)),
        up_block_types=tuple("AttnUpBlock2D" if n - 1 - i in attention else "ResnetUpsampleBlock2D" for i in range(n)),
        attention_head_dim=8,
        norm_num_groups=8,
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        flip_sin_to_cos=True,
        freq_shift=0,
        num_class_embeds=classes,
    )
    network.save_pretrained(folder)
    DDPMScheduler().save_pretrained(folder / "scheduler")  # weights do not tell how they were trained
    return folder


@pytest.fixture(scope="session")
def tiny_adm(tmp_path_factory):
    """A 16-pixel network with attention at 8 pixels and in the middle."""
    return _adm(tmp_path_factory.mktemp("tiny-adm"), 16, (8, 16), 1, (1,))


def _sd(folder):
    """A Stable Diffusion folder whose U-Net has attention in three of four levels, as the real one."""
    import tiny_sd

    unet = tiny_sd.tiny_unet(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(16, 16, 16, 32),
    )
    tiny_sd.tiny_pipeline(folder / "tokenizer-source", unet=unet).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_run(tmp_path, tiny_adm):
    """What the configurations of small benchmarks and searches have in common."""
    common = {"name": "tiny", "backbone": str(tiny_adm), "out": str(tmp_path / "run"), "device": "cpu", "threads": 1}
    return common | {"batch": 2}


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """Networks with the blocks and attention layers of the published ones, and next to no channels."""
    root = tmp_path_factory.mktemp("stand-ins")
    return {
        "adm-ffhq-256": _adm(root / "ffhq", 256, (8, 8, 8, 8, 8, 8), 1, (4,)),
        "adm-imagenet-256": _adm(root / "imagenet", 256, (8, 8, 8, 8, 8, 8), 2, (3, 4, 5)),
        # Generation needs no pixels to speak of.
        "small-imagenet": _adm(root / "small", 64, (8, 8, 8, 8, 8, 8), 2, (3, 4, 5)),
        "small-imagenet-cond": _adm(root / "small-cond", 64, (8, 8, 8, 8, 8, 8), 2, (3, 4, 5), 1000),
        "sd-1.5": _sd(root / "sd"),
        "embedded": _adm(root / "embedded", 64, (8, 8, 8, 8), 1, (2, 3)),
        "embedded-latent": data_dir() / "embedded-latent",  # itself: few steps of it are quick
    }


@pytest.fixture
def command(monkeypatch, capsys):
    """run(*arguments) -> (exit code, stdout, stderr) of the command `restore`."""
    from restore.app import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["restore", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
