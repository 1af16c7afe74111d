"""Conversion of pixels: every type and layout of an image, and one sentence for what is not an image."""

import numpy as np
import PIL.Image
import pytest
import torch

from operators import RestoreError
from restore.images import io


def photo(height=13, width=17, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def test_to_tensor_knows_ranges_and_layouts():
    array = photo()
    expected = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1
    for image in (array, PIL.Image.fromarray(array), array / 255.0, array.astype(np.int64), expected):
        assert torch.allclose(io.to_tensor(image), expected, atol=1e-6)
    assert torch.equal(io.to_tensor(np.stack([array, array])), expected.expand(2, -1, -1, -1))
    assert torch.equal(io.to_tensor(array[..., 0]), expected[:, :1].expand(-1, 3, -1, -1))
    assert io.to_tensor(array > 100).unique().tolist() == [-1, 1]
    for wrong in (
        array * 1.0,
        array / 127.5 - 1.0,
        np.full((2, 2, 3), np.nan),
        expected * 127.5,
        "a",
    ):
        with pytest.raises(RestoreError):
            io.to_tensor(wrong)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_tensors_of_integers_are_converted(kind):
    array = photo()
    expected = io.to_tensor(array)
    assert torch.allclose(io.to_tensor(torch.from_numpy(array).permute(2, 0, 1).to(kind)), expected, atol=1e-6)
    batch = torch.from_numpy(np.stack([array, 255 - array])).permute(0, 3, 1, 2).to(kind)
    assert torch.allclose(io.to_tensor(batch), torch.cat([expected, -expected]), atol=1e-6)
    assert torch.equal(io.to_tensor(torch.tensor([[[0, 1]]], dtype=torch.bool))[0, 0], torch.tensor([[-1.0, 1.0]]))


def test_lists_and_paths(tmp_path):
    first, second = photo(seed=1), photo(seed=2)
    expected = io.to_tensor(np.stack([first, second]))
    for name, array in (("a.png", first), ("b.png", second)):
        PIL.Image.fromarray(array).save(tmp_path / name)
    paths = [tmp_path / "a.png", str(tmp_path / "b.png")]
    tensors = [torch.from_numpy(array).permute(2, 0, 1) for array in (first, second)]
    for images in (paths, tensors, [first, second], [PIL.Image.fromarray(first), paths[1]], expected, list(expected)):
        assert torch.allclose(io.to_tensor(images), expected, atol=1e-6)
    assert torch.allclose(io.to_tensor(paths[0]), expected[:1], atol=1e-6)


def test_measurements_keep_their_channels(tmp_path):
    grey = torch.rand(2, 1, 8, 9) * 2 - 1
    assert torch.equal(io.to_tensor(grey, channels=None), grey) and io.to_tensor(grey).shape == (2, 3, 8, 9)
    assert torch.equal(io.to_tensor(grey, channels=1), grey)
    PIL.Image.fromarray(photo()[..., 0]).save(tmp_path / "grey.png")
    PIL.Image.fromarray(photo(channels=4)).save(tmp_path / "alpha.png")
    assert io.to_tensor(tmp_path / "grey.png", channels=None).shape == (1, 1, 13, 17)
    assert io.to_tensor(PIL.Image.open(tmp_path / "grey.png"), channels=None).shape == (1, 1, 13, 17)
    assert io.to_tensor(tmp_path / "alpha.png", channels=None).shape == (1, 3, 13, 17)
    sinogram = torch.randn(2, 40) * 2
    assert torch.equal(io.to_tensor(sinogram, channels=None), sinogram)
    # Grey is Pillow's luma.
    array = photo()
    luma = np.asarray(PIL.Image.fromarray(array).convert("L")) / 127.5 - 1
    assert np.abs(io.to_tensor(array, channels=1)[0, 0].numpy() - luma).max() < 0.5 / 127


def test_a_noisy_measurement_passes_and_another_range_does_not():
    x = torch.rand(4, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noisy = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(io.to_tensor(noisy), noisy) and noisy.abs().max() > 5
    dim = (x + 1) * 5  # a dark picture on 0..255, as floats
    assert torch.equal(io.to_tensor(dim, largest=float("inf")), dim)
    for wrong in (dim, (x + 1) * 127.5, (x + 1) * 127.5 - 300):
        with pytest.raises(RestoreError, match="divide 0..255 by 127.5"):
            io.to_tensor(wrong)


@pytest.mark.parametrize(
    "image, message",
    [
        ([], "must not be empty"),
        (torch.zeros(0, 3, 8, 8), "must not be empty"),
        (np.zeros((0, 8, 8, 3), np.uint8), "must not be empty"),
        ([photo(8, 8), photo(8, 9)], "x 8 x 8 and . x 8 x 9"),
        (torch.zeros(1, 5, 8, 8), "of 1 to 4 channels"),
        (torch.zeros(8, 8), "of 1 to 4 channels"),
        (np.zeros((8, 8, 5)), "numpy image must be"),
        (torch.full((3, 8, 8), float("nan")), "NaN"),
        (torch.full((3, 8, 8), float("inf")), "infinite"),
        (torch.full((3, 8, 8), 300), "0..255, got 300"),
        (photo().astype(np.int64) - 128, "0..255"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), "complex64"),
        (np.full((4, 4), "a"), "<U1"),
        ({"a": 1}, "got dict"),
        (None, "got NoneType"),
        (["nowhere.png"], "nowhere.png"),
    ],
)
def test_invalid_images_raise_one_sentence(image, message):
    for channels in (3, 1):
        with pytest.raises(RestoreError, match=message) as caught:
            io.to_tensor(image, channels=channels)
        assert len(str(caught.value).splitlines()) == 1
