"""Tasks: looked up by every name that files in the wild may hold, built once, measured the same in every batch."""

import pytest
import torch

import operators
from operators import RestoreError
from restore.batch import join_operators, measure_batch
from restore.paths import configs_dir, data_dir
from restore.task import ALIASES, load_task, measure_photo, read_task


def test_every_alias_is_a_shipped_task():
    shipped = {path.stem for path in (configs_dir() / "task").glob("*.yaml")}
    assert set(ALIASES.values()) <= shipped and not set(ALIASES) & shipped
    for alias, name in ALIASES.items():
        assert read_task(alias) == read_task(name)
    assert load_task("gaussian_blur").describe() == load_task("gaussian-blur").describe()
    assert load_task("sr3").config["factor"] == load_task("sr3").factor == 3
    with pytest.raises(RestoreError, match="did you mean 'gaussian-blur'"):
        read_task("gausian-blur")


@pytest.mark.parametrize("name", ["inpainting_random", "motion_blur"])
def test_a_measurement_depends_on_the_image_only(name):
    """A mask or kernel of its own for every image, and its noise: the same bytes alone and in a batch."""
    config = {"name": name, "noise": {"name": "gaussian", "sigma": 0.1}}
    config |= {"kernel_size": 9} if name == "motion_blur" else {}
    x = torch.rand(3, 3, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    operator, y = measure_batch(config, x, ["a", "b", "c"], seed=1, per_image=True)
    alone, y_b = measure_batch(config, x[1:2], ["b"], seed=1, per_image=True)
    assert torch.equal(y[1:2], y_b) and operator.name == alone.name
    assert torch.equal(operators.select_rows(operator, [1]).A(x[1:2]), alone.A(x[1:2]))
    assert not torch.equal(measure_batch(config, x[1:2], ["b"], seed=2, per_image=True)[1], y_b)
    shared, y = measure_batch(config, x, ["a", "b", "c"], seed=1)
    assert torch.equal(shared.A(x[:1]), measure_batch(config, x[:1], ["z"], seed=5)[0].A(x[:1]))


def test_operators_that_cannot_share_a_batch():
    each = [operators.SuperResolution(2), operators.SuperResolution(2)]
    assert join_operators(each[:1]) is each[0]
    with pytest.raises(RestoreError, match="super_resolution.*batch"):
        join_operators(each)


def test_phase_retrieval_of_a_photo():
    """A photo is no magnitude of a Fourier transform: only a clean one can be measured."""
    path = data_dir() / "photos" / "astronaut-face-64.png"
    task = load_task("phase-retrieval")
    with pytest.raises(RestoreError, match="phase retrieval needs magnitudes, got a photo; try degrade=True"):
        measure_photo(path, task, image_id="a")
    measured = measure_photo(path, task, image_id="a", degrade=True)
    assert measured.y.shape == (1, 3, 96, 96) and float(measured.y.mean()) > 0.05
    exposed = measure_photo(path, load_task("hdr"), image_id="a")
    assert exposed.y.shape == (1, 3, 64, 64) and exposed.operator.name == "clipping"


@pytest.mark.parametrize("border", ["reflect", "circular"])
def test_kernels_that_share_a_batch_keep_their_border(border):
    config = {"name": "motion_blur", "kernel_size": 9, "border": border}
    x = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    operator, y = measure_batch(config, x, ["a", "b"], per_image=True)
    assert torch.allclose(operator.A(x), y, atol=1e-12)
