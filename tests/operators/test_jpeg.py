"""JPEG as an operator, against Pillow's encoder and decoder, and its proximal step against dense matrices."""

import io

import numpy as np
import PIL.Image
import pytest
import torch

import operators
from operators import jpeg
from restore import RestoreError
from restore.images.compression import follow_edits, read_compression
from restore.images.io import read_image
from restore.task import load_task, measure_photo

PHOTO = "data/photos/astronaut-face-128.png"


def decode(picture, **options):
    stream = io.BytesIO()
    picture.save(stream, "JPEG", **options)
    image = PIL.Image.open(stream)
    y = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    return image, y


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 100])
def test_tables_are_those_of_libjpeg(quality):
    image, _ = decode(PIL.Image.open(PHOTO), quality=quality)
    for mine, table in zip(jpeg.standard_tables(quality), (image.quantization[0], image.quantization[1]), strict=True):
        assert mine.flatten().int().tolist() == list(table)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [(128, 128), (93, 75)], ids=str)
def test_coefficients_are_multiples_of_the_steps(subsampling, size):
    """Those of the decoded picture, but for the rounding of its pixels; also of chroma that a decoder enlarges."""
    picture = PIL.Image.open(PHOTO).convert("RGB").crop((0, 0, size[1], size[0]))
    _, y = decode(picture, quality=30, subsampling=subsampling)
    noise = operators.JPEGNoise(30, subsampling=subsampling)
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(noise(x), y, atol=1e-6)  # the same encoder
    steps = (12 * noise.variances(y.double())).sqrt()
    parts = [whole_blocks(noise, v, y) for v in (noise.read(y.double()), noise.measure(x.double()), steps)]
    for plane, (read, made, step) in enumerate(zip(*parts, strict=True)):
        shift = torch.zeros(64, dtype=torch.float64)
        shift[0] = 4 * (plane == 0)  # 128 is 0 for JPEG, 127.5 for us
        read, made = read - shift, made - shift
        off = (read - step * (read / step).round()).abs()
        assert off.square().mean().sqrt() < 1.5 and off.median() < 0.5  # of steps of 17 and more
        assert ((made / step).round() == (read / step).round()).double().mean() > 0.98


def whole_blocks(noise, coefficients, y):
    """Of each plane, the blocks (n, 64) that lie inside of the picture."""
    shapes = noise._shapes(y)
    planes = coefficients[0].split([64 * rows * columns for rows, columns in shapes])
    inside = [side // 16 for side in y.shape[2:]]
    kept = []
    for plane, (rows, columns) in zip(planes, shapes, strict=True):
        scale = [round(n * 16 / side) for n, side in zip((rows, columns), y.shape[2:], strict=True)]
        blocks = plane.view(rows, columns, 64)
        kept.append(blocks[: inside[0] * max(scale[0], 1), : inside[1] * max(scale[1], 1)].reshape(-1, 64))
    return kept


@pytest.mark.parametrize("quality", [10, 40, 75])
def test_what_was_lost_is_estimated(quality):
    for name in ("astronaut.jpg", "chelsea.jpg"):
        x = read_image(f"data/photos/{name}").pixels[..., 16:208, 96:288]
        noise = operators.JPEGNoise(quality)
        y = noise(x)
        assert noise.estimate_loss(y) == pytest.approx(float((y - x).square().mean().sqrt()), rel=0.35)


def test_grey_pictures():
    x = read_image(PHOTO).pixels.mean(1, keepdim=True)
    y = operators.JPEG(20)(x)
    assert y.shape == x.shape and 0.01 < float((y - x).square().mean().sqrt()) < 0.1
    z = operators.prox_l2(operators.JPEG(20), x, y, 1.0)
    assert float((operators.JPEG(20).noise.measure(z) - operators.JPEG(20).noise.measure(x)).abs().max()) > 1


def build(kind, subsampling):
    if kind == "jpeg":
        return operators.JPEG(30, subsampling=subsampling, noise=operators.GaussianNoise(0.02)), (16, 16)
    blur = operators.Blur(np.ones((3, 3)) / 9, border="unknown")
    return operators.Compose(blur, operators.JPEG(30, subsampling=subsampling)), (18, 18)


@pytest.mark.parametrize("kind", ["jpeg", "chain"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_proximal_step_against_dense_matrices(kind, subsampling):
    operator, size = build(kind, subsampling)
    x = 0.3 * torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, z, noise = operator(x), x.flip(-1), operator.noise
    eye = torch.eye(x[0].numel(), dtype=torch.float64)
    C = noise.measure(operator.A(eye.view(-1, *x.shape[1:]))).T
    weights = noise.sigma**2 / noise.variances(y)[0]
    for gamma in (0.0, 1.0, 1e4):
        right = gamma * C.T @ (weights[:, None] * noise.read(y).T) + z.flatten(1).T
        expected = torch.linalg.solve(gamma * C.T @ (weights[:, None] * C) + eye, right).T.view_as(x)
        found = operators.prox_l2(operator, z, y, gamma)
        assert (found - expected).norm() <= 1e-7 * expected.norm()
        rough = operators.prox_l2(operator, z, y, gamma, rough=True)
        bound = 0.03 if kind == "jpeg" else 0.15  # of pictures that are pure noise
        assert (rough - expected).norm() <= bound * (expected - z).norm() + 1e-12


def test_the_noise_before_is_part_of_the_data_term():
    x = read_image(PHOTO).pixels
    clean, noisy = operators.JPEG(75), operators.JPEG(75, noise=operators.GaussianNoise(0.1))
    assert noisy.noise.sigma**2 == pytest.approx(clean.noise.sigma**2 + 0.01)
    assert (noisy.noise.variances(x) > clean.noise.variances(x)).all()
    chain = operators.Compose(operators.SuperResolution(2), clean, noise=operators.GaussianNoise(0.1))
    assert chain.noise.sigma == noisy.noise.sigma and chain.linear
    g = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(noisy(x, g[0]), noisy(x, g[1])) and not torch.equal(noisy(x, g[0]), clean(x))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_a_file_says(tmp_path, orientation):
    """Steps and grid of the upright picture: its coefficients are multiples of them."""
    picture = PIL.Image.open(PHOTO).convert("RGB").crop((0, 0, 91, 70))
    exif = PIL.Image.Exif()
    exif[274] = orientation
    path = tmp_path / "photo.jpg"
    picture.save(path, quality=25, subsampling="4:4:4", exif=exif)
    found = read_compression(path)
    assert found["subsampling"] == "4:4:4" and (found["offset"] == [0, 0]) == (orientation in (1, 5))
    noise = operators.JPEGNoise(**found)
    y = read_image(path).pixels.double()
    read, steps = noise.read(y), (12 * noise.variances(y)).sqrt()
    n = noise._shapes(y)[0][0] * noise._shapes(y)[0][1]
    read = read[:, : 64 * n].view(*noise._shapes(y)[0], 64)[1:-1, 1:-1]
    steps = steps[0, :64]
    read[..., 0] -= 4
    off = (read - steps * (read / steps).round()).abs()
    assert off.square().mean().sqrt() < 1.0


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("turns", range(4))
def test_the_grid_of_a_turned_and_cropped_picture(tmp_path, turns, subsampling):
    """Steps and grid follow: coefficients of whole blocks are multiples of the steps, as in the file."""
    path = tmp_path / "photo.jpg"
    PIL.Image.open(PHOTO).convert("RGB").crop((0, 0, 91, 70)).save(path, quality=25, subsampling=subsampling)
    whole = read_image(path).pixels
    y = torch.rot90(whole, -turns, (-2, -1))[..., 5:, 19:].double()
    noise = operators.JPEGNoise(**follow_edits(read_compression(path), tuple(whole.shape[-2:]), turns, (5, 19)))
    read, steps = noise.read(y), (12 * noise.variances(y)).sqrt()
    rows, columns = noise._shapes(y)[0]
    read, steps = (v[..., : 64 * rows * columns].view(rows, columns, 64)[2:-2, 2:-2] for v in (read, steps))
    read = read - 4 * (torch.arange(64) == 0)  # the DC is of levels from -128 on
    off = (read - steps * (read / steps).round()).abs()
    assert min(read.shape) > 1 and off.square().mean().sqrt() < 1.0


def test_the_task(tmp_path):
    path = tmp_path / "photo.jpg"
    PIL.Image.open(PHOTO).save(path, quality=20)
    task = load_task("jpeg", {})
    config = task.for_photo(path).config
    assert config["tables"][0] == jpeg.standard_tables(20)[0].flatten().int().tolist()
    measured = measure_photo(path, task.for_photo(path), image_id="a")
    assert measured.operator.name == "jpeg" and torch.equal(measured.y, read_image(path).pixels)
    for photo, degrade in ((PHOTO, False), (path, True)):
        with pytest.raises(RestoreError, match="quality=auto is read from a JPEG file.*try quality=40"):
            task.for_photo(photo, degrade=degrade)
    settings = {"quality": 40}
    assert load_task("jpeg", settings).for_photo(PHOTO, degrade=True).build(64, 64).noise.quality == 40
    assert not settings
    chain = {"name": "compose", "operators": [{"name": "super_resolution", "factor": 2}, task.config]}
    path2 = tmp_path / "chain.yaml"
    path2.write_text(str(chain).replace("None", "null"))
    built = load_task(str(path2), {}).for_photo(path).build(256, 256)
    assert built.noise.tables[0].tolist() == jpeg.standard_tables(20)[0].tolist()


def test_what_is_refused():
    for options in (
        {},
        {"quality": 20, "tables": [[1] * 64]},
        {"quality": 0},
        {"quality": 101},
        {"tables": [[0] * 64]},
    ):
        with pytest.raises(RestoreError):
            operators.JPEG(**options)
    with pytest.raises(RestoreError, match="before JPEG must be Gaussian"):
        operators.JPEG(20, noise=operators.PoissonNoise(1.0))
