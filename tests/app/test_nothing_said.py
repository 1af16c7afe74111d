"""`restore run photo -o out/` and nothing else: five damaged photos, through the command line, beside their truth."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import operators
from restore.images import io
from restore.metrics.single import psnr
from restore.paths import data_dir

# What is expected to be said, and the least gain over the file in dB; measured: 11.1, 1.5, 1.5, 9.6, 1.6.
EXPECTED = {
    "noisy.png": ("noise of 2", 9.0),
    "blurred.png": ("blur of", 0.8),
    "ruined.jpg": ("JPEG of quality 15", 1.0),
    "scratched.png": ("scratches or dust", 7.0),
    "small.png": ("small, 96 x 88", 1.0),
}


@pytest.fixture(scope="module")
def truth():
    return io.read_image(data_dir() / "photos" / "coffee.jpg").pixels[..., 50:226, 100:292]


def damage(folder, x):
    def add_noise(x, levels):
        return x + levels / 127.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    scratched = x.clone()
    for k in range(150):
        scratched[..., 10 + k, 20 + k // 2 : 22 + k // 2] = 0.9
        scratched[..., 30 + k // 3 : 32 + k // 3, 20 + k] = 0.8
    pictures = {
        "noisy.png": add_noise(x, 25),
        "blurred.png": add_noise(operators.GaussianBlur(15, 1.8).A(x), 2),
        "scratched.png": scratched,
        "small.png": operators.SuperResolution(2).A(x),
        "truth.png": x,
    }
    folder.mkdir()
    for name, picture in pictures.items():
        io.write_image(folder / name, picture[0])
    Image.open(folder / "truth.png").save(folder / "ruined.jpg", quality=15)
    (folder / "truth.png").unlink()


def read(path, size):
    return io.to_tensor(np.asarray(Image.open(path).convert("RGB").resize(size[::-1], Image.Resampling.LANCZOS)))


@pytest.mark.slow
def test_five_damaged_photos(command, tmp_path, truth):
    damage(tmp_path / "in", truth)
    code, _, err = command("run", tmp_path / "in", "-o", tmp_path / "out")
    assert code == 0, err
    for name, (words, gain) in EXPECTED.items():
        note = json.loads((tmp_path / "out" / name).with_suffix(".json").read_text())["note"]
        assert words in note and "embedded-photo" in note and note in err
        before, after = (float(psnr(read(tmp_path / at / name, truth.shape[-2:]), truth)) for at in ("in", "out"))
        assert after > before + gain, f"{name}: {before:.2f} dB, restored {after:.2f} dB; {note}"
