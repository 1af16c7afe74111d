from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from operators import RestoreError
from restore import zoo
from restore.metrics import single, weights


def noisy(image: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return (image + noise).round().clip(0, 255).astype(np.uint8)


def picture(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([128 + 90 * np.sin(x / 7), 2.0 * y % 256, (x + y) % 256], axis=-1).astype(np.uint8)


def as_tensor(*pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(pixels)).movedim(-1, 1) / 127.5 - 1


@pytest.mark.parametrize("shape", [(64, 64), (37, 53), (11, 90)])
@pytest.mark.parametrize("sigma", [2.0, 40.0])
def test_psnr_and_ssim_equal_scikit_image(shape, sigma):
    truth = picture(*shape)
    image = noisy(truth, sigma)
    pair = as_tensor(image), as_tensor(truth)
    assert float(single.psnr(*pair)) == pytest.approx(peak_signal_noise_ratio(truth, image, data_range=255), rel=1e-12)
    expected = structural_similarity(
        truth, image, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert float(single.ssim(*pair)) == pytest.approx(expected, rel=1e-9)
    assert -1 < float(single.ssim(*pair)) < 1


def test_equal_images():
    image = as_tensor(picture(32, 32))
    assert float(single.psnr(image, image)) == math.inf
    assert float(single.ssim(image, image)) == pytest.approx(1.0, rel=1e-12)


def test_tensors_are_rounded_to_eight_bits_and_clamped():
    x = torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    truth = torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(1)) * 2 - 1
    rounded = [((v + 1) * 127.5).clamp(0, 255).round() / 127.5 - 1 for v in (x, truth)]
    for metric in (single.psnr, single.ssim):
        values = metric(x, truth)
        assert values.shape == (2,) and values.dtype == torch.float64
        each = [float(metric(rounded[0][[i]], rounded[1][[i]])) for i in range(2)]
        assert values.tolist() == pytest.approx(each, rel=1e-12)


def test_metrics_refuse_other_shapes_types_and_tiny_images():
    with pytest.raises(RestoreError, match="one shape"):
        single.psnr(as_tensor(picture(8, 8)), as_tensor(picture(8, 9)))
    with pytest.raises(RestoreError, match=r"\(3, H, W\)"):
        single.psnr(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    with pytest.raises(RestoreError, match="11 x 11"):
        single.ssim(as_tensor(picture(10, 30)), as_tensor(picture(10, 30)))


def test_spread_and_coverage_of_exchangeable_samples():
    k = 4
    draws = torch.randn(2, k + 1, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 0.3
    samples, truth = draws[:, :k], draws[:, k]
    assert torch.allclose(single.coverage(samples, truth), torch.full((2,), (k - 1) / (k + 1)), atol=0.01)
    # Standard deviation of k Gaussian draws, Bessel-corrected: c4(4) = 0.9213.
    assert torch.allclose(single.spread(samples), torch.full((2,), 0.3 * 0.9213), rtol=0.01)
    assert single.coverage(samples, truth + 5).max() == 0
    assert single.coverage(samples[:, :1], truth).isnan().all() and single.spread(samples[:, :1]).isnan().all()


@pytest.mark.parametrize(
    "net, name, file",
    [
        ("alex", "alexnet", "alexnet-owt-7be5be79.pth"),
        pytest.param("vgg", "vgg16", "vgg16-397923af.pth", marks=pytest.mark.slow),  # a file of 528 MB
    ],
)
def test_lpips_equals_the_package_with_the_same_weights(hub, monkeypatch, tmp_path, net, name, file):
    """The package loads the weights by its own way, through torchvision's cache; ours reads the file."""
    import lpips
    import torchvision

    if net == "vgg":
        hub = tmp_path
        (hub / "checkpoints").mkdir()
        torch.manual_seed(1)
        torch.save(torchvision.models.vgg16().state_dict(), hub / "checkpoints" / file)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    entry = zoo.find_model(name)  # of the hub's random weights
    download = dataclasses.replace(entry.download, sha256="")
    monkeypatch.setattr(weights.zoo, "find_model", lambda _: dataclasses.replace(entry, download=download))
    package = lpips.LPIPS(net=net, version="0.1", verbose=False)
    ours = single.LPIPS(net)
    truth = np.stack([picture(64, 64), picture(64, 64)[::-1]])
    image = noisy(truth, 25.0)
    tensors = [torch.from_numpy(v.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1 for v in (image, truth)]
    expected = package(*tensors).flatten().detach()
    assert ours(*tensors).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert expected.min() > 1e-4 and ours(tensors[1], tensors[1]).max() == 0
    larger = [torch.nn.functional.interpolate(v, scale_factor=2, mode="bicubic").clamp(-1, 1) for v in tensors]
    enlarged = package(*larger).flatten().detach().tolist()
    assert single.LPIPS(net, enlarge=2)(*tensors).tolist() == pytest.approx(enlarged, rel=1e-5) != expected.tolist()
    pairs = torch.cat([tensors[1], tensors[0][:1]])
    by_hand = np.mean([ours(pairs[[i]], pairs[[j]]).item() for i, j in ((0, 1), (0, 2), (1, 2))])
    assert ours.mean_pairwise(pairs) == pytest.approx(by_hand, rel=1e-5)


def test_missing_weights_say_which_file_goes_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(RestoreError) as error:
        single.LPIPS("vgg")
    assert str(tmp_path / "checkpoints" / "vgg16-397923af.pth") in str(error.value)
    assert "restore models pull vgg16" in str(error.value) and "weights.vgg16=FILE" in str(error.value)
    with pytest.raises(RestoreError, match="no net 'squeeze'; known: alex, vgg"):
        single.LPIPS("squeeze")
    with pytest.raises(RestoreError, match="lpips_enlarge=0"):
        single.LPIPS("alex", enlarge=0)


def test_damaged_foreign_and_dangerous_weights_are_refused(tmp_path):
    damaged = tmp_path / "alexnet-owt-7be5be79.pth"
    damaged.write_bytes(b"not the published file")
    with pytest.raises(RestoreError, match="damaged"):
        weights.find_weights("alexnet", {"alexnet": tmp_path})
    foreign = tmp_path / "mine.pth"
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, foreign)
    with pytest.raises(RestoreError, match="another network"):
        weights.find_weights("alexnet", {"alexnet": foreign})
    assert weights.find_weights("vgg16", {"vgg16": foreign}) == foreign

    class Code:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"features.0.weight": Code()}, foreign)
    with pytest.raises(RestoreError, match="refused: it is a pickle that asks to run code"):
        weights.find_weights("vgg16", {"vgg16": foreign})
    with pytest.raises(RestoreError, match="no weights called 'resnet'"):
        weights.find_weights("vgg16", {"resnet": foreign})
